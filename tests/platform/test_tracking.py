"""What is logged arrives in MLflow, once and in order, whatever dies; a store that is not there costs no time.

Real stores: SQLite files, and servers on SQLite and PostgreSQL (skipped where that is not installed).
"""

import contextlib
import http.server
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow import MlflowClient
from mlflow.entities import Run

from esper.platform import tracking_sync
from esper.platform.errors import UserError
from esper.platform.journal import read_entries
from esper.platform.storage import locked
from esper.platform.tracking import JOURNAL, Tracker, flatten, new_key, sync, synced
from tests.mlflow_servers import MlflowServer, mlflow_server, postgres, postgres_programs

ROOT = Path(__file__).parents[2]
OUTAGE_SECONDS = 3
PARAMS = {"host": {"n_layer": 2}, "betas": [0.9, 0.95]}


@pytest.fixture(autouse=True)
def said_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was said of stores in other tests is said again."""
    monkeypatch.setattr(tracking_sync, "_said", set())
    monkeypatch.setattr(tracking_sync, "_outages", {})


@pytest.fixture(scope="module")
def postgres_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    if postgres_programs() is None:
        pytest.skip("PostgreSQL is not installed (apt-get install postgresql)")
    folder = tmp_path_factory.mktemp("postgres-server")
    with postgres() as backend, mlflow_server(folder, backend) as server:
        yield server


@pytest.fixture(params=["file", "server", pytest.param("postgres", marks=pytest.mark.slow)])
def any_store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where runs go: a file, and servers on SQLite and PostgreSQL."""
    if request.param == "file":
        return request.getfixturevalue("store")
    server = request.getfixturevalue("server" if request.param == "server" else "postgres_server")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    return server.uri


def point(step: int) -> dict[str, float]:
    return {"val_loss": 3 - step / 100, "parameter_seconds": 10.0 * step}


def runs_of(uri: str, experiment: str) -> list[Run]:
    client = MlflowClient(uri)
    group = client.get_experiment_by_name(experiment)
    assert group
    return client.search_runs([group.experiment_id])


def steps_of(uri: str, run_id: str | None, key: str = "val_loss") -> list[int]:
    """Of all points that the store has, doubles too."""
    assert run_id
    return sorted(metric.step for metric in MlflowClient(uri).get_metric_history(run_id, key))


def test_a_run_arrives_whole_and_goes_on_under_its_key_with_every_point_once(any_store: str, tmp_path: Path, capfd):
    out, key = tmp_path / "run", new_key()
    (out / "figures").mkdir(parents=True)
    (out / "figures" / "loss.svg").write_text("<svg/>")

    def trial(upto: int, text: str) -> Tracker:
        tracker = Tracker(out, "garden", "first", tags={"arm": text, "seed": 0}, params=PARAMS, key=key)
        for step in range(upto):  # from the start: the trial does not know what was logged
            tracker.log(point(step), step)
        tracker.log({"annealed/val_loss": 1.0, "gap": math.nan}, 3)  # other keys at a step that there is already
        (out / "summary.json").write_text(text)
        tracker.artifact(out / "summary.json")
        tracker.artifact(out / "figures", "figures")
        tracker.log_input("stories", source="/data/stories", digest="d" * 64, profile={"tokens": {"train": 10}})
        return tracker

    first = trial(5, "first")
    assert first.close("FAILED") is True
    with trial(9, "second") as second:
        for step in reversed(range(9, 12)):
            second.log(point(step), step)
        second.tag("outcome", "done")
    assert synced(out, any_store)
    assert second.close() is True

    client, [run] = MlflowClient(any_store), runs_of(any_store, "garden")
    assert first.run_id == second.run_id == run.info.run_id
    assert (run.info.status, run.info.run_name) == ("FINISHED", "first")
    assert run.data.params == {"host.n_layer": "2", "betas": "[0.9, 0.95]"}
    assert {"arm": "second", "seed": "0", "outcome": "done"}.items() <= run.data.tags.items()
    assert steps_of(any_store, run.info.run_id) == list(range(12))
    assert steps_of(any_store, run.info.run_id, "annealed/val_loss") == [3]
    assert run.data.metrics["val_loss"] == point(11)["val_loss"]  # the last step's, in whichever order they came
    [data] = run.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == ("stories", "d" * 36)
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {"figures", "summary.json"}
    (tmp_path / "down").mkdir()
    down = client.download_artifacts(run.info.run_id, "summary.json", str(tmp_path / "down"))
    assert Path(down).read_text() == "second"
    if any_store.startswith("http"):
        assert second.where == f"{any_store}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"
    else:
        assert second.where == f"mlflow ui --backend-store-uri {any_store} --host 127.0.0.1"
    assert capfd.readouterr() == ("", "")
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("tracking ")]


def test_a_call_does_not_wait_and_its_keys_share_its_time(store: str, tmp_path: Path):
    with locked(Path(store.removeprefix("sqlite:///") + ".lock")):  # nobody can connect while this is held
        tracker = Tracker(tmp_path / "run", "garden", "quick", key=new_key())
        before = int(time.time() * 1000)
        for step in range(1200):
            tracker.log(point(step), step)
        after = int(time.time() * 1000)
        assert not tracker._delivery.tried.is_set()
    assert tracker.close() is True
    assert tracker.run_id
    stamps = [
        [(m.step, m.timestamp) for m in MlflowClient(store).get_metric_history(tracker.run_id, k)] for k in point(0)
    ]
    assert stamps[0] == stamps[1]
    assert len(stamps[0]) == 1200
    assert all(before <= at <= after for _, at in stamps[0])  # of the call, although it was sent later


def test_a_child_names_its_parent_and_the_status_tells_how_it_ended(store: str, tmp_path: Path):
    with Tracker(tmp_path / "0", "garden", "sweep", key=new_key()) as parent:
        for number, error in enumerate((ValueError, KeyboardInterrupt), 1):
            child = Tracker(tmp_path / str(number), "kids", "trial", key=new_key(), parent=parent)
            with contextlib.suppress(error), child:
                raise error
    children = runs_of(store, "kids")
    assert {run.info.status for run in children} == {"FAILED", "KILLED"}
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.run_id}


RACER = """
from pathlib import Path
from esper.platform.tracking import Tracker, new_key
with Tracker(Path(new_key()), 'garden', 'racer', key=new_key()) as tracker:
    tracker.log({'x': 1.0}, 0)
"""


def test_two_first_starts_on_one_file_both_arrive_without_a_word(store: str, tmp_path: Path):
    (tmp_path / "mlflow.db").unlink()
    command, pipe = [sys.executable, "-c", RACER], subprocess.PIPE
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    racers = [
        subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=pipe, stderr=pipe, text=True) for _ in "ab"
    ]
    assert [racer.communicate(timeout=120) for racer in racers] == [("", ""), ("", "")]
    assert [run.data.metrics for run in runs_of(store, "garden")] == [{"x": 1.0}, {"x": 1.0}]


DYING = """
import sys, time
from pathlib import Path
from esper.platform.tracking import Tracker
tracker = Tracker(Path("run"), "garden", "dying", key="dying")
print(tracker.run_id, flush=True)
for step in range(10_000):
    tracker.log({"val_loss": step}, step)
    print(step, flush=True)
    time.sleep(0.002)
"""


def test_a_run_that_was_killed_is_made_whole_by_sync_in_any_store(store: str, tmp_path: Path, template: Path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", DYING]
    with subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        run_id = process.stdout.readline().strip()
        for _ in range(150):
            last = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        last = max([last, *map(int, process.stdout)])
    journal = tmp_path / "run" / JOURNAL
    with journal.open("ab") as file:
        file.write(b'{"kind": "point", "st')  # what a death may leave
    assert not synced(tmp_path / "run", store)
    began = journal.stat()
    for _ in range(2):
        assert sync(tmp_path / "run") is True
    assert not synced(tmp_path / "run", store)  # it has no end: there is something to go on with
    assert journal.stat() == began
    assert len(steps_of(store, run_id)) >= last
    assert steps_of(store, run_id) == list(range(len(steps_of(store, run_id))))
    (tmp_path / "run" / "tracking.sent.json").write_text("{nonsense")  # sent again, there once
    assert sync(tmp_path / "run") is True
    assert steps_of(store, run_id) == list(range(len(steps_of(store, run_id))))

    other = f"sqlite:///{shutil.copy(template, tmp_path / 'other.db')}"
    assert not synced(tmp_path / "run", other)
    assert sync(tmp_path / "run", other) is True
    [run] = runs_of(other, "garden")
    assert steps_of(other, run.info.run_id) == steps_of(store, run_id)


def test_a_store_that_is_deleted_in_mid_run_is_made_anew_with_everything(store: str, tmp_path: Path, capfd):
    with Tracker(tmp_path / "run", "garden", "trial", key=new_key()) as tracker:
        for step in range(6):
            tracker.log(point(step), step)
            if step == 2:
                before = tracker.run_id
                while not tracker._delivery.complete:
                    time.sleep(0.02)
                (tmp_path / "mlflow.db").unlink()
    assert tracker.run_id != before
    assert steps_of(store, tracker.run_id) == list(range(6))
    assert "Traceback" not in capfd.readouterr().err


def test_a_full_disk_is_told_once_and_its_points_are_there_once_when_there_is_room(
    store: str, tmp_path: Path, files_of_at_most, capsys
):
    out, key = tmp_path / "run", new_key()
    with Tracker(out, "garden", "trial", key=key) as tracker:
        assert tracker.run_id
        tracker.log(point(0), 0)
        with files_of_at_most((out / JOURNAL).stat().st_size):
            for step in range(1, 4):
                tracker.log(point(step), step)
        tracker.log(point(4), 4)
    with Tracker(out, "garden", "trial", key=key) as tracker:  # it trains the last again
        for step in range(2, 6):
            tracker.log(point(step), step)
    assert steps_of(store, tracker.run_id) == list(range(6))
    [line] = [line for line in capsys.readouterr().err.splitlines() if JOURNAL in line]
    assert "cannot be written" in line


@contextlib.contextmanager
def slow_server(drips: bool) -> Iterator[str]:
    """A server that says nothing, or sends a byte now and then for ever: no timeout between two bytes ends that."""
    over = threading.Event()

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=answer, args=[server.accept()[0]], daemon=True).start()

    def answer(accepted: socket.socket) -> None:
        with contextlib.suppress(OSError), accepted:
            if drips:
                accepted.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
            while not over.wait(0.2):
                accepted.sendall(b"x" if drips else b"")

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        over.set()
        server.shutdown(socket.SHUT_RDWR)
        time.sleep(0.5)


@pytest.mark.parametrize("drips", [True, False])
def test_a_server_that_drips_or_is_silent_holds_nobody(drips, tmp_path: Path, monkeypatch, capsys):
    for name in ("READY_SECONDS", "CONNECT_SECONDS", "CALL_SECONDS"):
        module = "tracking" if name == "READY_SECONDS" else "tracking_sync"
        monkeypatch.setattr(f"esper.platform.{module}.{name}", 0.8)
    with slow_server(drips) as uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        began = time.monotonic()
        tracker = Tracker(tmp_path / "run", "garden", "slow", key=new_key())
        tracker.log(point(0), 0)
        assert tracker.run_id is None
        assert tracker.close(seconds=2) is False
        assert sync(tmp_path / "run", seconds=2) is False
        assert time.monotonic() - began < 6.5
    assert [line.split(" (")[0] for line in capsys.readouterr().err.splitlines()] == [
        f"MLflow at {uri} takes nothing at the moment"
    ]
    assert [entry["kind"] for entry in read_entries(tmp_path / "run" / JOURNAL)] == ["run", "point", "end"]


class Refusing(http.server.BaseHTTPRequestHandler):
    """Wants other credentials."""

    def do_GET(self) -> None:
        self.send_response(401)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_POST = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("http://me:secret@127.0.0.1:PORT", "cannot be used .*401"),
        ("http://me:secret@127.0.0.1:1", "takes nothing at the moment .Connection refused"),
        ("http://me:secret@no-such-host.invalid:5000", "takes nothing at the moment .*(not known|name resolution)"),
        ("garden://nowhere", "cannot be used .*unsupported URI"),
        ("sqlite:////proc/nowhere/mlflow.db", "cannot be used .*No such file"),
    ],
)
def test_a_store_that_is_not_there_is_one_sentence_for_all_runs_and_the_journal_keeps_all(
    uri: str, says: str, tmp_path: Path, monkeypatch, capsys
):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri.replace("PORT", str(server.server_address[1])))
        parent = Tracker(tmp_path / "0", "garden", "sweep", key=new_key())
        child = Tracker(tmp_path / "1", "garden", "trial", key=new_key(), parent=parent, params=PARAMS)
        child.log(point(0), 0)
        assert child.run_id is None
        assert child.where == "not tracked"
        assert [tracker.close(seconds=1.5) for tracker in (child, parent)] == [False, False]
        server.shutdown()
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert re.search(says, said)
    assert "secret" not in said
    assert len(read_entries(tmp_path / "1" / JOURNAL)) == 3


def test_a_deleted_experiment_is_named_with_what_restores_it_and_then_gets_everything(
    store: str, tmp_path: Path, capsys
):
    client, key = MlflowClient(store), new_key()
    tracker = Tracker(tmp_path / "run", "doomed", "trial", key=key)
    tracker.log(point(0), 0)
    run_id, group = tracker.run_id, tracker.experiment_id
    assert group
    client.delete_experiment(group)
    tracker.log(point(1), 1)
    assert tracker.close() is False
    at_start = Tracker(tmp_path / "run", "doomed", "trial", key=key)
    assert at_start.run_id is None
    assert at_start.close() is False
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"experiment doomed at {store} has been deleted" in said
    assert f"mlflow experiments restore -x {group}`" in said
    client.restore_experiment(group)
    assert sync(tmp_path / "run") is True
    assert steps_of(store, run_id) == [0, 1]


def test_a_server_that_dies_in_mid_run_or_comes_late_gets_every_point_once(
    tmp_path: Path, monkeypatch, capsys, template
):
    shutil.copy(template, tmp_path / "server.db")
    server = MlflowServer(tmp_path, f"sqlite:///{tmp_path}/server.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    monkeypatch.setattr(tracking_sync, "LONGEST_PAUSE_SECONDS", 1)

    def begin(name: str, parent: Tracker | None) -> Tracker:
        return Tracker(tmp_path / name, "outage", name, params=PARAMS, parent=parent, key=new_key())

    try:
        server.start()
        parent = begin("sweep", None)
        trackers = [parent, begin("early", parent)]
        for step in range(60):
            for tracker in trackers:
                tracker.log(point(step), step)
            if step == 20:
                assert all(tracker.run_id for tracker in trackers)
                server.kill()
                killed = time.monotonic()
                trackers.append(begin("late", parent))
            if step == 40:
                time.sleep(max(0.0, killed + OUTAGE_SECONDS - time.monotonic()))
                server.start()
            time.sleep(0.02)
        assert [tracker.close(seconds=60) for tracker in reversed(trackers)] == [True] * 3
        runs = {run.info.run_name: run for run in runs_of(server.uri, "outage")}
        assert sorted(runs) == ["early", "late", "sweep"]
        for name, run in runs.items():
            begun = 21 if name == "late" else 0
            for key in point(0):
                assert steps_of(server.uri, run.info.run_id, key) == list(range(begun, 60)), name
            assert (run.info.status, len(run.data.params)) == ("FINISHED", 2)
        assert runs["late"].data.tags["mlflow.parentRunId"] == runs["sweep"].info.run_id
    finally:
        server.kill()
    assert [line.split(" (")[0] for line in capsys.readouterr().err.splitlines()] == [
        f"MLflow at {server.uri} takes nothing at the moment",
        f"MLflow at {server.uri} is back: what was kept is being sent.",
    ]


def test_the_machine_is_watched_without_a_word_and_no_longer_than_the_run(
    server: MlflowServer, monkeypatch, capfd, tmp_path: Path
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    tracker = Tracker(tmp_path / "run", "watched", "sweep", key=new_key(), system_metrics=True)
    run_id = tracker.run_id
    assert run_id
    client, deadline = MlflowClient(server.uri), time.monotonic() + 30
    while "system/cpu_utilization_percentage" not in client.get_run(run_id).data.metrics:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert tracker.close() is True
    assert not [thread for thread in threading.enumerate() if thread.name == tracking_sync.MONITOR]
    assert capfd.readouterr() == ("", "")


def test_an_artifact_that_is_gone_is_told_of_and_the_rest_arrives(store: str, tmp_path: Path, capsys):
    with Tracker(tmp_path / "run", "garden", "trial", key=new_key()) as tracker:
        tracker.artifact(tmp_path / "nothing.json")
        tracker.log(point(0), 0)
    assert (
        capsys.readouterr().err == f"MLflow artifact {tmp_path}/nothing.json is not there any more and was left out.\n"
    )
    assert steps_of(store, tracker.run_id) == [0]


@pytest.mark.parametrize("name", ["a%41b", "what?", "100%"])
def test_a_folder_that_mlflow_cannot_name_is_refused(name: str, tmp_path: Path, monkeypatch):
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UserError, match="work in a folder without them, or set MLFLOW_TRACKING_URI"):
        Tracker(tmp_path / "run", "garden", "trial", key=new_key())


def test_odd_folders_and_a_name_with_signs_are_tracked(store: str, tmp_path: Path, monkeypatch, template: Path):
    odd = tmp_path / "a #b ü+&"
    odd.mkdir()
    uri = f"sqlite:///{shutil.copy(template, odd / 'mlflow.db')}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    (odd / "file").write_text("x")
    with Tracker(odd / "run", "gärden/?%#", "trial 100%", key=new_key()) as tracker:
        tracker.log(point(0), 0)
        tracker.artifact(odd / "file")
    assert steps_of(uri, tracker.run_id) == [0]
    assert [file.path for file in MlflowClient(uri).list_artifacts(str(tracker.run_id))] == ["file"]


WHOLE = b"".join(
    json.dumps(entry).encode() + b"\n"
    for entry in (
        {"kind": "run", "experiment": "x", "name": "n", "key": "k", "tags": {}, "params": {}, "parent": None, "at": 1},
        {"kind": "point", "step": 1, "at": 1, "metrics": {"a": 1.0}},
        {"kind": "end", "status": "FINISHED", "at": 2},
    )
)


@given(data=st.data())
def test_a_mutated_journal_is_a_sentence(data: st.DataObject, tmp_path_factory, template: Path):
    folder = tmp_path_factory.mktemp("run")
    begin = data.draw(st.integers(0, len(WHOLE)))
    mutant = WHOLE[:begin] + data.draw(st.binary(max_size=6)) + WHOLE[begin + data.draw(st.integers(0, 6)) :]
    (folder / JOURNAL).write_bytes(mutant)
    with contextlib.suppress(UserError):
        sync(folder, f"sqlite:///{shutil.copy(template, folder)}", seconds=20)
        Tracker(folder, "x", "n", key="k").close(seconds=0.01)


def test_nested_params_become_dotted_texts_within_mlflows_limits():
    assert flatten({"a": {"b": {"c": 1}}, "d": None, "e": "x" * 7000, "f": True, "g?": Path("p")}) == {
        "a.b.c": "1",
        "d": "null",
        "e": "x" * 6000,
        "f": "true",
        "g_": '"p"',
    }


def test_importing_the_module_does_not_import_mlflow():
    code = "import sys, esper.platform.tracking; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
