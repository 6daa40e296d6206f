"""What is logged arrives in MLflow, once and in order, whatever dies; a store that is not there costs no time."""

import contextlib
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from esper.platform import tracking
from esper.platform.errors import UserError
from esper.platform.journal import read_entries
from esper.platform.tracking import JOURNAL, Tracker, sync, synced
from tests.mlflow_servers import MlflowServer
from tests.pipelines.helpers import wait_for

ROOT = Path(__file__).parents[2]
OUTAGE_SECONDS = 3
PARAMS = {"host": {"n_layer": 2}, "betas": [0.9, 0.95]}


@pytest.fixture(autouse=True)
def said_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was said of stores in other tests is said again."""
    monkeypatch.setattr(tracking, "_away", set())


@pytest.fixture
def begin(tmp_path: Path) -> Callable[..., Tracker]:
    """Begin or go on with a run, in a folder of its name."""
    return lambda name, group="garden", **more: Tracker(tmp_path / name, group, name, key=f"{tmp_path}/{name}", **more)


def point(step: int) -> dict[str, float]:
    return {"val_loss": 3 - step / 100, "parameter_seconds": 10.0 * step}


def runs_of(uri: str, experiment: str) -> list[Run]:
    client = MlflowClient(uri)
    return client.search_runs([client.get_experiment_by_name(experiment).experiment_id])


def steps_of(uri: str, run_id: str | None, key: str = "val_loss") -> list[int]:
    """Of all points that the store has, doubles too."""
    return sorted(metric.step for metric in MlflowClient(uri).get_metric_history(str(run_id), key))


def test_a_run_arrives_whole_and_goes_on_under_its_key_with_every_point_once(store, begin, tmp_path, capfd):
    out = tmp_path / "first"

    def trial(upto: int, text: str) -> Tracker:
        tracker = begin("first", tags={"arm": text, "seed": 0}, params=PARAMS)
        for step in range(upto):  # from the start: the trial does not know what was logged
            tracker.log(point(step), step)
        tracker.log({"annealed/val_loss": 1.0, "gap": math.nan}, 3)  # other keys at a step that there is already
        (out / "summary.json").write_text(text)
        tracker.artifact(out / "summary.json")
        tracker.log_input("stories", source="/data/stories", digest="d" * 64, profile={"tokens": {"train": 10}})
        return tracker

    first = trial(5, "first")
    assert first.close("FAILED") is True
    with trial(9, "second") as second:
        for step in reversed(range(9, 12)):
            second.log(point(step), step)
        second.tag("outcome", "done")
    assert synced(out, store)
    assert second.close() is True

    client, [run] = MlflowClient(store), runs_of(store, "garden")
    assert first.run_id == second.run_id == run.info.run_id
    assert (run.info.status, run.info.run_name) == ("FINISHED", "first")
    assert run.data.params == {"host.n_layer": "2", "betas": "[0.9, 0.95]"}
    assert {"arm": "second", "seed": "0", "outcome": "done"}.items() <= run.data.tags.items()
    assert steps_of(store, run.info.run_id) == list(range(12))
    assert steps_of(store, run.info.run_id, "annealed/val_loss") == [3]
    assert run.data.metrics["val_loss"] == point(11)["val_loss"]  # the last step's, in whichever order they came
    [data] = run.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == ("stories", "d" * 36)
    (tmp_path / "down").mkdir()
    down = client.download_artifacts(run.info.run_id, "summary.json", str(tmp_path / "down"))
    assert Path(down).read_text() == "second"
    start = f"start `mlflow ui --backend-store-uri {store} --host 127.0.0.1`, then open http://127.0.0.1:5000"
    assert second.where == f"{start}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"
    assert capfd.readouterr() == ("", "")
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("tracking ")]


LOGGING = """
import sys, time
from pathlib import Path
from esper.platform.tracking import Tracker
name, steps = sys.argv[1:]
with Tracker(Path(name), "garden", name, key=name) as tracker:
    for step in range(int(steps)):
        tracker.log({"val_loss": step}, step)
        time.sleep(0.002)
        if step == 150:
            print(tracker.run_id, flush=True)
"""


def logging(name: str, steps: int) -> subprocess.Popen[str]:
    command, environment = [sys.executable, "-c", LOGGING, name, str(steps)], os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_first_starts_on_one_file_both_arrive_without_a_word(store: str, tmp_path: Path):
    (tmp_path / "mlflow.db").unlink()
    racers = [logging(name, 1) for name in "ab"]
    assert [racer.communicate(timeout=120) for racer in racers] == [("", ""), ("", "")]
    assert [run.data.metrics for run in runs_of(store, "garden")] == [{"val_loss": 0.0}, {"val_loss": 0.0}]


def test_a_run_that_was_killed_is_made_whole_by_sync_in_any_store(store: str, tmp_path: Path, template: Path):
    out = tmp_path / "run"
    with logging("run", 10_000) as process:
        assert process.stdout
        run_id = process.stdout.readline().strip()
        process.kill()
    with (out / JOURNAL).open("ab") as file:
        file.write(b'{"kind": "point", "st')  # what a death may leave
    assert not synced(out, store)  # it has no end: there is something to go on with
    for sent in (None, "{nonsense"):  # sent again, there once
        if sent is not None:
            (out / "tracking.sent.json").write_text(sent)
        assert sync(out, store) is True
        steps = steps_of(store, run_id)
        assert steps == list(range(max(151, len(steps))))
    other = f"sqlite:///{shutil.copy(template, tmp_path / 'other.db')}"
    assert sync(out, other) is True
    assert steps_of(other, runs_of(other, "garden")[0].info.run_id) == steps


def test_a_store_that_is_made_anew_in_mid_run_gets_everything(store: str, begin, tmp_path, template, capfd):
    with begin("trial") as tracker:
        for step in range(6):
            tracker.log(point(step), step)
            if step == 2:
                before = tracker.run_id
                while not tracker._sender.complete:
                    time.sleep(0.02)
                shutil.copy(template, tmp_path / "new.db")
                (tmp_path / "new.db").replace(tmp_path / "mlflow.db")
    assert tracker.run_id != before
    assert steps_of(store, tracker.run_id) == list(range(6))
    assert capfd.readouterr() == ("", "")


def test_a_full_disk_is_told_once_and_what_is_logged_again_is_there(store, begin, tmp_path, files_of_at_most, capsys):
    with begin("trial") as tracker:
        assert tracker.run_id
        tracker.log(point(0), 0)
        with files_of_at_most((tmp_path / "trial" / JOURNAL).stat().st_size + 5):  # half a line has room
            for step in range(1, 4):
                tracker.log(point(step), step)
        tracker.log(point(4), 4)
    with begin("trial") as tracker:
        for step in range(6):
            tracker.log(point(step), step)
    assert steps_of(store, tracker.run_id) == list(range(6))
    [line] = [line for line in capsys.readouterr().err.splitlines() if JOURNAL in line]
    assert "cannot be written" in line


@contextlib.contextmanager
def server_that(answer: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[str]:
    """The host and port of a server that answers every request in one way."""
    does = {"do_GET": answer, "do_POST": answer, "log_message": lambda *_: None}
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (BaseHTTPRequestHandler,), does)) as server:
        server.handle_error = lambda *_: None
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def drip(request: BaseHTTPRequestHandler) -> None:
    """A byte now and then, for ever: no timeout between two bytes ends that."""
    request.send_response(200)
    request.send_header("Content-Length", "100000")
    request.end_headers()
    for _ in range(100):
        request.wfile.write(b"x")
        time.sleep(0.2)


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("http://me:secret@DRIPS", "no whole answer within 0.2 s"),
        ("http://me:secret@REFUSING", "401"),
        ("http://me:secret@127.0.0.1:1", "Connection refused|no whole answer"),
        ("sqlite:////proc/nowhere/mlflow.db", "No such file"),
    ],
)
def test_a_store_that_takes_nothing_holds_nobody_is_one_sentence_for_all_runs_and_the_journal_keeps_all(
    uri: str, says: str, begin, tmp_path: Path, monkeypatch, capsys
):
    for name in ("READY_SECONDS", "CONNECT_SECONDS", "CALL_SECONDS", "PAUSE_SECONDS"):
        monkeypatch.setattr(tracking, name, 0.2)
    answers = {"DRIPS": drip, "REFUSING": lambda request: request.send_error(401)}
    host = next((host for host in answers if host in uri), "REFUSING")
    with server_that(answers[host]) as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri.replace(host, address))
        began = time.monotonic()
        parent = begin("sweep")
        child = begin("trial", parent=parent, params=PARAMS)
        child.log(point(0), 0)
        assert child.run_id is None
        assert child.where == "not tracked"
        assert [child.close(seconds=0.5), parent.close(seconds=0.1)] == [False, False]
        assert sync(tmp_path / "trial", child.uri, seconds=0.5) is False
        assert time.monotonic() - began < 6
    [said] = capsys.readouterr().err.splitlines()
    assert re.search(f"takes nothing .*({says})", said)
    assert "secret" not in said
    assert [entry["kind"] for entry in read_entries(tmp_path / "trial" / JOURNAL)] == ["run", "point", "end"]


def test_a_server_that_dies_midway_or_comes_late_gets_every_point_once(begin, tmp_path, monkeypatch, capsys, template):
    shutil.copy(template, tmp_path / "server.db")
    with MlflowServer(tmp_path, f"sqlite:///{tmp_path}/server.db") as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
        server.start()
        trackers = [begin("early", "outage", params=PARAMS)]
        for step in range(60):
            for tracker in trackers:
                tracker.log(point(step), step)
            if step == 20:
                assert trackers[0].run_id
                server.kill()
                killed = time.monotonic()
                trackers.append(begin("late", "outage", params=PARAMS, parent=trackers[0]))
            if step == 40:
                time.sleep(max(0.0, killed + OUTAGE_SECONDS - time.monotonic()))
                server.start()
            time.sleep(0.02)
        assert [tracker.close(seconds=60) for tracker in reversed(trackers)] == [True] * 2
        runs = {str(run.info.run_name): run for run in runs_of(server.uri, "outage")}
        assert sorted(runs) == ["early", "late"]
        for name, run in runs.items():
            assert steps_of(server.uri, run.info.run_id) == list(range(21 if name == "late" else 0, 60)), name
            assert (run.info.status, len(run.data.params)) == ("FINISHED", 2)
        assert runs["late"].data.tags["mlflow.parentRunId"] == runs["early"].info.run_id
    told = ["takes nothing", "is back: what was kept is being sent."]
    printed = [line.split(" (")[0] for line in capsys.readouterr().err.splitlines()]
    assert printed == [f"MLflow at {server.uri} {each}" for each in told]


def test_the_machine_is_watched_without_a_word_and_no_longer_than_the_run(store: str, begin, monkeypatch, capfd):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    with begin("watched", system_metrics=True) as tracker:
        assert tracker.run_id
        wait_for(lambda: "system/cpu_utilization_percentage" in runs_of(store, "garden")[0].data.metrics)
    assert not [thread for thread in threading.enumerate() if thread.name == "SystemMetricsMonitor"]
    assert capfd.readouterr() == ("", "")


def test_odd_names_are_tracked_or_refused_and_a_lost_artifact_is_left_out(tmp_path, monkeypatch, template, capsys):
    odd, refused = tmp_path / "a #b ü+&", tmp_path / "a%41b?"
    for folder in (odd, refused):
        folder.mkdir()
    monkeypatch.chdir(refused)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UserError, match="work in a folder without them, or set MLFLOW_TRACKING_URI"):
        Tracker(odd / "run", "x", "y", key="z")
    uri = f"sqlite:///{shutil.copy(template, odd / 'mlflow.db')}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    (odd / "file").write_text("x")
    with Tracker(odd / "run", "gärden/?%#", "trial 100%", key="odd") as tracker:
        for name in ("nothing", "file"):
            tracker.artifact(odd / name)
        tracker.log(point(0), 0)
    assert steps_of(uri, tracker.run_id) == [0]
    assert [file.path for file in MlflowClient(uri).list_artifacts(str(tracker.run_id))] == ["file"]
    assert f"MLflow artifact {odd}/nothing was left out" in capsys.readouterr().err
