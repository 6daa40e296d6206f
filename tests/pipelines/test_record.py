"""Recorded runs are played again to the bit; `esper record` refuses what could not be; the shipped recording is whole.

The properties are shown on runs of scaling laws, which are the same episodes; one test trains, records and plays.
"""

import itertools
import json
import re
import shutil

import gymnasium as gym
import numpy as np
import pyarrow.parquet as pq
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st

from esper.pipelines import train
from esper.pipelines.common.ended_runs import EndedRun
from esper.pipelines.common.play import play
from esper.pipelines.tools import record
from esper.platform.contracts import GraftAction
from esper.platform.errors import UserError
from esper.platform.recording import FILES, SEEN_FILE
from esper.platform.spec import load_spec
from esper.platform.storage import new_folder
from esper.policies.random import RandomPolicy
from esper.policies.recorder import Recorder
from esper.policies.tamiyo import TamiyoPolicy
from esper.workers.environment import growth_recorded_env
from esper.workers.laws.surrogate import SurrogateRun
from esper.workers.recorded import RecordedRun
from tests.pages import RECORDED, ROOT

SHIPPED = (ROOT / RECORDED).parent
SPEC = load_spec("tinystories-char", ["budget.decisions=8"])
ARRAYS = ("globals", "sites", "candidates")


def ended(folder, policy, seed, arm, spec=SPEC, pay=0.0):
    """A run of a law in a folder, and each of its telemetry, chosen row, and reward."""
    run, policy, seen = SurrogateRun(spec), Recorder(policy), []
    run.reset(seed=seed)
    run.ledger.parameter_seconds += pay
    summary = play(run, policy, arm=arm, on_decision=lambda _, telemetry, action: seen.append((telemetry, action)))
    folder.mkdir(parents=True)
    (folder / SEEN_FILE).write_bytes(policy.record(run.telemetry))
    steps = [(t, a.index, reward) for (t, a), reward in zip(seen, summary["rewards"], strict=True)]
    pins = {"commit": "abc", "torch": "2", "files": {}, "inputs": {}}
    return EndedRun(spec, "text", json.loads(json.dumps(summary)), folder, pins), [*steps, (run.telemetry, None, None)]


def recorded(tmp_path, runs):
    record.check_alike(runs)
    with new_folder(tmp_path / "recording") as out:
        record.write(runs, out)
    return tmp_path / "recording"


@settings(max_examples=15, deadline=None)
@given(draws=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 50)), min_size=1, max_size=6, unique=True))
def test_every_run_is_played_again_to_the_bit_and_a_controller_ends_where_its_run_did(draws, tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("runs")
    arms = [(seed, RandomPolicy(own), f"random-{own}") for seed, own in draws]
    arms += [(seed, TamiyoPolicy(), "tamiyo") for seed in {seed for seed, _ in draws}]
    made = [ended(tmp_path / f"{arm}-{seed}", policy, seed, arm) for seed, policy, arm in arms]
    env = growth_recorded_env(recorded(tmp_path, [run for run, _ in made]))
    assert {kept.seed for kept in env.instance_set.values()} == {seed for seed, _, _ in arms}
    by_seed = {kept.seed: number for number, kept in env.instance_set.items()}
    for (seed, _, arm), (run, steps) in zip(arms, made, strict=True):
        observation, info = env.reset(options={"instance_id": by_seed[seed]})
        for telemetry, row, reward in steps:
            assert all(np.array_equal(observation[name], getattr(telemetry, name)) for name in ARRAYS)
            assert (env.run.telemetry.actions, env.run.telemetry.site_ids) == (telemetry.actions, telemetry.site_ids)
            assert not (observation["mask"].astype(bool) & ~telemetry.mask).any()
            if row is not None:
                assert env.action_masks()[row]
                observation, got, terminated, _, info = env.step(row)
                assert (got, info["illegal"]) == (reward, False)
        assert terminated
        assert (info["val_loss"], info["summary"]["unrecorded"]) == (run.summary["val_loss"], 0)
        if arm == "tamiyo":
            replay = RecordedRun(tmp_path / "recording")
            replay.reset(replay.instances[by_seed[seed]])
            while not replay.ended:
                replay.step(TamiyoPolicy().act(replay.telemetry, replay))
            assert (replay.loss, replay.unrecorded) == (run.summary["val_loss"], 0)
            assert replay.instance.best <= replay.loss


def test_trained_runs_are_recorded_and_what_nobody_did_is_counted(tiny, tmp_path, capfd):
    for arm in ("static", "onejump"):
        assert train.main([arm, *tiny, "--out", str(tmp_path / "runs" / arm)]) == 0
    assert record.main([str(tmp_path / "runs"), "--out", str(tmp_path / "recording")]) == 0
    assert "2 of 1 instance (seed" in capfd.readouterr().err
    env = gym.make("esper.workers.environment:Esper/GrowthRecorded-v0", data=tmp_path / "recording").unwrapped
    check_env(env)
    ends = {arm: json.loads((tmp_path / "runs" / arm / "summary.json").read_text()) for arm in ("static", "onejump")}
    for arm, end in ends.items():
        env.reset()
        while not env.run.ended:
            masks = np.flatnonzero(env.action_masks())
            row = masks[-1] if arm == "onejump" else masks[0]
            _, _, _, _, info = env.step(row)
        assert info["val_loss"] == end["val_loss"]
    assert env.run.instance.best == min(end["val_loss"] for end in ends.values())
    run = env.run
    run.reset()
    while len(run.telemetry.legal()) < 2:
        run.step(GraftAction(0, run.telemetry.sequence))
    run.step(GraftAction(int(run.telemetry.legal()[-1]), run.telemetry.sequence))
    run.step(GraftAction(len(run.telemetry.actions) - 1, run.telemetry.sequence))
    assert run.unrecorded == 1
    env.reset()
    info = env.step(len(run.telemetry.actions) - 1)[-1]
    assert (info["illegal"], info["action"], run.unrecorded) == (True, "wait", 1)
    with pytest.raises(UserError, match="older observation"):
        run.step(GraftAction(0, 0))
    with pytest.raises(UserError, match="need real runs"):
        run.twins([], 4)


def test_runs_that_are_no_tree_and_files_that_are_no_recording_are_refused(tmp_path, refused, tiny):
    one, other = (ended(tmp_path / arm, TamiyoPolicy(), 0, arm)[0] for arm in ("a", "b"))
    paid, _ = ended(tmp_path / "lag", TamiyoPolicy(), 0, "lag", pay=1e4)
    with pytest.raises(UserError, match=r"0 \(a\) and 1 \(lag\) of seed 0 took the same actions and came to other"):
        RecordedRun(recorded(tmp_path, [one, paid]))
    shutil.rmtree(tmp_path / "recording")
    tuned, _ = ended(tmp_path / "tuned", TamiyoPolicy(), 0, "c", SPEC.overridden({"optimizer.learning_rate": 0.02}))
    with pytest.raises(UserError, match=r"differ in optimizer\.learning_rate"):
        record.check_alike([one, tuned])
    begun = {**one.pins, "files": {"inputs/model.safetensors": "1"}, "inputs": {"model": "inputs/model.safetensors"}}
    with pytest.raises(UserError, match="differ in the weights to start with"):
        record.check_alike([one, other._replace(pins=begun)])
    with pytest.raises(UserError, match="differ in the text"):
        record.check_alike([one, other._replace(text="another")])
    record.check_alike([one, other._replace(spec=SPEC.overridden({"budget.amount": 1e6, "host.n_layer": 2}))])
    folder = recorded(tmp_path, [one, other])
    kept = {name: (folder / name).read_bytes() for name in (*FILES, "manifest.json")}
    manifest = json.loads(kept["manifest.json"])
    swapped = {"files": dict.fromkeys(FILES, manifest["files"][FILES[1]])}
    for name, content, told in (
        (FILES[0], kept[FILES[0]][:-9] + b"x" + kept[FILES[0]][-8:], "checksum is not the manifest's"),
        (FILES[1], kept[FILES[0]], "checksum is not the manifest's"),
        ("manifest.json", b"{}", "missing"),
        ("manifest.json", b"\x80", "not valid JSON"),
        *(
            ("manifest.json", json.dumps({**manifest, **changed}).encode(), told)
            for changed, told in (
                ({"telemetry": 2}, "telemetry version 2"),
                ({"candidates": 1}, "no run"),
                (swapped, "checksum"),
            )
        ),
    ):
        (folder / name).write_bytes(content)
        with pytest.raises(UserError, match=re.escape(told)):
            RecordedRun(folder)
        (folder / name).write_bytes(kept[name])
    RecordedRun(folder)
    with pytest.raises(UserError, match="cannot be read"):
        growth_recorded_env(tmp_path / "nothing")
    out = tmp_path / "run"
    assert train.main(["static", *tiny, "--out", str(out)]) == 0
    (out / SEEN_FILE).write_bytes(b"no table")
    refused(record.main, [out, "--out", tmp_path / "new"], "does not hold what its run saw")
    refused(record.main, [tmp_path / "recording", "--out", tmp_path / "new"], "holds no ended run")
    refused(record.main, [out, "--out", out], "already holds another run")
    assert not (tmp_path / "new").exists()


def test_the_shipped_recording_is_whole():
    run, table = RecordedRun(SHIPPED), pq.read_table(SHIPPED / FILES[1]).to_pylist()
    assert len(table) >= 200
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) < 4e6
    made = pq.read_table(SHIPPED / FILES[0], columns=["run", "row", "reward", "val_loss"]).to_pylist()
    for row in table:
        run.reset(run.instances[row["instance"]])
        own = [each for each in made if each["run"] == row["run"]]
        for before, after in itertools.pairwise(own):
            assert run.step(GraftAction(before["row"], run.telemetry.sequence)).reward == before["reward"]
            assert run.loss == after["val_loss"]
        assert (run.ended, run.loss, run.unrecorded) == (True, row["val_loss"], 0)
