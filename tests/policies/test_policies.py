"""The hand-written controllers do what their docstrings say. Runs are SurrogateRuns: real episodes, no training."""

import dataclasses
import json

import numpy as np
import pytest

from esper.platform.errors import UserError
from esper.platform.spec import load_spec
from esper.platform.telemetry import CANDIDATE, GLOBALS, SITE
from esper.policies.arms import ALIASES, ARMS, ArmInputs, arm_name, make_policy
from esper.policies.named_schedules import NAMED
from esper.policies.random import RandomPolicy
from esper.policies.schedule import Entry, SchedulePolicy
from esper.policies.static import StaticPolicy
from esper.policies.tamiyo import TamiyoPolicy
from esper.workers.laws.surrogate import SurrogateRun


@pytest.fixture(scope="module")
def spec():
    return load_spec("tinystories-char")


def play(spec, policy, seed=0):
    run = SurrogateRun(spec)
    telemetry = run.reset(seed=seed)
    while True:
        transition = run.step(policy.act(telemetry))
        if transition.terminated:
            return run.summary()
        telemetry = transition.telemetry


def test_static_never_grows(spec):
    assert play(spec, StaticPolicy())["grafts"] == []


def test_random_is_seeded(spec):
    first, again, other = (play(spec, RandomPolicy(seed))["grafts"] for seed in (1, 1, 2))
    assert first == again != other
    assert first


@pytest.mark.parametrize("seed", range(5))
def test_random_can_match_another_run(spec, seed):
    kinds = ["block", "ffn", "ffn", "attention"]
    grafts = play(spec, RandomPolicy(seed, matched=kinds))["grafts"]
    assert sorted(graft["blueprint"] for graft in grafts) == sorted(kinds)


def test_random_matches_a_summary_file(spec, tmp_path):
    summary = play(spec, RandomPolicy(3))
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    matched = play(spec, make_policy("random", ArmInputs(seed=9, match=tmp_path / "summary.json")))
    assert sorted(g["blueprint"] for g in matched["grafts"]) == sorted(g["blueprint"] for g in summary["grafts"])


def test_schedule_grafts_when_and_where_it_says(spec):
    policy = SchedulePolicy(
        [
            Entry(at=0.4, blueprint="ffn", site="h0.ffn"),
            Entry(at=0.15, blueprint="block"),
            Entry(at=0.15, blueprint="block", site="h1.stream"),
        ]
    )
    grafts = play(spec, policy)["grafts"]
    assert [(g["site"], g["blueprint"]) for g in grafts] == [
        ("h0.stream", "block"),
        ("h1.stream", "block"),
        ("h0.ffn", "ffn"),
    ]
    slice_ = 1 / spec.budget.decisions
    for graft, at in zip(grafts, (0.15, 0.15 + slice_, 0.4), strict=True):
        assert at <= graft["budget_fraction"] + 1e-3 < at + 2 * slice_


def test_planned_grafts_that_were_not_played_are_known(spec):
    tight = spec.model_copy(update={"growth": spec.growth.model_copy(update={"max_layers": spec.host.n_layer + 1})})
    for policy, left in (
        (SchedulePolicy([Entry(at=0.1, blueprint="block"), Entry(at=0.2, blueprint="block")]), ["block at 20%"]),
        (RandomPolicy(0, matched=["block", "block"]), ["block"]),
    ):
        play(spec, policy)
        assert policy.unplayed() == []
        play(tight, policy)
        assert policy.unplayed() == left


@pytest.mark.parametrize("name", NAMED)
def test_named_schedules_graft_all_that_they_name(spec, name):
    grafts = play(spec, make_policy(name, ArmInputs(blueprints=tuple(spec.growth.blueprints))))["grafts"]
    assert [graft["blueprint"] for graft in grafts] == [entry.blueprint for entry in NAMED[name]]
    with pytest.raises(UserError, match=f"blueprint in arm '{name}'"):
        make_policy(name, ArmInputs(blueprints=("expert",)))


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ({"at": 0.0, "blueprint": "blok"}, "Did you mean 'block'"),
        ({"at": 0.0, "blueprint": "ffn", "site": "h7.ffn"}, "unknown site"),
        ({"at": 1.5, "blueprint": "ffn"}, "less than or equal to 1"),
        ({"when": 0.5, "blueprint": "ffn"}, "at"),
    ],
)
def test_bad_schedules(spec, tmp_path, entry, sentence):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps([entry]))
    with pytest.raises(UserError, match=sentence):
        play(spec, SchedulePolicy.load(path))


@pytest.mark.parametrize("text", ["{", "{}", None])
def test_schedule_files_that_are_none(tmp_path, text):
    path = tmp_path / "plan.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match="--schedule"):
        SchedulePolicy.load(path)


def flat(spec):
    """An observation of a two-layer host whose loss is nearly flat, in mid-run, with measured norms."""
    spec = spec.model_copy(update={"host": spec.host.model_copy(update={"n_layer": 2})})
    run = SurrogateRun(spec)
    telemetry = run.reset(seed=0)
    for _ in range(6):
        telemetry = run.step(StaticPolicy().act(telemetry)).telemetry
    values = telemetry.globals.copy()
    values[GLOBALS.index("slope_fast")] = 0.01
    values[GLOBALS.index("tokens_per_parameter")] = 6.0
    return with_pressures(
        dataclasses.replace(telemetry, globals=values), dict.fromkeys(telemetry.site_ids, -3.0) | {"h0.stream": -1.0}
    )


def with_pressures(telemetry, pressures):
    """The observation with other gradient norms at its sites."""
    sites, candidates = telemetry.sites.copy(), telemetry.candidates.copy()
    for i, site in enumerate(telemetry.site_ids):
        sites[i, SITE.index("gradient_norm")] = pressures[site] / 10
        sites[i, SITE.index("norms_measured")] = 1
    for i, action in enumerate(telemetry.actions):
        if action.site:
            candidates[i, CANDIDATE.index("site_present") :] = sites[telemetry.site_ids.index(action.site)]
    return dataclasses.replace(telemetry, sites=sites, candidates=candidates)


def test_tamiyo_follows_the_pressure(spec):
    telemetry = flat(spec)
    chosen = telemetry.actions[TamiyoPolicy().act(telemetry).index]
    assert (chosen.blueprint, chosen.site) == ("block", "h0.stream")
    swapped = with_pressures(telemetry, dict.fromkeys(telemetry.site_ids, -3.0) | {"h1.stream": -1.0})
    assert telemetry.actions[TamiyoPolicy().act(swapped).index].site == "h1.stream"


def test_tamiyo_waits_while_the_loss_falls(spec):
    telemetry = flat(spec)
    values = telemetry.globals.copy()
    values[GLOBALS.index("slope_fast")] = 3.0
    action = TamiyoPolicy().act(dataclasses.replace(telemetry, globals=values))
    assert action.index == 0
    assert "still falling" in action.reason


def test_tamiyo_waits_after_a_graft(spec):
    telemetry = flat(spec)
    values = telemetry.globals.copy()
    values[GLOBALS.index("since_graft")] = 0.04
    assert "young" in TamiyoPolicy().act(dataclasses.replace(telemetry, globals=values)).reason


def test_tamiyo_takes_a_smaller_graft_where_a_layer_is_not_legal(spec):
    telemetry = flat(spec)
    mask = telemetry.mask & ~np.array(
        [i < len(telemetry.actions) and telemetry.actions[i].blueprint == "block" for i in range(len(telemetry.mask))]
    )
    action = TamiyoPolicy().act(dataclasses.replace(telemetry, mask=mask))
    assert telemetry.actions[action.index].blueprint == "ffn"


def test_tamiyo_grows_only_what_can_still_be_trained(spec):
    telemetry = flat(spec)
    values = telemetry.globals.copy()
    values[GLOBALS.index("tokens_per_parameter")] = 0.5
    action = TamiyoPolicy().act(dataclasses.replace(telemetry, globals=values))
    assert "can train" in action.reason


def test_aliases_and_unknown_arms():
    assert {arm_name(alias) for alias in ALIASES} <= set(ARMS)
    with pytest.raises(UserError, match="unknown arm 'statik'"):
        arm_name("statik")
    for arm in ("ppo", "schedule"):
        with pytest.raises(UserError, match="needs a"):
            make_policy(arm, ArmInputs())
