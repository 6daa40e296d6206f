"""The picture of a training is drawn from what was logged, whatever that is. Alone: `pytest` and this file."""

from pathlib import Path

import pytest
from matplotlib.image import imread

from esper.pipelines.controllers.training_picture import COLUMNS, PANELS, training_picture
from esper.policies.simic.health import KINDS, LOSSES

FULL = {name: 0.5 for panel in PANELS for name in panel.lines} | {"return_min": 0.0, "return_max": 1.0}


def size(path: Path) -> tuple[int, int]:
    """Panels beside and above one another, by the picture's size."""
    height, width, _ = imread(path).shape
    return round(width / (3.6 * 120)), round(height / (2.5 * 120))


@pytest.mark.parametrize("iterations", [1, 30])
def test_each_metric_has_its_panel(tmp_path, iterations):
    history = [{**FULL, "iteration": 7.0 + i} for i in range(iterations)]
    training_picture(history, tmp_path / "training.png")
    assert size(tmp_path / "training.png") == (COLUMNS, -(-len(PANELS) // COLUMNS))


def test_what_was_not_logged_or_not_lost_has_none(tmp_path):
    history = [{"return_mean": 1.0, "kl": 0.1, **dict.fromkeys(LOSSES, 0.0)}] * 3
    training_picture(history, tmp_path / "training.png")
    assert size(tmp_path / "training.png") == (2, 1)
    training_picture([*history, {"failures": 1.0}], tmp_path / "training.png")
    assert size(tmp_path / "training.png") == (3, 1)
    training_picture([], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_values_that_are_not_finite_are_gaps(tmp_path):
    history = [{**FULL, **dict.fromkeys(("kl", "value_loss", "return_mean"), float(x))} for x in ("1", "nan", "inf")]
    training_picture(history, tmp_path / "training.png")
    assert (tmp_path / "training.png").exists()
    training_picture([dict.fromkeys(FULL, float("nan"))] * 2, tmp_path / "all.png")
    assert (tmp_path / "all.png").exists()


def test_no_kind_of_action_is_a_second_list():
    assert "graft" not in KINDS
    assert {"wait", "prune", "heads"} <= set(KINDS)
