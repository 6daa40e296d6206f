"""What the end-to-end tests of the pipelines share: a tiny preset, flags for it, and a store of their own."""

import pytest


@pytest.fixture
def tiny(tmp_path, tiny_spec, shards, store):
    """Flags that make any pipeline take seconds."""
    preset = tmp_path / "tiny.json"
    preset.write_text(tiny_spec.model_dump_json(exclude={"preset"}))
    return ["--preset", str(preset), "--data", str(shards)]


@pytest.fixture
def client(store):
    """A client of the store that the pipelines under test write to."""
    from mlflow import MlflowClient

    return lambda: MlflowClient(store)


@pytest.fixture
def refused(capfd):
    """Checks that a command ends with exit code 2 and one sentence, and returns that."""

    def check(main, arguments, sentence: str = "") -> str:
        capfd.readouterr()
        assert main([str(argument) for argument in arguments]) == 2
        printed = capfd.readouterr()
        assert (printed.out, "Traceback" in printed.err) == ("", False)
        [error] = [line for line in printed.err.splitlines() if line.startswith("error: ")]
        assert sentence in error
        return error

    return check
