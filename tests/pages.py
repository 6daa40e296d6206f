"""The documentation's pages: their fenced blocks, and what Python of theirs leaves."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
CONTROLLERS, RECORDED = (f"benchmarks/{kind}/tinystories-char/README.md" for kind in ("controllers", "recorded"))
OTHERS = ("README.md", "CONTRIBUTING.md", "infra/README.md", CONTROLLERS, RECORDED)
PAGES = [*(f"../{name}" for name in OTHERS), *(page.name for page in sorted(DOCS.glob("*.md")))]


def fenced(page: str) -> list[tuple[str, str]]:
    """Language and code of each of a page's fenced blocks, in their order; the language of commands is `""`."""
    text = (DOCS / page).read_text(encoding="utf-8")
    found = re.findall(r"^```(.*)\n((?:.*\n)*?)```$", text, re.MULTILINE)
    assert 2 * len(found) == text.count("```")  # no block is passed over
    return found


def blocks(page: str, language: str = "python") -> list[str]:
    return [code for named, code in fenced(page) if named == language]


def after_each(codes: Sequence[str], **names: Any) -> list[dict[str, Any]]:
    """All names after each of these, run in one namespace that has `names`, as modules in the working directory are."""
    names |= {"__name__": "page", "__file__": "page.py"}
    found = []
    for code in codes:
        exec(compile(code, "page", "exec", dont_inherit=True), names)
        found.append(dict(names))
    return found
