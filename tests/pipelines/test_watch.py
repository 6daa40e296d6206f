"""`esper watch`: the network at each point of a run is the run's own, and what is drawn is a picture that moves."""

import pytest
from PIL import Image

from esper.pipelines import train
from esper.pipelines.reports.growth_picture import layers_over
from esper.pipelines.tools import watch
from tests.pipelines.helpers import planned
from tests.workers.growing_run import begun, choose, outcome


@pytest.mark.parametrize("seed", [0, 1])
def test_the_layers_drawn_are_those_that_the_run_had(small_spec, data, seed):
    run = begun(small_spec, data, seed=seed)
    shapes = [run.shape.layers_as_json()]
    while not run.ended:
        run.step(choose(run.telemetry))
        shapes.append(run.shape.layers_as_json())
    summary = outcome(run)
    changes = sorted((*summary["grafts"], *summary["prunes"]), key=lambda change: change["decision"])
    assert summary["grafts"]
    assert layers_over(small_spec, changes, summary["rollbacks"], len(summary["val_curve"])) == shapes


def test_a_run_under_way_and_an_ended_one_are_drawn(tiny, tmp_path, capfd):
    out = tmp_path / "run"
    assert train.main(["schedule", *planned(tmp_path, {0.2: "ffn", 0.5: "block"}), *tiny, "--out", str(out)]) == 0
    assert watch.main([str(out), "--gif"]) == 0
    with Image.open(out / "growth.gif") as frames:
        assert frames.n_frames == 9  # one for each point of the curve
        first = frames.convert("RGB").tobytes()
        frames.seek(frames.n_frames - 1)
        assert frames.convert("RGB").tobytes() != first
    (out / "summary.json").unlink()  # as if it had not ended
    assert watch.main([str(out)]) == 0
    with Image.open(out / "growth.png") as picture:
        assert picture.size[0] > 1000
    assert "in 2 layers, after 8 decisions" in capfd.readouterr().err
