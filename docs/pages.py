"""What mkdocs takes beside the pages of docs/: the Markdown files of other folders, and the tables of settings.md."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

from esper.pipelines.tools.settings import Group, groups

ROOT = Path(__file__).parents[1]
DATA = [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("benchmarks/*/*/README.md"))]
ELSEWHERE = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "infra/README.md", *DATA)  # pages under the same names


def on_files(files: Any, config: Any) -> None:
    """README.md becomes the start page, as mkdocs does with one."""
    for name in ELSEWHERE:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links as seen from the site, where docs/ is the root."""
    if page.file.src_uri == "settings.md":
        markdown += "\n".join(map(table, groups()))
    return re.sub(r"\]\((?:docs|\.\.)/", "](", markdown)


def table(group: Group) -> str:
    """A heading, the model's docstring, and a row a key, which a link can name: settings.md#budget.axis."""
    kind = f" ({group.kind})" if group.kind else ""
    rows = ["| key, default, allowed | meaning |", "|---|---|"]
    for key, default, allowed, meaning in group.settings:
        anchor, value = "" if kind else f' id="{key}"', f" = `{default}`" if default else ""
        cells = f"<code{anchor}>{key}</code>{value}<br>{allowed}", meaning
        rows.append(f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |")
    title = f"`{group.key}`{kind}" if group.key else "The run itself"
    return "\n".join(["", f"## {title}", "", group.about, "", *rows, ""] if group.settings else [])
