"""A controller's log outlives its process, what is not finite in it too.

Alone: `pytest tests/pipelines/test_training_log.py`.
"""

import json
import math

from esper.pipelines.controllers.training_log import FILE, TrainingLog, as_json
from esper.pipelines.controllers.training_picture import training_picture


def test_read_again_without_what_no_checkpoint_knows_of(tmp_path):
    log = TrainingLog(tmp_path, 0)
    for iteration, kl in ((1, 0.5), (2, math.nan), (3, math.inf), (4, 0.25)):
        log.add(iteration, {"return_mean": float(iteration), "kl": kl})
    assert [json.loads(line)["kl"] for line in (tmp_path / FILE).read_text().splitlines()] == [0.5, None, None, 0.25]
    with (tmp_path / FILE).open("a") as file:
        file.write('{"iteration": 5, "ti')  # the process died here

    again = TrainingLog(tmp_path, 3)
    assert [line["iteration"] for line in again.lines] == [1, 2, 3]
    assert [line["time"] for line in again.lines] == [line["time"] for line in log.lines[:3]]
    assert [as_json(line) for line in again.lines] == [as_json(line) for line in log.lines[:3]]
    assert all(set(metrics) == {"return_mean", "kl"} for metrics in again.metrics())
    again.add(4, {"return_mean": 4.0, "kl": 0.125})
    assert [json.loads(line)["iteration"] for line in (tmp_path / FILE).read_text().splitlines()] == [1, 2, 3, 4]
    training_picture(again.lines, tmp_path / "training.png")
    assert (tmp_path / "training.png").stat().st_size > 10_000
