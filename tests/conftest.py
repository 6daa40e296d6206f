"""Fixtures that many tests need: a small text as prepared shards, and a spec that trains in seconds."""

import importlib
import os
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from esper.platform import cluster
from esper.platform.data_spec import DataSpec, ImageSpec
from esper.platform.spec import RunSpec
from esper.platform.tracking_store import ENVIRONMENT, connect

if TYPE_CHECKING:  # importing torch is left to the processes that run tests: xdist's own need not
    from esper.workers.tolaria.data import Data, ImageData, TokenData

TESTS = Path(__file__).parent
# Of the files, first: each goes whole to a process (`make test`), and none is to wait for such a one at the end. Before
# all that share a Ray: the test of chaos, which connects its process to nodes of its own.
LONGEST = """
pipelines/test_chaos pipelines/test_sweep pipelines/test_ppo workers/test_compiled platform/test_tracking
platform/test_cluster policies/simic/test_dispatcher policies/simic/test_ppo pipelines/test_plugins test_doc_commands
pipelines/test_resume test_gpu_script workers/test_resume pipelines/reports/test_report workers/kasmina/test_growth
"""
TINYSTORIES = Path(__file__).parents[2] / "shared" / "data" / "tinystories"

TEXT = "the cat sat on a mat and saw one big red dog run to its tree while birds sang in warm sun"
WORDS = TEXT.split()


def story(i: int) -> str:
    """A short deterministic text with a little structure to learn."""
    return " ".join(WORDS[(i * 7 + j * (i % 5 + 1)) % len(WORDS)] for j in range(60)) + "."


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "stories.txt"
    path.write_text("\n<|endoftext|>\n".join(story(i) for i in range(200)), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def shards(tmp_path_factory, text_file) -> Path:
    from esper.workers.tolaria.data import prepare

    out = tmp_path_factory.mktemp("shards") / "char"
    prepare(DataSpec(source=str(text_file)), out)
    return out


@pytest.fixture(scope="session")
def tokens(shards) -> "TokenData":
    from esper.workers.tolaria.data import TokenData

    return TokenData.open(shards)


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> "ImageData":
    """scikit-learn's."""
    from esper.workers.tolaria.data import ImageData, prepare

    out = tmp_path_factory.mktemp("images") / "digits"
    prepare(ImageSpec(), out)
    return ImageData.open(out)


@pytest.fixture(params=["text", "images"])
def domain(request) -> str:
    return request.param


@pytest.fixture
def data(domain, tokens, digits) -> "Data":
    return {"text": tokens, "images": digits}[domain]


@pytest.fixture
def small_spec(domain, tiny_spec) -> RunSpec:
    """`tiny_spec`, or as many steps of a ResNet of one block; with blueprints of every kind."""
    if domain == "text":
        blueprints = {"attention": {}, "ffn": {"width": 8}, "expert": {"width": 8}, "block": {}}
        growth = tiny_spec.growth.model_copy(update={"blueprints": blueprints})
        return tiny_spec.model_copy(update={"growth": growth})
    host = {"kind": "resnet", "n_layer": 1, "channels": 4, "group": 4, "image_size": 8, "image_channels": 1}
    blueprints = {"conv_width": {"width": 4}, "channel_attention": {"width": 4}, "conv_block": {}}
    values = tiny_spec.model_dump()
    values["growth"]["blueprints"] = blueprints
    own = {"kind": "images", "batch_size": 8, "crop": 1, "flip": True, "eval_images": 64, "decision_images": 32}
    return RunSpec.model_validate({**values, "host": {**host, "norm": "batch"}, "data": own})


@pytest.fixture
def grafts(domain) -> dict[str, str]:
    """What it adds → blueprint."""
    if domain == "text":
        return {"width": "ffn", "layer": "block", "gated": "expert", "other": "attention"}
    return {"width": "conv_width", "layer": "conv_block", "gated": "channel_attention", "other": "conv_block"}


@pytest.fixture
def tiny_spec() -> RunSpec:
    """40 steps of a one-layer GPT in 8 decisions, on the reference clock."""
    blueprints = {"attention": {}, "ffn": {"width": 8}, "block": {}}
    return RunSpec.model_validate(
        {
            "preset": "tiny",
            "host": {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16},
            "data": {"tokenizer": "char", "batch_size": 4, "eval_tokens": 512, "decision_tokens": 256},
            "budget": {"axis": "steps", "amount": 40, "decisions": 8},
            "growth": {"max_layers": 3, "min_optimizer_steps": 2, "blueprints": blueprints},
            "device": "cpu",
        }
    )


def pytest_configure(config):
    os.environ.update(ENVIRONMENT)  # tests import MLflow before a tracker does
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
    settings.register_profile("default", max_examples=10, deadline=None)
    settings.register_profile("all", max_examples=200, deadline=None)
    settings.load_profile("all" if os.environ.get("ESPER_TEST_ALL") == "1" else "default")


def pytest_collection_modifyitems(items):
    place = {TESTS / f"{name}.py": place for place, name in enumerate(LONGEST.split())}
    items.sort(key=lambda item: place.get(item.path, len(place)))


@pytest.fixture(scope="session")
def template(tmp_path_factory) -> Path:
    """A store with MLflow's tables and nothing in them: making them takes seconds, a copy none."""
    root = tmp_path_factory.getbasetemp()
    file = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "template.db"
    connect(f"sqlite:///{file}")  # the first of xdist's processes makes it, the others wait
    return file


@pytest.fixture
def store(template, tmp_path, monkeypatch) -> str:
    """A working directory with an empty store in it."""
    shutil.copy(template, tmp_path / "mlflow.db")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    return f"sqlite:///{tmp_path}/mlflow.db"


@pytest.fixture
def tiny(tmp_path, tiny_spec, shards, store):
    """Flags that make any pipeline take seconds."""
    preset = tmp_path / "tiny.json"
    preset.write_text(tiny_spec.model_dump_json(exclude={"preset"}))
    return ["--preset", str(preset), "--data", str(shards)]


@pytest.fixture
def module(tmp_path, store):
    """Writes a module into the working directory; what a test imported and registered is forgotten."""

    def write(name: str, text: str) -> None:
        (tmp_path / f"{name}.py").write_text(text)
        sys.modules.pop(name, None)
        importlib.invalidate_caches()

    from esper.workers.kasmina import registry

    path, kinds = list(sys.path), dict(registry._KINDS)
    yield write
    sys.path[:] = path
    registry._KINDS.clear()
    registry._KINDS.update(kinds)


@pytest.fixture(scope="session")
def one_ray() -> Iterator[None]:
    """One local Ray for all tests of a session that kill none of its own processes, of two workers at once."""
    with cluster.session(cpus=2):
        yield


@pytest.fixture(scope="session")
def tinystories() -> Path:
    if not TINYSTORIES.is_dir():
        pytest.skip(f"needs the TinyStories slice in {TINYSTORIES}")
    return TINYSTORIES


@pytest.fixture
def files_of_at_most() -> Callable[[int], AbstractContextManager[None]]:
    """A disk that is full for this process, while a block lasts: the limit that the system puts on a file's size."""

    @contextmanager
    def limited(size: int) -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited
