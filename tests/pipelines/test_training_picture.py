"""The picture of a training has a panel for each thing that was logged. Alone: `pytest` and this file."""

from pathlib import Path

import pytest
from matplotlib.image import imread

from esper.pipelines.controllers.training_picture import COLUMNS, PANELS, training_picture
from esper.policies.simic.health import LOSSES

FULL = {name: 0.5 for panel in PANELS for name in panel.lines}
ALL = (COLUMNS, -(-len(PANELS) // COLUMNS))


@pytest.mark.parametrize(
    ("rows", "panels"),
    [
        ([FULL], ALL),
        ([FULL | {"kl": float(kl), "value_loss": float(kl)} for kl in ("1", "nan", "inf")], ALL),
        ([{"return_mean": 1.0, "kl": 0.1, **dict.fromkeys(LOSSES, 0.0)}] * 3, (2, 1)),
        ([{"return_mean": 1.0, "kl": 0.1}, {"failures": 1.0}], (3, 1)),
    ],
    ids=["all", "gaps", "nothing lost", "something lost"],
)
def test_what_was_logged_has_its_panel(tmp_path: Path, rows, panels):
    path = tmp_path / "training.png"
    training_picture([{"iteration": float(i), **row} for i, row in enumerate(rows, 7)], path)
    height, width, _ = imread(path).shape
    assert (round(width / (3.6 * 120)), round(height / (2.5 * 120))) == panels
    training_picture([], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
