"""A report as one HTML file that needs nothing else: no network, no script; figures lie inside it."""

import base64
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from esper import __version__
from esper.pipelines.reports import sections
from esper.pipelines.reports.baselines import Trials
from esper.pipelines.reports.figures import panels, svg
from esper.pipelines.reports.sections import Report, short


def html(report: Report) -> str:
    """The whole file."""
    files = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=files, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["told"] = told
    figures = [_figures(verdict.trials) for verdict in report.verdicts]
    page = environment.get_template("report.html")
    return page.render(report=report, content=sections, drawn=figures, version=__version__)


def told(value: Any) -> str:
    """A table's value in words; a dash for what is missing."""
    if value is None or value is pd.NA or value != value:
        return "–"
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 10 and value != round(value) else short(value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def _figures(trials: Trials) -> dict[str, str]:
    """Each as an image of its own: ids in one SVG cannot meet those of another."""
    drawn = {name: svg(partial(draw, trials=trials), size) for name, (draw, size) in panels(trials).items()}
    return {name: base64.b64encode(text.encode()).decode() for name, text in drawn.items()}
