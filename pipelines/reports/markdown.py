"""A report as Markdown, for a place that shows no HTML: the same content, with the picture linked."""

import re
from collections.abc import Iterable

from esper.pipelines.reports.content import (
    QUESTIONS,
    Cell,
    Report,
    Section,
    Table,
    arm_table,
    claims_table,
    finals_table,
    payback,
    provenance,
    reasons_table,
    settings,
    timeline_table,
    troubles_table,
)


def markdown(report: Report, picture: str) -> str:
    """The whole file; `picture` is the PNG's name beside it."""
    several = len(report.sections) > 1
    lines = [f"# {_text(report.sweep.name)}", "", _text(settings(report)), ""]
    for section in report.sections:
        if several:
            lines += [f"## {_text(section.title)}: verdict", ""]
        for criterion in section.verdict.criteria:
            lines.append(f"- **{criterion.criterion}: {criterion.outcome}.** *{QUESTIONS[criterion.criterion]}*")
            lines.append(f"  {_text(criterion.sentence)}")
            lines += [f"  - Withheld: {_text(reason)}" for reason in criterion.withheld]
            lines += [f"  - {_text(detail)}" for detail in criterion.details]
        lines.append("")
    lines += [f"![Losses, final losses and growth]({picture})", ""]
    for section in report.sections:
        lines += _section(report, section, several)
    troubles = troubles_table(report)
    if troubles.rows or report.notes:
        lines += ["## What went wrong", "", *_list(report.notes), *_table(troubles)]
    lines += ["## Where this is from", "", *_list(f"{name}: {value}" for name, value in provenance(report).items())]
    return "\n".join(lines).rstrip() + "\n"


def _section(report: Report, section: Section, several: bool) -> list[str]:
    title = f"{section.title}: results" if several else "Results"
    lines = [
        f"## {_text(title)}",
        "",
        f"Budget {section.budget}; losses in nats per token, ± half of a 95 % interval.",
        "",
    ]
    lines += ["### Arms", "", *_table(arm_table(section))]
    lines += ["### Final losses", "", *_table(finals_table(section))]
    lines += [
        *(
            "### Claims",
            "",
            "The arm’s loss minus its opponent’s at equal cost, paired by seed: negative is better.",
            "",
        ),
        *_table(claims_table(section)),
        *_table(reasons_table(section)),
    ]
    for label in section.grown():
        lines += [f"### Growth of {_text(label)}", "", *_table(timeline_table(section, label))]
    if told := payback(report, section):
        lines += ["### What the policy cost", "", *_list(told)]
    lines += ["### What the data cannot say", ""]
    return lines + _list(section.verdict.caveats or ["Nothing was found that would withhold the verdict."])


def _table(table: Table) -> list[str]:
    """Nothing where there are no rows."""
    if not table.rows:
        return []
    rule = ["---" if i < table.numbers else "---:" for i in range(len(table.head))]
    rows = [[_text(name) for name in table.head], rule, *([_cell(cell) for cell in row] for row in table.rows)]
    return [*(f"| {' | '.join(row)} |" for row in rows), ""]


def _cell(cell: Cell) -> str:
    note = f"({_text(cell.note)})" if cell.note else ""
    return " ".join(part for part in (cell.outcome and f"**{cell.outcome}**", _text(cell.text), note) if part)


def _list(sentences: Iterable[str]) -> list[str]:
    lines = [f"- {_text(sentence)}" for sentence in sentences]
    return [*lines, ""] if lines else []


def _text(text: str) -> str:
    """What Markdown would take for markup, escaped."""
    return re.sub(r"([\\`*<>|\[\]])|(?<!\w)_|_(?!\w)", lambda found: f"\\{found[0]}", " ".join(text.split()))
