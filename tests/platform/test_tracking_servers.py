"""Nothing is lost and nothing doubled: journaled runs over an SQLite file, and over servers on SQLite and PostgreSQL.

Real stores and servers; PostgreSQL's tests are skipped where it is not installed. Alone:
`pytest tests/platform/test_tracking_servers.py` (about a minute, half of it one server's outage).
"""

import http.server
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from esper.platform import tracking
from esper.platform.tracking import Tracker, new_key
from esper.platform.tracking_journal import read_points
from tests.mlflow_servers import MlflowServer, free_port, mlflow_server, postgres, postgres_programs

OUTAGE_SECONDS = 20
PARAMS = {"host": {"n_layer": 2}}


@pytest.fixture(scope="module")
def sqlite_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    folder = tmp_path_factory.mktemp("server")
    with mlflow_server(folder, f"sqlite:///{folder}/server.db") as server:
        yield server


@pytest.fixture(scope="module")
def postgres_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    if postgres_programs() is None:
        pytest.skip("PostgreSQL is not installed (apt-get install postgresql)")
    folder = tmp_path_factory.mktemp("postgres-server")
    with postgres() as backend, mlflow_server(folder, backend) as server:
        yield server


@pytest.fixture(params=["sqlite file", "server on sqlite", "server on postgresql"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where runs go."""
    monkeypatch.setattr(tracking, "_already_said", set())
    if request.param == "sqlite file":
        uri = f"sqlite:///{tmp_path}/mlflow.db"
        MlflowClient(uri)  # makes its tables, and says so where MLflow was imported before its settings
    else:
        uri = request.getfixturevalue("postgres_server" if "postgresql" in request.param else "sqlite_server").uri
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return uri


def point(step: int) -> dict[str, float]:
    return {"val_loss": 3 - step / 100, "parameter_seconds": 10.0 * step}


def runs_of(uri: str, experiment: str) -> list[Run]:
    client = MlflowClient(uri)
    group = client.get_experiment_by_name(experiment)
    assert group
    return client.search_runs([group.experiment_id])


def steps_of(uri: str, run_id: str, key: str = "val_loss") -> list[int]:
    """Of all points that the store has, doubles too."""
    return sorted(metric.step for metric in MlflowClient(uri).get_metric_history(run_id, key))


def test_a_run_goes_on_under_its_key_and_has_every_point_once(store: str, tmp_path: Path):
    key, journal = new_key(), tmp_path / "points.jsonl"
    file = tmp_path / "summary.json"

    def trial(upto: int, text: str) -> Tracker:
        tracker = Tracker.start("again", "trial", tags={"arm": text}, params=PARAMS, key=key, journal=journal)
        for step in range(upto):  # from the start: the trial does not know what was logged
            tracker.log(point(step), step)
        tracker.log({"annealed/val_loss": 1.0}, 3)  # other keys at a step that there is already
        file.write_text(text)
        tracker.artifact(file)
        return tracker

    first = trial(5, "first")
    assert first.close("FAILED") is True
    second = trial(9, "second")
    for step in reversed(range(9, 12)):
        second.log(point(step), step)
    assert second.close("FINISHED") is True

    [run] = runs_of(store, "again")
    assert first.run_id == second.run_id == run.info.run_id
    assert (run.info.status, run.data.tags["arm"], run.data.params) == ("FINISHED", "second", {"host.n_layer": "2"})
    assert steps_of(store, run.info.run_id) == list(range(12))
    assert steps_of(store, run.info.run_id, "annealed/val_loss") == [3]
    assert run.data.metrics["val_loss"] == point(11)["val_loss"]  # the last step's, in whichever order they came
    down = tmp_path / "down"
    down.mkdir()
    assert (
        Path(MlflowClient(store).download_artifacts(run.info.run_id, "summary.json", str(down))).read_text() == "second"
    )
    assert not [thread for thread in threading.enumerate() if thread.name == "tracking trial"]


def test_inputs_and_models_are_there_once_however_often_they_are_sent(
    store: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    folder = tmp_path / "policy"
    folder.mkdir()
    (folder / "weights.bin").write_text("w")
    key = new_key()
    for seed in ("0", "1"):
        tracker = Tracker.start("inputs", "ppo", key=key, journal=tmp_path / "points.jsonl")
        tracker.log_input("stories", source="/data/stories", digest="d" * 64, profile={"tokens": {"train": 10}})
        tracker.register("esper-tamiyo", folder, tags={"seed": seed})
        assert tracker.close() is True
    client = MlflowClient(store)
    [run] = runs_of(store, "inputs")
    [dataset] = run.inputs.dataset_inputs
    assert (dataset.dataset.name, dataset.dataset.digest) == ("stories", "d" * 36)
    [version] = client.search_model_versions(f"run_id = '{run.info.run_id}'")
    assert (version.name, version.tags) == ("esper-tamiyo", {"seed": "1"})
    assert [entry.path for entry in client.list_artifacts(run.info.run_id, "model")] == ["model/weights.bin"]
    assert capfd.readouterr() == ("", "")


def test_the_machine_is_watched_without_a_word_and_no_longer_than_the_run(
    sqlite_server: MlflowServer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
):
    import ray  # noqa: F401  brings psutil

    monkeypatch.setenv("MLFLOW_TRACKING_URI", sqlite_server.uri)
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    tracker = Tracker.start("watched", "sweep", key=new_key(), journal=tmp_path / "points.jsonl", system_metrics=True)
    run_id = tracker.run_id
    assert run_id
    client = MlflowClient(sqlite_server.uri)
    deadline = time.monotonic() + 30
    while "system/cpu_utilization_percentage" not in client.get_run(run_id).data.metrics:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert tracker.close() is True
    assert not [thread for thread in threading.enumerate() if thread.name == "SystemMetricsMonitor"]
    assert capfd.readouterr() == ("", "")


def test_a_deleted_experiment_is_named_with_what_restores_it_and_then_gets_everything(
    sqlite_server: MlflowServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
):
    monkeypatch.setattr(tracking, "_already_said", set())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", sqlite_server.uri)
    client, key, journal = MlflowClient(sqlite_server.uri), new_key(), tmp_path / "points.jsonl"
    tracker = Tracker.start("doomed", "trial", key=key, journal=journal)
    tracker.log(point(0), 0)
    run_id = tracker.run_id
    group = client.get_experiment_by_name("doomed")
    assert group
    assert run_id
    client.delete_experiment(group.experiment_id)
    tracker.log(point(1), 1)
    assert tracker.close() is False
    at_start = Tracker.start("doomed", "trial", key=key, journal=journal)
    assert at_start.run_id is None
    assert at_start.close() is False
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"experiment doomed at {sqlite_server.uri} has been deleted" in said
    assert f"mlflow experiments restore -x {group.experiment_id}`" in said
    client.restore_experiment(group.experiment_id)
    last = Tracker.start("doomed", "trial", key=key, journal=journal)
    assert last.close() is True
    assert last.run_id == run_id
    assert steps_of(sqlite_server.uri, run_id) == [0, 1]


def test_refused_credentials_are_final(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    class Refusing(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(401)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_POST = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@127.0.0.1:{server.server_address[1]}")
        tracker = Tracker.start("refused", "trial", key=new_key(), journal=tmp_path / "points.jsonl")
        tracker.log(point(0), 0)
        began = time.monotonic()
        assert tracker.close(seconds=30) is False
        assert time.monotonic() - began < 20
        server.shutdown()
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "401" in said
    assert "secret" not in said
    assert [point.step for point in read_points(tmp_path / "points.jsonl")] == [0]


def test_without_a_server_the_journal_has_all_and_the_next_start_delivers_it(
    sqlite_server: MlflowServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
):
    nobody = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", nobody)
    keys = [new_key() for _ in range(4)]
    parent = Tracker.start("later", "sweep", key=keys[0], journal=tmp_path / "0.jsonl")
    children = [
        Tracker.start("later", f"trial{i}", parent=parent, key=keys[i], journal=tmp_path / f"{i}.jsonl")
        for i in range(1, 4)
    ]
    for step in range(3):
        for child in children:
            child.log(point(step), step)
    assert parent.run_id is None
    time.sleep(1.5)
    began = time.monotonic()
    assert [tracker.close(seconds=0.5) for tracker in (*children, parent)] == [False] * 4
    assert time.monotonic() - began < 10
    said = capsys.readouterr().err
    assert said == (
        f"MLflow at {nobody} takes nothing at the moment (Connection refused): the run goes on, and what is kept in "
        "its journal is sent later.\n"
    )
    deadline = time.monotonic() + 30
    while [thread for thread in threading.enumerate() if thread.name.startswith("tracking ")]:
        assert time.monotonic() < deadline
        time.sleep(0.1)

    monkeypatch.setenv("MLFLOW_TRACKING_URI", sqlite_server.uri)
    with Tracker.start("later", "sweep", key=keys[0], journal=tmp_path / "0.jsonl") as parent:
        for i in range(1, 4):
            child = Tracker.start("later", f"trial{i}", parent=parent, key=keys[i], journal=tmp_path / f"{i}.jsonl")
            assert child.close(seconds=30) is True
    runs = {run.info.run_name: run for run in runs_of(sqlite_server.uri, "later")}
    assert sorted(runs) == ["sweep", "trial1", "trial2", "trial3"]
    for i in range(1, 4):
        run = runs[f"trial{i}"]
        assert run.data.tags["mlflow.parentRunId"] == runs["sweep"].info.run_id
        assert steps_of(sqlite_server.uri, run.info.run_id) == [0, 1, 2]
    stamps = [at for _, at, _ in read_points(tmp_path / "1.jsonl")]
    history = MlflowClient(sqlite_server.uri).get_metric_history(runs["trial1"].info.run_id, "val_loss")
    assert [metric.timestamp for metric in history] == stamps


def test_servers_that_die_in_mid_run_or_come_late_get_every_point_once(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
):
    """Both servers are killed in mid-run, away for a time, and started again; in it, runs begin at each."""
    servers = [request.getfixturevalue("sqlite_server")]
    if postgres_programs() is not None:
        servers.append(request.getfixturevalue("postgres_server"))
    early: dict[str, list[Tracker]] = {}
    late: dict[str, list[Tracker]] = {}

    def begin(server: MlflowServer, name: str, parent: Tracker | None) -> Tracker:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
        journal = tmp_path / str(server.port) / f"{name}.jsonl"
        return Tracker.start("outage", name, params=PARAMS, parent=parent, key=new_key(), journal=journal)

    def log(step: int) -> None:
        for tracker in (tracker for trackers in (*early.values(), *late.values()) for tracker in trackers):
            tracker.log(point(step), step)

    for server in servers:
        parent = begin(server, "sweep", None)
        early[server.uri] = [parent, *(begin(server, f"early{i}", parent) for i in range(2))]
    for step in range(20):
        log(step)
        time.sleep(0.05)
    assert all(tracker.run_id for trackers in early.values() for tracker in trackers)
    for server in servers:
        server.kill()
    killed = time.monotonic()
    for server in servers:
        late[server.uri] = [begin(server, "late", early[server.uri][0])]
    for step in range(20, 60):
        log(step)
        time.sleep(0.1)
    time.sleep(max(0.0, killed + OUTAGE_SECONDS - time.monotonic()))
    for server in servers:
        server.start(wait=False)
    for server in servers:
        server.wait()
    for step in range(60, 80):
        log(step)
        time.sleep(0.05)
    for server in servers:
        trackers = [*early[server.uri][1:], *late[server.uri], early[server.uri][0]]
        assert [tracker.close(seconds=60) for tracker in trackers] == [True] * 4
        runs = {run.info.run_name: run for run in runs_of(server.uri, "outage")}
        assert sorted(runs) == ["early0", "early1", "late", "sweep"]
        for name, run in runs.items():
            begun = 20 if name == "late" else 0
            for key in point(0):
                assert steps_of(server.uri, run.info.run_id, key) == list(range(begun, 80)), name
            assert (run.info.status, run.data.params) == ("FINISHED", {"host.n_layer": "2"})
        assert runs["late"].data.tags["mlflow.parentRunId"] == runs["sweep"].info.run_id
    said = capsys.readouterr().err.splitlines()
    for server in servers:
        told = [line.split(" (")[0] for line in said if server.uri in line]
        assert told == [
            f"MLflow at {server.uri} takes nothing at the moment",
            f"MLflow at {server.uri} is back: what was kept is being sent.",
        ]
