"""English on every machine: the installed Python's language reference and docstrings, about 2 MB."""

import ast
import hashlib
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

# Some distributions leave out the test suites; the rest is not English.
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "lib2to3", "pydoc_data"}


def read() -> Iterator[str]:
    """Topics of the reference and docstrings, ordered by hash: any prefix is a fair sample. Source is not imported."""
    from pydoc_data.topics import topics  # half a megabyte, needed here alone

    documents = [topic.strip() for topic in topics.values()]
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        if _SKIPPED.isdisjoint(parts[:-1]):
            documents += _documents(path, ".".join(parts).removesuffix(".__init__"))
    yield from sorted(documents, key=lambda document: hashlib.sha256(document.encode()).digest())


def _documents(path: Path, module: str) -> Iterator[str]:
    """The module's docstring, and a document per class or function in it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's strings
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # a template, or source of another Python
            return
    doc = ast.get_docstring(tree)
    documents = [f"{module}\n{doc}" if doc else "", *("\n\n".join(_docstrings(node, module)) for node in tree.body)]
    for document in filter(None, documents):
        yield document.encode("utf-8", "replace").decode()  # escapes may be lone surrogates


def _docstrings(node: ast.AST, prefix: str) -> Iterator[str]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        name = f"{prefix}.{node.name}"
        if doc := ast.get_docstring(node):
            yield f"{name}\n{doc}"
        for child in node.body:
            yield from _docstrings(child, name)
