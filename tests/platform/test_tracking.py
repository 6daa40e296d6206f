"""What is logged arrives in MLflow, once and in order; a store that is not there costs one sentence and no time.

Real stores: SQLite files, and one `mlflow server` on 127.0.0.1. Alone: `pytest tests/platform/test_tracking.py`
(about 40 s).
"""

import contextlib
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from esper.platform import tracking
from esper.platform.storage import locked
from esper.platform.tracking import Tracker, flatten

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with MLflow's tables and nothing in them: making them takes seconds, a copy none."""
    file = tmp_path_factory.mktemp("tables") / "mlflow.db"
    MlflowClient(f"sqlite:///{file}")
    return file


@pytest.fixture
def store(tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A working directory with an empty store in it, and no server named."""
    shutil.copy(tables, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(tracking, "_already_said", set())
    return f"sqlite:///{tmp_path}/mlflow.db"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_run_arrives_with_params_tags_metrics_and_artifacts(
    store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "spec.json"
    file.write_text("{}")
    folder = tmp_path / "figures"
    folder.mkdir()
    (folder / "loss.svg").write_text("<svg/>")
    with Tracker.start(
        "garden", "first", tags={"arm": "wait", "seed": 0}, params={"host": {"n_layer": 2}, "betas": [0.9, 0.95]}
    ) as tracker:
        for step in range(3):
            tracker.log({"loss": 2.0 - step, "params": 10, "gap": math.nan}, step)
        tracker.artifact(file)
        tracker.artifact(folder, "figures")
        tracker.tag("outcome", "done")

    client, run_id = MlflowClient(store), tracker.run_id
    assert run_id
    run = client.get_run(run_id)
    assert run.info.run_name == "first"
    assert run.info.status == "FINISHED"
    assert run.data.params == {"host.n_layer": "2", "betas": "[0.9, 0.95]"}
    assert {key: run.data.tags[key] for key in ("arm", "seed", "outcome")} == {
        "arm": "wait",
        "seed": "0",
        "outcome": "done",
    }
    assert [(m.step, m.value) for m in client.get_metric_history(run_id, "loss")] == [(0, 2.0), (1, 1.0), (2, 0.0)]
    assert sorted(
        str(f.relative_to(tmp_path / "mlruns" / "garden" / run_id / "artifacts")) for f in files(tmp_path)
    ) == [
        "figures/loss.svg",
        "spec.json",
    ]
    assert tracker.where == f"mlflow ui --backend-store-uri {store} --host 127.0.0.1"
    assert capsys.readouterr() == ("", "")


def files(root: Path) -> list[Path]:
    """What was stored as artifacts."""
    return [path for path in (root / "mlruns").rglob("*") if path.is_file()]


def test_all_keys_of_one_call_share_step_and_time_stamp(store: str):
    with Tracker.start("garden", "points") as tracker:
        called = []
        for step in (5, 9):
            before = int(time.time() * 1000)
            tracker.log({"loss": 1.0, "tokens": 2.0, "seconds": 3.0}, step)
            called.append((before, int(time.time() * 1000)))
    client, run_id = MlflowClient(store), tracker.run_id
    assert run_id
    points = {key: client.get_metric_history(run_id, key) for key in ("loss", "tokens", "seconds")}
    stamps = [{(m.step, m.timestamp) for m in row} for row in zip(*points.values(), strict=True)]
    assert [len(row) for row in stamps] == [1, 1]
    for row, step, (first, last) in zip(stamps, (5, 9), called, strict=True):
        [(at, stamp)] = row
        assert at == step
        assert first <= stamp <= last  # the time of the call, although it was sent seconds later


def test_logging_does_not_wait_for_the_connection(store: str):
    with locked(Path(store.removeprefix("sqlite:///") + ".lock")):  # nobody can connect while this is held
        tracker = Tracker.start("garden", "quick")
        for step in range(100):
            tracker.log({"loss": 1.0}, step)
        assert not tracker._ready.is_set()
    tracker.close()
    assert tracker.run_id
    assert len(MlflowClient(store).get_metric_history(tracker.run_id, "loss")) == 100


def test_a_child_names_its_parent_and_the_status_tells_how_it_ended(store: str):
    with Tracker.start("garden", "sweep") as parent:
        with contextlib.suppress(ValueError), Tracker.start("garden", "trial", parent=parent.run_id) as failed:
            raise ValueError
        with contextlib.suppress(KeyboardInterrupt), Tracker.start("garden", "trial", parent=parent.run_id) as killed:
            raise KeyboardInterrupt
    client = MlflowClient(store)
    experiment = client.get_experiment_by_name("garden")
    assert experiment
    assert parent.run_id
    children = client.search_runs([experiment.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.run_id}'")
    assert {(run.info.run_id, run.info.status) for run in children} == {
        (failed.run_id, "FAILED"),
        (killed.run_id, "KILLED"),
    }
    assert client.get_run(parent.run_id).info.status == "FINISHED"


def test_two_first_starts_on_one_file_both_arrive_without_a_word(store: str, tmp_path: Path):
    (tmp_path / "mlflow.db").unlink()
    code = (
        "from esper.platform.tracking import Tracker\nwith Tracker.start('garden', 'racer') as t: t.log({'x': 1.0}, 0)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command, pipe = [sys.executable, "-c", code], subprocess.PIPE
    racers = [
        subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=pipe, stderr=pipe, text=True) for _ in range(2)
    ]
    assert [racer.communicate(timeout=120) for racer in racers] == [("", ""), ("", "")]
    assert [racer.returncode for racer in racers] == [0, 0]
    client = MlflowClient(store)
    experiment = client.get_experiment_by_name("garden")
    assert experiment
    assert [run.data.metrics for run in client.search_runs([experiment.experiment_id])] == [{"x": 1.0}, {"x": 1.0}]


@contextlib.contextmanager
def silent_server() -> Iterator[str]:
    """A server that accepts and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@contextlib.contextmanager
def text(uri: str) -> Iterator[str]:
    yield uri


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        (text(f"http://127.0.0.1:{free_port()}"), "Connection refused"),
        (text("http://user:secret@no-such-host.invalid:5000"), "not known|name resolution|No address"),
        (text("garden://nowhere"), "unsupported URI"),
        (text("sqlite:////proc/nowhere/mlflow.db"), "No such file"),
        (silent_server(), "timed out"),
    ],
    ids=["refused", "no such host", "wrong scheme", "no such folder", "silent"],
)
def test_a_store_that_is_not_there_is_one_sentence_and_nothing_more(
    where: contextlib.AbstractContextManager[str],
    reason: str,
    store: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    with where as uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        began = time.monotonic()
        for name in ("one", "two"):
            with Tracker.start("garden", name, params={"a": 1}) as tracker:
                tracker.log({"loss": 1.0}, 0)
                tracker.artifact(Path("nothing"))
            assert tracker.run_id is None
            assert tracker.where == "not tracked"
        assert time.monotonic() - began < 20
    said = capsys.readouterr().err
    assert re.fullmatch(
        rf"MLflow at \S+ cannot be used \(.*({reason}).*\): the run goes on without tracking; .*\n", said
    )
    assert "secret" not in said


def test_a_server_gets_it_all_and_may_go_away(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    uri = f"http://127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", uri.rsplit(":", 1)[1]]
    command += ["--workers", "1", "--backend-store-uri", store, "--artifacts-destination", str(tmp_path / "kept")]
    with (tmp_path / "server.log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for(f"{uri}/health")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        file = tmp_path / "spec.json"
        file.write_text("{}")
        tracker = Tracker.start("garden", "remote", params={"a": 1})
        tracker.log({"loss": 1.0, "tokens": 2.0}, 4)
        tracker.artifact(file)
        tracker.close()
        client, run_id = MlflowClient(uri), tracker.run_id
        assert run_id
        run = client.get_run(run_id)
        assert (run.info.status, run.data.metrics, run.data.params) == (
            "FINISHED",
            {"loss": 1.0, "tokens": 2.0},
            {"a": "1"},
        )
        assert [artifact.path for artifact in client.list_artifacts(run_id)] == ["spec.json"]
        assert tracker.where == f"{uri}/#/experiments/{run.info.experiment_id}/runs/{run_id}"
        orphan = Tracker.start("garden", "orphan")
        assert orphan.run_id
    finally:
        os.killpg(server.pid, 15)
        server.wait(30)
    assert capsys.readouterr() == ("", "")
    orphan.log({"loss": 1.0}, 0)
    began = time.monotonic()
    orphan.close(seconds=2)
    assert time.monotonic() - began < 10
    assert capsys.readouterr().err == f"MLflow at {uri} did not take the run's last records within 2 s: left out.\n"


def wait_for(page: str) -> None:
    """Until a page answers; MLflow's server takes its time."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(page, timeout=1).close()
            return
        time.sleep(0.2)
    raise TimeoutError(page)


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


def test_no_thread_is_left(store: str):
    with Tracker.start("garden", "tidy"):
        pass
    assert not [thread for thread in threading.enumerate() if thread.name == "tracking tidy"]
