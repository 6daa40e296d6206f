"""Real `mlflow server` processes, on 127.0.0.1, over SQLite or PostgreSQL, which tests may kill and start again."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

START_SECONDS = 120
POSTGRES_USER = "postgres"  # the account that Debian's package makes; initdb refuses root


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class MlflowServer:
    """One `mlflow server` in a process group of its own, at the same port each time it is started."""

    def __init__(self, folder: Path, backend: str, port: int | None = None) -> None:
        self.backend = backend
        self.port = free_port() if port is None else port
        self.uri = f"http://127.0.0.1:{self.port}"
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, wait: bool = True) -> None:
        """Start it, and wait for its health page."""
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", self.backend]
        command += ["--artifacts-destination", str(self._folder / "kept")]
        environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self._folder / "server.log").open("a") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        if wait:
            self.wait()

    def wait(self) -> None:
        """Until it answers."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{self.uri}/health", timeout=1).close()
                return
            time.sleep(0.1)
        raise TimeoutError((self._folder / "server.log").read_text()[-2000:])

    def kill(self) -> None:
        """End it and its workers at once, as a crash does."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(30)
            self._process = None


@contextlib.contextmanager
def mlflow_server(folder: Path, backend: str) -> Iterator[MlflowServer]:
    """A server that runs."""
    server = MlflowServer(folder, backend)
    try:
        server.start()
        yield server
    finally:
        server.kill()


def postgres_programs() -> Path | None:
    """The folder of PostgreSQL's `initdb` and `pg_ctl`; None where it is not installed."""
    found = [Path(path).resolve().parent for path in [shutil.which("initdb")] if path]
    found += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((folder for folder in found if (folder / "pg_ctl").exists() and (folder / "initdb").exists()), None)


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """A PostgreSQL of its own, as MLflow's backend address."""
    programs = postgres_programs()
    assert programs is not None
    # Not in pytest's folders, which are root's alone: initdb refuses to be root.
    port, place = free_port(), Path(tempfile.mkdtemp(prefix="esper-postgres-"))
    prefix: list[str] = []
    if os.geteuid() == 0:
        shutil.chown(place, POSTGRES_USER, POSTGRES_USER)
        prefix = ["setpriv", f"--reuid={POSTGRES_USER}", f"--regid={POSTGRES_USER}", "--clear-groups"]

    def run(program: str, *arguments: str) -> None:
        command = [*prefix, str(programs / program), "-D", str(place / "data"), *arguments]
        quiet = subprocess.DEVNULL
        subprocess.run(command, check=True, stdin=quiet, stdout=quiet, stderr=quiet, cwd=place)

    try:
        run("initdb", "-U", "esper", "-A", "trust", "-N", "--no-locale", "-E", "UTF8")
        run("pg_ctl", "-o", f"-p {port} -h 127.0.0.1 -k {place} -F", "-l", str(place / "log"), "-w", "start")
        try:
            yield f"postgresql+psycopg2://esper@127.0.0.1:{port}/postgres"
        finally:
            run("pg_ctl", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(place, ignore_errors=True)
