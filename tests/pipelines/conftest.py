"""What the end-to-end tests of the pipelines share: a tiny preset, flags for it, and a store of their own."""

import pytest

from esper.platform import cluster


@pytest.fixture
def tiny(tmp_path, tiny_spec, shards, monkeypatch):
    """Flags that make any pipeline take seconds."""
    preset = tmp_path / "tiny.json"
    preset.write_text(tiny_spec.model_dump_json(exclude={"preset"}))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    return ["--preset", str(preset), "--data", str(shards)]


@pytest.fixture
def client(tiny, tmp_path):
    """A client of the store that the pipelines under test write to."""
    from mlflow import MlflowClient

    return lambda: MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")


@pytest.fixture(scope="module")
def one_ray():
    """One local Ray for all of a module's commands, which take the one that is there."""
    with cluster.session():
        yield
