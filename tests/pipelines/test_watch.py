"""`esper watch`: the network at each point of a run is the run's own, and what is drawn is a picture that moves."""

import json

import pytest
from PIL import Image

from esper.pipelines import train, watch
from esper.pipelines.reports.growth_picture import layers_over
from tests.workers.growing_run import begun, finish


@pytest.mark.parametrize("seed", [0, 1])
def test_the_layers_drawn_are_those_that_the_run_had(small_spec, data, seed):
    run = begun(small_spec, data, seed=seed)
    shapes = [run.shape.layers_as_json()]
    there, finish_one = run.step, shapes.append

    def step(action):
        transition = there(action)
        finish_one(run.shape.layers_as_json())
        return transition

    run.step = step
    summary = finish(run)
    changes = sorted((*summary["grafts"], *summary["prunes"]), key=lambda change: change["decision"])
    assert summary["grafts"]
    assert layers_over(small_spec, changes, summary["rollbacks"], len(summary["val_curve"])) == shapes


def test_a_run_under_way_and_an_ended_one_are_drawn(tiny, tmp_path, capfd):
    (plan := tmp_path / "plan.json").write_text(
        json.dumps([{"at": 0.2, "blueprint": "ffn"}, {"at": 0.5, "blueprint": "block"}])
    )
    out = tmp_path / "run"
    assert train.main(["schedule", "--schedule", str(plan), *tiny, "--out", str(out)]) == 0
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


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ([], "holds no run that has come to a decision: name an output folder of `esper train`."),
        (["--gif", "--out", "a.png"], "an animation is a GIF, and a.png is not called so"),
    ],
)
def test_what_cannot_be_drawn_is_refused(tiny, tmp_path, capfd, flags, sentence):
    out = tmp_path / "run"
    if flags:
        assert train.main([*tiny, "--out", str(out)]) == 0
    assert watch.main([str(out), *flags]) == 2
    assert sentence in capfd.readouterr().err
