"""A report as one HTML file that needs nothing else: no network, no script; figures lie inside it."""

import base64
from collections.abc import Sequence
from functools import partial
from html import escape

from esper.pipelines.reports.content import (
    AXIS_NAMES,
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
from esper.pipelines.reports.figures import (
    ENVELOPE,
    Look,
    blueprint_colors,
    draw_differences,
    draw_losses,
    draw_strip,
    draw_timeline,
    report_looks,
    strip_height,
    svg,
    timeline_height,
)
from esper.pipelines.reports.tables import AXES

LOSS_HEIGHT = 3.6  # inches of a loss panel

GOOD, BAD, EVEN, OPEN, LOST = "good", "bad", "even", "open", "lost"
KINDS = {
    "met": GOOD,
    "better": GOOD,
    "not met": BAD,
    "worse": BAD,
    "not better": BAD,
    "tie": EVEN,
    "withheld": OPEN,
    "cannot say": OPEN,
    "failed": LOST,
    "missing": LOST,
    "diverged": LOST,
    "killed": LOST,
}

CSS = """
:root { color-scheme: light dark;
  --paper: #fbfbfa; --card: #ffffff; --ink: #22262b; --soft: #5c646e; --line: #e1e4e8; --tint: #f3f4f6;
  --good: #0b6b4f; --good-bg: #d9f0e6; --bad: #9a3412; --bad-bg: #fde5d8; --even: #1f4f82; --even-bg: #dfeaf6;
  --open: #6a5200; --open-bg: #f8edc8; --lost: #7a2248; --lost-bg: #f7e0ea; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #15181c; --card: #1d2126; --ink: #e6e8eb; --soft: #a2abb6; --line: #343a42; --tint: #252a31;
  --good: #86dcbc; --good-bg: #12392d; --bad: #ffb594; --bad-bg: #4a2413; --even: #a9ccf2; --even-bg: #1b3350;
  --open: #f0d377; --open-bg: #40350f; --lost: #f3b0cd; --lost-bg: #481f32; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif; }
main { max-width: 1160px; margin: 0 auto; padding: 40px 24px 80px; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; margin: 3rem 0 .6rem; padding-top: 1rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.02rem; margin: 2rem 0 .5rem; }
p { margin: .4rem 0; max-width: 75ch; }
.soft { color: var(--soft); font-size: .93rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 18px 20px; }
.verdict { margin-top: 1.2rem; display: grid; gap: 16px; }
.criterion { display: grid; grid-template-columns: 7.2rem 1fr; gap: 4px 16px; align-items: start; }
.criterion + .criterion { border-top: 1px solid var(--line); padding-top: 16px; }
.criterion .name { font-weight: 600; }
.criterion p { margin: .15rem 0 .3rem; }
.criterion ul { margin: .5rem 0 0; padding-left: 1.1rem; color: var(--soft); font-size: .93rem; }
.label { display: inline-block; padding: .05rem .55rem; border-radius: 99px; font-size: .8rem; font-weight: 600;
  white-space: nowrap; line-height: 1.5; }
.good { color: var(--good); background: var(--good-bg); } .bad { color: var(--bad); background: var(--bad-bg); }
.even { color: var(--even); background: var(--even-bg); } .open { color: var(--open); background: var(--open-bg); }
.lost { color: var(--lost); background: var(--lost-bg); }
.figures { display: grid; gap: 16px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 440px), 1fr)); }
figure { margin: 0; background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 10px 12px; }
figure img { display: block; width: 100%; height: auto; }
.key { display: flex; flex-wrap: wrap; gap: 4px 16px; margin: .6rem 0 1rem; padding: 0; list-style: none;
  font-size: .87rem; }
.key li { display: flex; align-items: center; gap: .4rem; }
.key svg { flex: none; background: #fff; border-radius: 3px; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 10px; background: var(--card); }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-size: .85rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .65rem; text-align: left; vertical-align: top; border-top: 1px solid var(--line);
  white-space: nowrap; }
thead th { border-top: 0; background: var(--tint); color: var(--soft); font-weight: 600; vertical-align: bottom;
  white-space: normal; }
th:first-child { position: sticky; left: 0; background: var(--card); }
thead th:first-child { background: var(--tint); }
tbody th { font-weight: 600; }
.n { text-align: right; }
td.wide { white-space: normal; min-width: 22rem; max-width: 60ch; }
td .label + span { margin-left: .45rem; }
td small { display: block; color: var(--soft); }
.claims .n { text-align: left; }
.claims td .label + span { display: block; margin: .15rem 0 0; }
details { margin: .9rem 0; } summary { cursor: pointer; color: var(--soft); font-size: .93rem; padding: .2rem 0; }
details .scroll { margin-top: .5rem; }
ul.plain { padding-left: 1.2rem; max-width: 75ch; } ul.plain li { margin: .3rem 0; }
dl { display: grid; grid-template-columns: 10rem 1fr; gap: .35rem 1rem; margin: 0; font-size: .93rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 640px) { main { padding: 24px 14px 56px; } h1 { font-size: 1.4rem; }
  .criterion, dl { grid-template-columns: 1fr; gap: 4px; } dd { margin-bottom: .5rem; } .card { padding: 14px; }
  figure { padding: 4px; } td.wide { min-width: 16rem; }
  tbody th { white-space: normal; min-width: 6.8rem; } }
@media print { details > * { display: block; } figure, .criterion { break-inside: avoid; } }
"""


def page(report: Report) -> str:
    """The whole file."""
    styles, colors = report_looks(report), blueprint_colors(report)
    several = len(report.sections) > 1
    parts = [f"<h1>{escape(report.sweep.name)}</h1>", f'<p class="soft">{escape(settings(report))}</p>']
    for section in report.sections:
        if several:
            parts.append(f"<h3>{escape(section.title)}</h3>")
        parts.append(_verdict(section))
    for section in report.sections:
        parts += _section(report, section, styles, colors, several)
    parts += _end(report)
    title = escape(f"{report.sweep.name} · Esper")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )


# -- Parts -------------------------------------------------------------------------------------------------------------


def _verdict(section: Section) -> str:
    """Each criterion: what it asks, its outcome in a sentence, what withholds it, and the details folded away."""
    blocks = []
    for criterion in section.verdict.criteria:
        withheld = f"<p>Withheld, because:</p>{_list(criterion.withheld)}" if criterion.withheld else ""
        details = _folded("In detail", _list(criterion.details)) if criterion.details else ""
        blocks.append(
            f'<div class="criterion"><div>{_label(criterion.outcome)}</div><div><div class="name">'
            f'{escape(criterion.criterion)}</div><p class="soft">{escape(QUESTIONS[criterion.criterion])}</p>'
            f"<p>{escape(criterion.sentence)}</p>{withheld}{details}</div></div>"
        )
    return f'<section class="card verdict">{"".join(blocks)}</section>'


def _section(
    report: Report, section: Section, styles: dict[str, Look], colors: dict[str, str], several: bool
) -> list[str]:
    title = f"{section.title}: results" if several else "Results"
    size, schedule = section.verdict.size, section.verdict.schedule
    chosen = [f"best static size: {size} layer(s)" if size is not None else "no best static size"]
    chosen.append(f"best fixed schedule: {schedule}" if schedule else "no fixed schedule")
    parts = [
        f"<h2>{escape(title)}</h2>",
        f'<p class="soft">Budget {escape(section.budget)}; {escape("; ".join(chosen))}. Losses are nats per token on '
        "the fixed held-out set; ± is half of a 95 % interval.</p>",
        "<h3>Loss against cost</h3>",
        '<p class="soft">Only annealed losses: lines join the means of cooldown forks and of the run’s end, dots are '
        "final losses of every seed, the thick line is the lower envelope of the static sizes, dotted where some size "
        "has no annealed loss at that cost (it may lie lower there). The range is that of the final losses, the worse "
        "static sizes aside: what is higher is cut off.</p>",
        _loss_key(section, styles),
        '<div class="figures">',
        *(
            _figure(
                partial(draw_losses, section=section, axis=axis, styles=styles),
                LOSS_HEIGHT,
                f"Annealed validation loss against {AXIS_NAMES[axis]}, a line per arm",
            )
            for axis in AXES
        ),
        "</div>",
        "<h3>Final losses</h3>",
        '<p class="soft">A dot per seed, the mean and its 95 % interval; dotted: the best static size. Differences are '
        "taken on the same seed, and so are free of what seeds have in common. Beside ◂ and ▸ are means beyond the "
        "range.</p>",
        '<div class="figures">',
        _figure(
            partial(draw_strip, section=section, styles=styles),
            strip_height(section),
            "Final validation loss of each arm, a dot per seed, best arm on top",
        ),
        _figure(
            partial(draw_differences, section=section, styles=styles),
            strip_height(section),
            "Final validation loss of each arm minus that of the best static size on the same seed",
        ),
        "</div>",
        _folded("Every seed’s final loss as a table", _table(finals_table(section))),
        "<h3>Arms</h3>",
        _table(arm_table(section)),
        "<h3>Claims</h3>",
        '<p class="soft">Each arm’s loss minus its opponent’s at equal cost, paired by seed: negative is better. '
        "“Better” is corrected for the number of arms (Holm); random controls, which cannot win, are apart.</p>",
        _table(claims_table(section), "claims"),
    ]
    if (reasons := reasons_table(section)).rows:
        parts.append(_folded("Why some claims are not plain", _table(reasons)))
    if grown := section.grown():
        parts += ["<h3>Growth</h3>", _growth_key(colors), '<div class="figures">']
        for label in grown:
            parts.append(
                _figure(
                    partial(draw_timeline, section=section, label=label, colors=colors),
                    timeline_height(section, label),
                    f"When {label} changed its network, a line per seed",
                )
            )
        parts.append("</div>")
        parts += [
            _folded(f"{label}: every change as a table", _table(timeline_table(section, label))) for label in grown
        ]
    if told := payback(report, section):
        parts += ["<h3>What the policy cost</h3>", *(f"<p>{escape(sentence)}</p>" for sentence in told)]
    parts.append("<h3>What the data cannot say</h3>")
    if section.verdict.caveats:
        parts.append(_list(section.verdict.caveats, "plain"))
    else:
        parts.append("<p>Nothing was found that would withhold the verdict.</p>")
    return parts


def _end(report: Report) -> list[str]:
    """What went wrong, and where all this is from."""
    parts = []
    troubles = troubles_table(report)
    if troubles.rows or report.notes:
        parts.append("<h2>What went wrong</h2>")
        if report.notes:
            parts.append(_list(report.notes, "plain"))
        if troubles.rows:
            parts.append(_table(troubles))
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in provenance(report).items())
    return [*parts, "<h2>Where this is from</h2>", f'<dl class="card">{rows}</dl>']


# -- Pieces ------------------------------------------------------------------------------------------------------------


def _figure(draw: partial[None], height: float, about: str) -> str:
    """As an image of its own: ids in one SVG cannot meet those of another."""
    data = base64.b64encode(svg(draw, height, about).encode()).decode()
    return f'<figure><img alt="{escape(about)}" src="data:image/svg+xml;base64,{data}"></figure>'


def _table(table: Table, kind: str = "") -> str:
    numbers = ["" if i < table.numbers else ' class="n"' for i in range(len(table.head))]
    head = "".join(f"<th{numbers[i]}>{escape(name)}</th>" for i, name in enumerate(table.head))
    rows = []
    for row in table.rows:
        cells = [f'<th scope="row">{escape(row[0].text).replace(":", ":<wbr>")}</th>']
        for i, cell in enumerate(row[1:], start=1):
            wide = ' class="wide"' if len(cell.text) > 60 else numbers[i]
            cells.append(f"<td{wide}>{_cell(cell)}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    css = f' class="{kind}"' if kind else ""
    return (
        f'<div class="scroll" tabindex="0"><table{css}><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _cell(cell: Cell) -> str:
    label = _label(cell.outcome) if cell.outcome else ""
    text = f"<span>{escape(cell.text)}</span>" if cell.text else ""
    note = f"<small>{escape(cell.note)}</small>" if cell.note else ""
    return label + text + note


def _label(outcome: str) -> str:
    return f'<span class="label {KINDS.get(outcome, OPEN)}">{escape(outcome)}</span>'


def _list(sentences: Sequence[str], kind: str = "") -> str:
    css = f' class="{kind}"' if kind else ""
    return f"<ul{css}>{''.join(f'<li>{escape(sentence)}</li>' for sentence in sentences)}</ul>"


def _folded(what: str, inside: str) -> str:
    return f"<details><summary>{escape(what)}</summary>{inside}</details>"


def _loss_key(section: Section, styles: dict[str, Look]) -> str:
    entries = [(_swatch(ENVELOPE, line=3), "envelope of static sizes")]
    for label in section.labels:
        look = styles[label]
        dash = {"--": "4 2", ":": "1.5 2"}.get(look.line, "")
        entries.append((_swatch(look.color, marker=look.marker, hollow=look.hollow, dash=dash), label))
    return _key(entries)


def _growth_key(colors: dict[str, str]) -> str:
    entries = [(_swatch(color, line=0, marker="o"), name) for name, color in colors.items()]
    grey = "#6b7280"
    entries.append((_swatch(grey, line=0, marker="o", hollow=True), "graft that was later undone"))
    entries += [(_swatch(grey, line=0, marker="X"), "prune"), (_swatch(grey, line=0, marker="<"), "rollback")]
    return _key(entries)


def _key(entries: list[tuple[str, str]]) -> str:
    return f'<ul class="key">{"".join(f"<li>{swatch}{escape(name)}</li>" for swatch, name in entries)}</ul>'


SHAPES = {  # matplotlib's markers, around (14, 7)
    "o": '<circle cx="14" cy="7" r="3.6"/>',
    "s": '<rect x="10.5" y="3.5" width="7" height="7"/>',
    "^": '<path d="M14 3 18 10.5 10 10.5Z"/>',
    "v": '<path d="M14 11 18 3.5 10 3.5Z"/>',
    "<": '<path d="M10 7 17.5 3 17.5 11Z"/>',
    "D": '<path d="M14 2.5 18.5 7 14 11.5 9.5 7Z"/>',
    "P": '<path d="M12.5 3h3v2.5H18v3h-2.5V11h-3V8.5H10v-3h2.5Z"/>',
    "X": '<path d="M10 4.5 11.5 3 14 5.5 16.5 3 18 4.5 15.5 7 18 9.5 16.5 11 14 8.5 11.5 11 10 9.5 12.5 7Z"/>',
}


def _swatch(color: str, *, line: float = 1.4, marker: str | None = None, hollow: bool = False, dash: str = "") -> str:
    """A key's symbol: a line, with a marker on it."""
    drawn = ""
    if line:
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        drawn = f'<path d="M2 7H26" stroke="{color}" stroke-width="{line}"{dashes}/>'
    fill = "#fff" if hollow else color
    shape = f'<g fill="{fill}" stroke="{color}" stroke-width="1.2">{SHAPES[marker]}</g>' if marker else ""
    return f'<svg width="28" height="14" viewBox="0 0 28 14" aria-hidden="true">{drawn}{shape}</svg>'
