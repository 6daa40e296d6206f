"""What the end-to-end tests of the pipelines share: what their store holds, and how a mistake is told."""

import pytest


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
