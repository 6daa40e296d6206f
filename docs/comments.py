"""For mkdocstrings: what Griffe, which reads the code for it, passes over. See `extensions` in mkdocs.yml."""

import ast
from functools import cache
from pathlib import Path
from typing import Any

import griffe

from esper.pipelines.tools.settings import comments

remarks = cache(lambda path: comments(Path(path).read_text(encoding="utf-8")))


class Comments(griffe.Extension):
    """The comment behind a field or a method without a docstring is its docstring; `esper.platform` is a package."""

    def on_instance(self, *, node: Any, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is None and isinstance(node, ast.AnnAssign | ast.Assign | ast.FunctionDef):
            found, last = remarks(str(obj.filepath)), node.lineno if obj.is_function else node.end_lineno
            text = found.get(last or 0) or found.get(node.lineno) or "noqa"
            if not text.startswith(("noqa", "pyright")):
                obj.docstring = griffe.Docstring(text, lineno=node.lineno, parent=obj)

    def on_package(self, *, pkg: griffe.Module, loader: Any, **_: Any) -> None:
        """Add the modules of `platform`, which Griffe leaves out as it has no `__init__.py`."""
        if pkg.path != "esper":
            return
        lines, modules = loader.lines_collection, loader.modules_collection
        folder = Path(str(pkg.filepath)).parent / "platform"
        package = griffe.Module("platform", filepath=folder / "__init__.py", parent=pkg)
        pkg.set_member("platform", package)
        for file in sorted(folder.glob("*.py")):
            code = file.read_text(encoding="utf-8")
            lines[file] = code.splitlines()
            where = {"parent": package, "lines_collection": lines, "modules_collection": modules}
            module = griffe.visit(file.stem, file, code, extensions=loader.extensions, **where)
            package.set_member(file.stem, module)
