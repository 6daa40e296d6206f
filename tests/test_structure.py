"""The tree keeps its shape: imports go one way, `platform` stays the standard library's, links and wheel are whole.

Alone: `pytest tests/test_structure.py`.
"""

import ast
import os
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {  # folder → folders it may import from, besides itself
    "platform": set(),
    "workers": {"platform"},
    "policies": {"platform"},
    "pipelines": {"platform", "workers", "policies"},
}


def imported(file: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of each module of ours that a file imports, wherever in the file."""
    package = ["esper", *file.relative_to(ROOT).parent.parts]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base += node.module.split(".") if node.module else []
            names = [".".join([*base, alias.name]) for alias in node.names]
        yield from ((node.lineno, name) for name in names if name.split(".")[0] == "esper")


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_go_one_way(folder: str):
    allowed = MAY_IMPORT[folder] | {folder, "__version__"}
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    wrong = [
        f"{file.relative_to(ROOT)}:{line} imports {name}"
        for file in files
        for line, name in imported(file)
        if [*name.split("."), ""][1] not in allowed
    ]
    assert not wrong


def test_nothing_outside_the_import_root_is_imported_by_its_folder():
    """`from workers.run import …` would load a second copy of the module beside `esper.workers.run`."""
    wrong = [
        f"{file.relative_to(ROOT)}: {line.strip()}"
        for folder in ("platform", "workers", "policies", "pipelines", "tests", "benchmarks")
        for file in sorted((ROOT / folder).rglob("*.py"))
        for line in file.read_text(encoding="utf-8").splitlines()
        if line.strip().startswith(
            tuple(f"{word} {name}" for word in ("import", "from") for name in ("workers", "policies", "pipelines"))
        )
    ]
    assert not wrong


def run(code: str) -> str:
    """What a fresh interpreter prints in the clone, with the root first on its path and nothing of ours installed."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), sysconfig.get_path("purelib")])}
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_platform_has_no_init():
    assert not (ROOT / "platform" / "__init__.py").exists()


def test_import_platform_in_the_clone_gives_the_standard_librarys():
    assert run("import platform; print(platform.__file__)").startswith(sysconfig.get_path("stdlib"))


def test_the_clone_is_importable_without_being_installed():
    assert run("import esper.platform.errors as m; print(m.__file__)") == f"{ROOT}/esper/platform/errors.py"


def test_the_import_root_is_one_file_and_four_relative_links():
    entries = {path.name: path for path in (ROOT / "esper").iterdir() if path.name != "__pycache__"}
    assert set(entries) == {"__init__.py", *MAY_IMPORT}
    for name in MAY_IMPORT:
        assert entries[name].is_symlink()
        assert entries[name].readlink() == Path("..", name)
        assert entries[name].resolve() == ROOT / name
        assert entries[name].is_dir()


def test_the_wheel_holds_every_module_and_preset(tmp_path: Path):
    """Built from a copy, since building leaves traces in the tree."""
    tree = tmp_path / "tree"
    tree.mkdir()
    names = ["esper", *MAY_IMPORT, "pyproject.toml", "README.md", "LICENSE"]
    subprocess.run(["cp", "-a", *(str(ROOT / name) for name in names if (ROOT / name).exists()), str(tree)], check=True)
    (tree / "README.md").touch()
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", str(tmp_path), str(tree)], check=True)
    [wheel] = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        f"esper/{file.relative_to(ROOT)}"
        for folder in MAY_IMPORT
        for file in (ROOT / folder).rglob("*")
        if file.suffix == ".py" or file.match("platform/presets/*.json")
    } | {"esper/__init__.py"}
    assert any(name.startswith("esper/platform/presets/") for name in wanted)
    assert wanted <= held, sorted(wanted - held)
