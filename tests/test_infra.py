"""The files of `infra/` say what the repository and the pinned Ray can do: nothing they name is missing or misspelt.

No docker, Kubernetes or cloud is needed, and none is tried; each file's head says what was tried by hand. The slow test
is a real cluster of two `ray start` nodes.
"""

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

from esper.pipelines.common.arguments import parse
from esper.pipelines.ppo import PPOArguments
from esper.platform.cluster import LOCAL
from esper.platform.spec import load_spec
from tests.mlflow_servers import free_port
from tests.pipelines.helpers import sets, wait_for

ROOT = Path(__file__).parents[1]
CLUSTERS = ["cluster.yaml", "cluster-aws.yaml"]
BIN = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
TEXTS = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "infra").iterdir()}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PYTHON = PROJECT["requires-python"].removeprefix(">=")
CLAIM, JOB = yaml.safe_load_all(TEXTS["rayjob.yaml"])
GROUPS = [JOB["spec"]["rayClusterSpec"]["headGroupSpec"], *JOB["spec"]["rayClusterSpec"]["workerGroupSpecs"]]
DOCKERFILE = re.sub(r"^(#.*)?\n", "", TEXTS["Dockerfile"], flags=re.MULTILINE).replace("\\\n", " ")
INSTRUCTIONS = [
    (word, re.sub(r"\s+", " ", rest)) for word, rest in (s.split(maxsplit=1) for s in DOCKERFILE.splitlines())
]
IMAGE = dict(INSTRUCTIONS)  # of several the last
COPIED = [source for word, rest in INSTRUCTIONS if word == "COPY" for source in rest.split()[:-1]]


def assert_ray_start_knows(command: list[str]):
    from ray.scripts.scripts import start

    options = {word.split("=")[0] for word in command if word.startswith("--")}
    assert options
    assert options <= {name for parameter in start.params for name in parameter.opts}


@pytest.mark.parametrize("name", CLUSTERS)
def test_ray_accepts_the_cluster_whose_nodes_have_what_exists_and_the_same_token_and_environment(name: str):
    from ray._private.authentication.authentication_token_setup import _get_default_token_path
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared, cluster = prepare_config(yaml.safe_load(TEXTS[name])), yaml.safe_load(TEXTS[name])
    validate_config(prepared)  # what `ray up` does before it reaches for a machine
    workers = [kind for kind in prepared["available_node_types"].values() if kind["max_workers"]]
    assert all(kind["min_workers"] >= 1 for kind in workers)  # PPO needs room for one worker when it starts
    mounts = cluster["file_mounts"]
    assert Path(mounts.pop("~/.ray/auth_token")).expanduser() == _get_default_token_path()
    assert all((ROOT / local).is_file() for local in mounts.values())
    assert any(PYTHON in command for command in cluster["setup_commands"])

    head, worker = (cluster[f"{kind}_start_ray_commands"][-1] for kind in ("head", "worker"))
    [[exported], [again]] = (re.findall(r"export (.*?);", command) for command in (head, worker))
    variables = dict(word.split("=", 1) for word in exported.split())
    assert (again, variables["RAY_AUTH_MODE"]) == (exported, "token")
    assert variables["ESPER_CACHE"].startswith("/esper/")
    assert variables["MLFLOW_TRACKING_URI"].startswith("http://")
    for command, how in ((head, "--head"), (worker, "--address=$RAY_HEAD_IP:6379")):
        assert f"ray start {how}" in command
        assert_ray_start_knows(command.partition("ray start")[2].split())


def test_the_image_starts_ray_and_the_wheel_of_what_it_copies_holds_every_module_and_preset(tmp_path: Path):
    assert (IMAGE["FROM"], IMAGE["USER"]) == ("${BASE}", "1000:1000")
    assert INSTRUCTIONS[0] == ("ARG", f"BASE=python:{PYTHON}-slim-bookworm")
    assert_ray_start_knows(json.loads(IMAGE["CMD"]))
    ignored = [line.removeprefix("**/") for line in TEXTS["Dockerfile.dockerignore"].split()]
    tree = tmp_path / "tree"  # a copy: building leaves traces
    for source in COPIED:
        if source.endswith("/"):
            shutil.copytree(ROOT / source, tree / source, symlinks=True, ignore=shutil.ignore_patterns(*ignored))
        else:
            (tree / source).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / source, tree / source)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", str(tmp_path), str(tree)], check=True)
    [wheel] = tmp_path.glob("*.whl")
    files = [file for top in ("platform", "workers", "policies", "pipelines") for file in (ROOT / top).rglob("*.*")]
    names = {f"esper/{file.relative_to(ROOT)}" for file in files if file.suffix in (".py", ".html", ".json")}
    assert any(name.endswith(".json") for name in names)
    assert {"esper/__init__.py"} | names <= set(zipfile.ZipFile(wheel).namelist())


def test_the_rayjob_has_what_kuberay_asks_for_and_its_pods_share_all():
    """What `ValidateRayJobSpec` of KubeRay 1.7.0 asks for, and the names that its CRD requires."""
    ray, pods = JOB["spec"]["rayClusterSpec"], [group["template"]["spec"] for group in GROUPS]
    assert JOB["spec"]["shutdownAfterJobFinishes"] is True  # without it ttlSecondsAfterFinished must be 0
    assert f"ray=={ray['rayVersion']}" in (ROOT / "constraints.txt").read_text().splitlines()  # the token needs 2.52
    assert ray["authOptions"] == {"mode": "token", "secretName": "esper-ray-token"}
    assert all(isinstance(value, str) for group in GROUPS for value in group["rayStartParams"].values())
    assert not any("restartPolicy" in pod for pod in pods)  # the autoscaler's second version refuses any but Never
    for key in ("image", "env", "volumeMounts"):
        assert pods[0]["containers"][0][key] == pods[1]["containers"][0][key]
    for pod in pods:
        assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == CLAIM["metadata"]["name"]
    assert pods[0]["securityContext"] == pods[1]["securityContext"]
    assert CLAIM["spec"]["accessModes"] == ["ReadWriteMany"]


def test_the_entry_point_survives_the_submitters_shell_and_names_what_exists():
    """KubeRay pastes it into `bash -c "… ray job submit … -- ENTRYPOINT ; …"`, and Ray into `sh -c` on the head."""
    entrypoint = JOB["spec"]["entrypoint"].strip()
    assert re.fullmatch(r"[\w ./=:-]+", entrypoint)
    shell, script, folder, *rest = shlex.split(entrypoint)
    assert (shell, script in COPIED, folder[:7]) == ("sh", True, "/esper/")
    fleet = load_spec("demo", parse(PPOArguments, ["--out", folder, *rest]).set).fleet
    cores = int(GROUPS[1]["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
    assert fleet.workers is not None
    assert fleet.workers * fleet.cpus <= GROUPS[1]["maxReplicas"] * cores


def test_ppo_sh_starts_or_goes_on_or_leaves_alone(tmp_path: Path):
    """What it would run, printed: for it, `python` is `echo`."""
    (tmp_path / "python").symlink_to(str(shutil.which("echo")))
    environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    out = tmp_path / "run"
    for file, printed in (
        (None, f"pipelines/ppo.py --out {out} --seed 1"),
        ("pins.json", f"pipelines/ppo.py --resume {out}"),  # which takes nothing else
        ("summary.json", f"{out} is complete"),
    ):
        if file:
            out.mkdir(exist_ok=True)
            (out / file).write_text("{}")
        command = ["sh", "infra/ppo.sh", str(out), "--seed", "1"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.startswith(printed)


@pytest.mark.slow
def test_two_nodes_with_a_token_run_the_entry_point_of_the_rayjob(tmp_path: Path, text_file: Path):
    """The image's command and a worker's, on ports of their own; PPO on text, a worker a node; given twice."""
    gcs, dashboard = free_port(), free_port()
    apart = {"RAY_ADDRESS", *LOCAL}  # set by earlier tests of this process
    environment = {name: value for name, value in os.environ.items() if name not in apart} | {
        "PATH": BIN,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "of-this-test-alone-" + "0" * 45,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TMPDIR": tempfile.mkdtemp(prefix="esper-"),  # short: sockets' paths are limited
        "ESPER_CACHE": str(tmp_path / "cache"),
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
    }
    head = [word for word in json.loads(IMAGE["CMD"]) if not word.startswith(("--port", "--dashboard-host"))]
    head += [f"--port={gcs}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={free_port()}"]
    worker = ["ray", "start", f"--address=127.0.0.1:{gcs}", "--block"]
    agents = ("--dashboard-agent-listen-port", "--dashboard-agent-grpc-port", "--runtime-env-agent-port")
    check = json.loads(IMAGE["HEALTHCHECK"].partition("CMD ")[2])

    def call(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, environment["RAY_TMPDIR"], ignore_errors=True)
        for command in (head, worker):
            ports = {name: free_port() for name in agents}
            options = [f"{name}={port}" for name, port in ports.items()]
            node = [*command, "--num-cpus=1", "--node-ip-address=127.0.0.1", *options]
            with (tmp_path / "nodes.log").open("a") as log:
                started = subprocess.Popen(node, cwd=ROOT, env=environment, stdout=log, stderr=log)
            stack.callback(started.wait, 60)
            stack.callback(started.terminate)
            healthy = [*check[:2], check[2].replace("52365", str(ports[agents[0]]))]
            wait_for(lambda healthy=healthy: call(*healthy).returncode == 0, started, 90)
        submit = ["ray", "job", "submit", "--address", f"http://127.0.0.1:{dashboard}", "--"]
        small = ["budget.amount=600", "data.eval_tokens=512", "ppo.decisions=16", "ppo.minibatch=16"]
        entry = ["sh", "infra/ppo.sh", str(tmp_path / "run"), "--data", str(text_file)]
        entry += sets(*small, "ppo.iterations=1", "fleet.workers=2")
        first = call(*submit, *entry)
        assert first.returncode == 0, first.stdout + first.stderr
        assert "2 workers" in first.stdout
        assert (tmp_path / "run" / "summary.json").exists()
        assert "is complete" in call(*submit, *entry).stdout
        environment["RAY_AUTH_TOKEN"] = "another" + "0" * 57
        assert call(*submit, "true").returncode != 0
