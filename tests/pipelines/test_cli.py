"""`esper NAME …` runs `esper.pipelines.NAME.main` and imports nothing else.

Alone: `pytest tests/pipelines/test_cli.py`.
"""

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import esper
from esper.pipelines.common.cli import COMMANDS, main

ROOT = Path(__file__).parents[2]


def test_the_help_lists_every_command(capsys: pytest.CaptureFixture[str]):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for name, summary in COMMANDS.items():
        assert f"  {name:<10} {summary}\n" in text


def test_no_command_prints_the_help(capsys: pytest.CaptureFixture[str]):
    assert main([]) == 0
    assert capsys.readouterr().out.startswith("usage: esper COMMAND")


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"esper {esper.__version__}\n"


def test_an_unknown_command_is_one_sentence_with_the_closest(capsys: pytest.CaptureFixture[str]):
    assert main(["tarin"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: unknown command 'tarin': it must be one of ")
    assert error.endswith("Did you mean 'train'?\n")


def test_a_command_gets_its_arguments_and_gives_its_exit_code(monkeypatch: pytest.MonkeyPatch):
    got = []
    module = ModuleType("esper.pipelines.train")
    module.main = lambda argv: got.append(argv) or 7  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "esper.pipelines.train", module)
    assert main(["train", "tamiyo", "--seed", "1"]) == 7
    assert got == [["tamiyo", "--seed", "1"]]


def test_every_command_is_a_pipeline():
    assert {name for name in COMMANDS if not (ROOT / "pipelines" / f"{name}.py").is_file()} == set()


def test_the_help_imports_no_pipeline():
    code = (
        "import sys; from esper.pipelines.common.cli import main; main(['--help']);"
        "loaded = {'torch', 'ray', 'mlflow', 'numpy'} & set(sys.modules);"
        "sys.exit(str(loaded) if loaded else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
