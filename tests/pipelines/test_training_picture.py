"""The picture of a training has a panel for each thing that was logged."""

import pytest
from matplotlib.image import imread

from esper.pipelines.controllers.training_picture import COLUMNS, PANELS, training_picture

FULL = {name: 0.5 for panel in PANELS for name in panel.lines}
ALL = (COLUMNS, -(-len(PANELS) // COLUMNS))
GAPS = [FULL | {"kl": float(kl), "value_loss": float(kl)} for kl in ("1", "nan", "inf")]


@pytest.mark.parametrize(
    ("rows", "panels"), [(GAPS, ALL), ([{"return_mean": 1.0, "kl": 0.1}, {"failures": 1}], (3, 1))]
)
def test_what_was_logged_has_its_panel(tmp_path, rows, panels):
    training_picture([{"iteration": float(i), **row} for i, row in enumerate(rows, 7)], tmp_path / "training.png")
    height, width, _ = imread(tmp_path / "training.png").shape
    assert (round(width / (3.6 * 120)), round(height / (2.5 * 120))) == panels
    training_picture([], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
