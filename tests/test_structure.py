"""The house keeps its shape and its size: imports go one way, `platform` stays the standard library's, limits hold."""

import ast
import io
import os
import re
import subprocess
import sys
import sysconfig
import tokenize
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {  # folder → folders it may import from, besides itself
    "platform": set(),
    "workers": {"platform"},
    "policies": {"platform"},
    "pipelines": {"platform", "workers", "policies"},
}


def python(*folders: str) -> list[Path]:
    return [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]


def lines(files: Iterable[Path]) -> int:
    return sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)


def prose(files: Iterable[Path]) -> int:
    """Lines of docstrings, and lines that are only a comment."""
    count = 0
    for file in files:
        text = file.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
                count += node.body[0].end_lineno - node.body[0].lineno + 1  # pyright: ignore[reportOptionalOperand]
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            count += token.type == tokenize.COMMENT and token.line.lstrip().startswith("#")
    return count


CODE = [*python(*MAY_IMPORT, "benchmarks", "docs"), ROOT / "esper" / "__init__.py"]
WATCHES = r"/(report|tracking\w*|live\w*|health|log|chart_view|progress|journal)\.py$"


def watching() -> list[Path]:
    return [*python("pipelines/reports"), *(file for file in CODE if re.search(WATCHES, str(file)))]


@pytest.mark.parametrize(
    ("what", "measure", "limit"),
    [
        ("lines of Python, tests apart", lambda: lines(CODE), 19_321),
        ("lines of tests", lambda: lines(python("tests")), 11_463),
        ("lines of docstrings and comments", lambda: prose(CODE), 1_980),
        ("entries in pipelines", lambda: sum(p.name != "__pycache__" for p in (ROOT / "pipelines").iterdir()), 14),
        ("lines that watch training beyond those that train", lambda: lines(watching()) - lines(python("workers")), 0),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_a_limit_holds(what: str, measure: Callable[[], int], limit: int):
    """To be raised only on purpose: make something simpler instead."""
    assert (measured := measure()) <= limit, f"{what}: {measured:,}, and the limit is {limit:,}"


def imported(file: Path) -> Iterator[str]:
    """Full name of each module that a file imports, wherever in the file."""
    package = ["esper", *file.relative_to(ROOT).parent.parts]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base += node.module.split(".") if node.module else []
            yield from (".".join([*base, alias.name]) for alias in node.names)


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_go_one_way(folder: str):
    allowed = MAY_IMPORT[folder] | {folder, "__version__"}
    found = [(file, name) for file in python(folder) for name in imported(file) if name.startswith("esper.")]
    assert found
    assert [(str(file), name) for file, name in found if name.split(".")[1] not in allowed] == []


def test_nothing_outside_the_import_root_is_imported_by_its_folder():
    """`from workers.run import …` would load a second copy of the module beside `esper.workers.run`."""
    ours = {"workers", "policies", "pipelines"}
    files = [*CODE, *python("tests")]
    assert [(str(file), name) for file in files for name in imported(file) if name.split(".")[0] in ours] == []


def test_the_clone_is_importable_without_being_installed_and_hides_no_module_of_the_standard_library():
    """In a fresh interpreter, with the root first on its path."""
    assert not (ROOT / "platform" / "__init__.py").exists()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), sysconfig.get_path("purelib")])}
    code = "import platform, esper.platform.errors as ours; print(platform.__file__, ours.__file__)"
    command = [sys.executable, "-S", "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [f"{sysconfig.get_path('stdlib')}/platform.py", f"{ROOT}/esper/platform/errors.py"]


def test_the_import_root_is_one_file_and_four_relative_links():
    entries = [path for path in (ROOT / "esper").iterdir() if path.name != "__pycache__"]
    links = {path.name: path.readlink() for path in entries if path.is_symlink()}
    assert (len(entries), links) == (5, {name: Path("..", name) for name in MAY_IMPORT})
