"""The files of `infra/` say what the repository and the pinned Ray can do: nothing they name is missing or misspelt.

No docker, Kubernetes or cloud is needed, and none is tried; each file's head says what was tried by hand. The slow test
is a real cluster of two `ray start` nodes. Alone: `pytest tests/test_infra.py`.
"""

import copy
import fnmatch
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from esper.pipelines.common.arguments import parse
from esper.pipelines.ppo import PPOArguments
from esper.platform.spec import load_spec

ROOT = Path(__file__).parents[1]
INFRA = ROOT / "infra"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CLUSTERS = ["cluster.yaml", "cluster-aws.yaml"]
PINNED = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if "==" in line
)
CODE = ["esper", "platform", "workers", "policies", "pipelines"]


def test_each_file_says_at_its_top_what_was_tried_and_what_never_was():
    files = [path for path in INFRA.iterdir() if path.suffix != ".dockerignore"]
    assert {path.name for path in files} >= {"README.md", "Dockerfile", "rayjob.yaml", "ppo.sh", *CLUSTERS}
    for path in files:
        text = path.read_text(encoding="utf-8")
        head = text if path.suffix == ".md" else text[: re.search(r"^[^#\n]", text, re.MULTILINE).start()]  # pyright: ignore[reportOptionalMemberAccess]
        said = re.sub(r"\n# ?", " ", head)
        assert "Tried: " in said, path.name
        assert "Never tried: " in said, path.name


def cluster(name: str) -> dict[str, Any]:
    return yaml.safe_load((INFRA / name).read_text(encoding="utf-8"))


def ray_checked(config: dict[str, Any]) -> dict[str, Any]:
    """What `ray up` makes of a configuration before it reaches for a machine, by Ray's own code."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


@pytest.mark.parametrize("name", CLUSTERS)
def test_ray_accepts_the_cluster(name: str):
    prepared = ray_checked(cluster(name))
    workers = [kind for kind in prepared["available_node_types"].values() if kind["max_workers"]]
    assert all(kind["min_workers"] >= 1 for kind in workers)  # PPO needs room for one worker when it starts
    assert prepared["max_workers"] == sum(kind["max_workers"] for kind in workers)


def test_ray_would_refuse_a_misspelt_key():
    with pytest.raises(jsonschema.ValidationError, match="setup_command"):
        ray_checked(cluster("cluster.yaml") | {"setup_command": ["true"]})


@pytest.mark.parametrize("name", CLUSTERS)
def test_what_a_node_gets_exists_and_the_token_lies_where_ray_looks(name: str):
    from ray._private.authentication.authentication_token_setup import _get_default_token_path

    mounts = cluster(name)["file_mounts"]
    assert Path(mounts.pop("~/.ray/auth_token")).expanduser() == _get_default_token_path()
    assert mounts
    for remote, local in mounts.items():
        assert (ROOT / local).is_file(), remote


@pytest.mark.parametrize("name", CLUSTERS)
def test_head_and_workers_start_with_token_authentication_and_the_same_environment(name: str):
    config = cluster(name)
    [head, worker] = [config[f"{kind}_start_ray_commands"][-1] for kind in ("head", "worker")]
    exported = re.compile(r"export (.*?);")
    assert exported.findall(head) == exported.findall(worker)
    variables = dict(word.split("=", 1) for word in exported.findall(head)[0].split())
    assert variables["RAY_AUTH_MODE"] == "token"
    assert variables["ESPER_CACHE"].startswith("/esper/")
    assert variables["MLFLOW_TRACKING_URI"].startswith("http://")
    assert "ray start --head" in head
    assert "--address=$RAY_HEAD_IP:6379" in worker
    for command in (head, worker):
        options = [word for word in command.partition("ray start")[2].split() if word.startswith("--")]
        assert_ray_start_knows(options)


def assert_ray_start_knows(options: list[str]):
    from ray.scripts.scripts import start

    known = {name for parameter in start.params for name in parameter.opts}
    assert options
    assert {option.split("=")[0] for option in options} <= known


@pytest.mark.parametrize("name", [*CLUSTERS, "Dockerfile"])
def test_the_line_that_lists_the_dependencies_lists_them(name: str, tmp_path: Path):
    """The real command, from the file, in a folder that holds what the node or image has by then."""
    if name == "Dockerfile":
        [command] = [rest.split("&&")[0] for word, rest in instructions() if word == "RUN" and "tomllib" in rest]
    else:
        [line] = [line for line in cluster(name)["setup_commands"] if "tomllib" in line]
        command = line.split("&&")[1].replace(".venv/bin/python", "python")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(["sh", "-c", command], cwd=tmp_path, env=os.environ | {"PATH": path}, check=True)
    assert (tmp_path / "requirements.txt").read_text(encoding="utf-8").splitlines() == PROJECT["dependencies"]


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions, continued lines joined, comments left out."""
    text = (INFRA / "Dockerfile").read_text(encoding="utf-8")
    lines = "\n".join(line for line in text.splitlines() if line.strip() and not line.startswith("#"))
    found = [line.split(maxsplit=1) for line in lines.replace("\\\n", " ").splitlines()]
    return [(word, re.sub(r"\s+", " ", rest)) for word, rest in found]


def copied() -> list[tuple[str, str]]:
    """Source and target of everything that the Dockerfile copies."""
    pairs = []
    for word, rest in instructions():
        if word == "COPY":
            *sources, target = rest.split()
            pairs += [(source, target) for source in sources]
    return pairs


def test_the_dockerfile_begins_with_the_base_image_and_ends_as_another_user():
    words = [word for word, _ in instructions()]
    assert set(words) <= {"ARG", "FROM", "ENV", "WORKDIR", "COPY", "RUN", "USER", "HEALTHCHECK", "CMD"}
    assert words[:2] == ["ARG", "FROM"]
    assert words.count("FROM") == words.count("CMD") == words.count("HEALTHCHECK") == words.count("USER") == 1
    values = dict(instructions())
    assert values["FROM"] == "${BASE}"
    assert values["USER"] == "1000:1000"
    last_install = max(place for place, (word, rest) in enumerate(instructions()) if "pip install" in rest)
    assert words.index("USER") > last_install


def test_the_base_image_has_a_python_that_the_project_allows():
    base = dict(rest.split("=", 1) for word, rest in instructions() if word == "ARG")["BASE"]
    major, minor = re.fullmatch(r"python:(\d+)\.(\d+)-slim-bookworm", base).groups()  # pyright: ignore[reportOptionalMemberAccess]
    least = PROJECT["requires-python"].removeprefix(">=").split(".")
    assert (int(major), int(minor)) >= tuple(int(part) for part in least)
    for name in CLUSTERS:
        assert any(f"{major}.{minor}" in command for command in cluster(name)["setup_commands"])


def test_the_images_command_and_health_check_are_lists_that_name_what_ray_offers():
    values = dict(instructions())
    command = json.loads(values["CMD"])
    assert command[:3] == ["ray", "start", "--head"]
    assert_ray_start_knows([word for word in command if word.startswith("--")])
    check = json.loads(values["HEALTHCHECK"].partition("CMD ")[2])
    compile(check[2], "healthcheck", "exec")
    from ray._private.ray_constants import DEFAULT_DASHBOARD_AGENT_LISTEN_PORT

    assert f"127.0.0.1:{DEFAULT_DASHBOARD_AGENT_LISTEN_PORT}/api/local_raylet_healthz" in check[2]


def test_the_image_is_whole(tmp_path: Path):
    """The wheel that `RUN pip install .` builds from exactly what is copied has every module and preset."""
    ignored = [line.removeprefix("**/") for line in (INFRA / "Dockerfile.dockerignore").read_text().split()]
    tree = tmp_path / "tree"
    for source, target in copied():
        into = tree / target if source.endswith("/") else tree / target / Path(source).name
        if (ROOT / source).is_dir():
            drop = shutil.ignore_patterns(*ignored)
            shutil.copytree(ROOT / source, into, symlinks=True, ignore=drop)
        else:
            assert not any(fnmatch.fnmatch(source, pattern) for pattern in ignored)
            into.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / source, into)
    assert (tree / "infra" / "ppo.sh").is_file()
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", str(tmp_path), str(tree)], check=True)
    [wheel] = tmp_path.glob("*.whl")
    wanted = {
        f"esper/{path.relative_to(ROOT)}"
        for folder in CODE[1:]
        for path in (ROOT / folder).rglob("*")
        if path.suffix == ".py" or path.match("platform/presets/*.json")
    }
    assert wanted <= set(zipfile.ZipFile(wheel).namelist())


def rayjob() -> tuple[dict[str, Any], dict[str, Any]]:
    """The volume claim and the job."""
    [claim, job] = yaml.safe_load_all((INFRA / "rayjob.yaml").read_text(encoding="utf-8"))
    return claim, job


def pods(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Pod specs of head and worker groups."""
    groups = job["spec"]["rayClusterSpec"]
    return [group["template"]["spec"] for group in (groups["headGroupSpec"], *groups["workerGroupSpecs"])]


def test_the_rayjob_has_what_kuberay_asks_for():
    """What `ValidateRayJobSpec` of KubeRay 1.7.0 asks for, and the names that its CRD requires."""
    _, job = rayjob()
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]
    assert set(spec) == {
        "entrypoint",
        "backoffLimit",
        "submitterConfig",
        "shutdownAfterJobFinishes",
        "ttlSecondsAfterFinished",
        "rayClusterSpec",
    }
    assert spec["shutdownAfterJobFinishes"] is True  # without it the next value must be 0
    assert spec["ttlSecondsAfterFinished"] >= 0
    assert spec["backoffLimit"] > 0
    assert spec["submitterConfig"]["backoffLimit"] > 0
    groups = spec["rayClusterSpec"]
    assert groups["rayVersion"] == PINNED["ray"]  # 2.52 or newer is needed for the token
    assert groups["authOptions"] == {"mode": "token", "secretName": "esper-ray-token"}
    assert groups["enableInTreeAutoscaling"] is True
    for group in (groups["headGroupSpec"], *groups["workerGroupSpecs"]):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
    for group in groups["workerGroupSpecs"]:
        assert (
            1 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        )  # PPO starts with one worker's room
    for pod in pods(job):
        assert "restartPolicy" not in pod  # the autoscaler's second version refuses any but Never
        assert pod["securityContext"]["runAsUser"] == pod["securityContext"]["fsGroup"] == 1000  # the image's user


def test_all_pods_share_image_environment_and_volume():
    claim, job = rayjob()
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    images, environments = set(), []
    for pod in pods(job):
        [container] = pod["containers"]
        images.add(container["image"])
        environments.append(container["env"])
        [volume] = pod["volumes"]
        [mount] = container["volumeMounts"]
        assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        assert mount == {"name": volume["name"], "mountPath": "/esper"}
    assert len(images) == 1
    assert environments[0] == environments[1]
    assert {variable["name"] for variable in environments[0]} == {"ESPER_CACHE", "MLFLOW_TRACKING_URI"}


def test_the_entry_point_survives_the_submitters_shell_and_names_what_exists():
    """KubeRay pastes it into `bash -c "… ray job submit … -- ENTRYPOINT ; …"`, and Ray into `sh -c` on the head."""
    _, job = rayjob()
    entrypoint = job["spec"]["entrypoint"].strip()
    assert re.fullmatch(r"[\w ./=:-]+", entrypoint)
    shell, script, folder, *rest = shlex.split(entrypoint)
    assert shell == "sh"
    assert script in [source for source, _ in copied()]
    assert folder.startswith("/esper/")
    arguments = parse(PPOArguments, ["--out", folder, *rest])
    spec = load_spec("demo", list(arguments.set))
    [group] = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    cores = int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
    assert spec.fleet.workers is not None
    assert spec.fleet.workers * spec.fleet.cpus <= group["maxReplicas"] * cores


def chosen(folder: Path | None, *words: str) -> subprocess.CompletedProcess[str]:
    """What `infra/ppo.sh` would run, printed: for it, `python` is `echo`."""
    echo = shutil.which("echo")
    assert echo is not None
    with tempfile.TemporaryDirectory() as tools:
        (Path(tools) / "python").symlink_to(echo)
        return subprocess.run(
            ["sh", "infra/ppo.sh", *([] if folder is None else [str(folder)]), *words],
            cwd=ROOT,
            env=os.environ | {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            check=False,
        )


def test_ppo_sh_starts_in_a_new_or_an_empty_folder(tmp_path: Path):
    for folder in (tmp_path / "new", tmp_path):
        done = chosen(folder, "--set", "ppo.iterations=2")
        assert done.stdout.split() == ["pipelines/ppo.py", "--out", str(folder), "--set", "ppo.iterations=2"]


def test_ppo_sh_goes_on_where_a_checkpoint_is(tmp_path: Path):
    (tmp_path / "checkpoints" / "000001").mkdir(parents=True)
    done = chosen(tmp_path, "--seed", "1")  # which `--resume` refuses: the folder has it
    assert done.stdout.split() == ["pipelines/ppo.py", "--resume", str(tmp_path)]


def test_ppo_sh_moves_away_what_died_before_its_first_checkpoint(tmp_path: Path):
    out = tmp_path / "run"
    (out / "checkpoints").mkdir(parents=True)
    (out / "spec.json").write_text("{}", encoding="utf-8")
    assert chosen(out).stdout.split() == ["pipelines/ppo.py", "--out", str(out)]
    [kept] = tmp_path.glob("run.died-*")
    assert (kept / "spec.json").exists()
    assert not out.exists()


def test_ppo_sh_leaves_a_complete_run_alone(tmp_path: Path):
    (tmp_path / "summary.json").write_text("{}", encoding="utf-8")
    done = chosen(tmp_path)
    assert (done.returncode, done.stdout.count("is complete")) == (0, 1)
    assert "--resume" in done.stdout


def test_ppo_sh_without_a_folder_says_how_it_is_called():
    done = chosen(None)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no folder named")


def ports(count: int) -> list[int]:
    """Ports that nothing listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    found = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return found


@pytest.mark.slow
def test_two_nodes_with_a_token_run_the_entry_point_of_the_rayjob(tmp_path: Path, text_file: Path):
    """The image's command and a worker's, on ports of their own; PPO on text, a worker a node; given twice."""
    gcs, dashboard, client, *rest = ports(3 + 2 * 3)
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "of-this-test-alone-" + "0" * 45,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TMPDIR": tempfile.mkdtemp(prefix="esper-"),  # short: sockets' paths are limited
        "ESPER_CACHE": str(tmp_path / "cache"),
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
    }
    environment.pop("RAY_ADDRESS", None)
    image = dict(instructions())
    head = [word for word in json.loads(image["CMD"]) if not word.startswith(("--port", "--dashboard-host"))]
    head += [f"--port={gcs}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"]
    worker = ["ray", "start", f"--address=127.0.0.1:{gcs}", "--block"]
    names = ["--dashboard-agent-listen-port", "--dashboard-agent-grpc-port", "--runtime-env-agent-port"]
    agents = [rest[:3], rest[3:]]
    nodes = [
        [
            *command,
            "--num-cpus=1",
            "--node-ip-address=127.0.0.1",
            *(f"{n}={p}" for n, p in zip(names, own, strict=True)),
        ]
        for command, own in zip((head, worker), agents, strict=True)
    ]
    check = json.loads(image["HEALTHCHECK"].partition("CMD ")[2])

    def call(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    started = []
    try:
        for command, (agent, *_) in zip(nodes, agents, strict=True):
            with (tmp_path / f"node{len(started)}.log").open("w", encoding="utf-8") as log:
                started.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log))
            deadline = time.monotonic() + 90
            while call(*check[:2], check[2].replace("52365", str(agent))).returncode:
                assert time.monotonic() < deadline, (tmp_path / f"node{len(started) - 1}.log").read_text()
                time.sleep(1)
        submit = ["ray", "job", "submit", "--address", f"http://127.0.0.1:{dashboard}", "--"]
        small = [
            "budget.amount=600",
            "data.eval_tokens=512",
            "ppo.decisions=16",
            "ppo.minibatch=16",
            "ppo.iterations=1",
        ]
        entry = ["sh", "infra/ppo.sh", str(tmp_path / "run"), "--data", str(text_file)]
        entry += [word for key in (*small, "fleet.workers=2") for word in ("--set", key)]
        first = call(*submit, *entry)
        assert first.returncode == 0, first.stdout + first.stderr
        assert "2 workers" in first.stdout
        assert (tmp_path / "run" / "summary.json").exists()
        assert "is complete" in call(*submit, *entry).stdout
        environment["RAY_AUTH_TOKEN"] = "another" + "0" * 57
        assert call(*submit, "true").returncode != 0
    finally:
        for node in reversed(started):
            node.terminate()
        for node in started:
            node.wait(60)
        shutil.rmtree(environment["RAY_TMPDIR"], ignore_errors=True)
