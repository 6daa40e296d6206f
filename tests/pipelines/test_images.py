"""Commands on images, end to end: what a run on digits leaves and says, and what is no data for it."""

import pytest

from esper.pipelines import prepare, train
from esper.pipelines.tools import sample
from esper.platform.storage import read_json
from tests.pipelines.helpers import planned, sets, summary_of

SMALL = sets("budget.axis=steps", "budget.amount=60", "budget.decisions=6", "growth.min_optimizer_steps=2")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    out = tmp_path_factory.mktemp("digits") / "digits"
    assert prepare.main(["--task", "digits", "--out", str(out)]) == 0
    return out


def test_a_run_on_digits_tells_accuracy_beside_the_loss(digits, store, client, tmp_path, capfd, refused):
    out = tmp_path / "out"
    flags = ["--task", "digits", "--data", str(digits), "--out", str(out), *SMALL]
    assert train.main(["schedule", *flags, *planned(tmp_path, {0.1: "conv_width", 0.3: "conv_block"})]) == 0
    summary, printed = summary_of(out), capfd.readouterr().err
    assert [graft["blueprint"] for graft in summary["grafts"]] == ["conv_width", "conv_block"]
    assert summary["tokens"] == 60 * 32  # an image is one
    assert 0 < summary["accuracy"] == summary["val_curve"][-1]["accuracy"] < 1
    assert f"nats per image (accuracy {summary['accuracy']:.1%})" in printed
    for part in ("ResNet of 1 block", "1,437 training images of 8 × 8 × 1, 10 classes", "images/s", "accuracy"):
        assert part in printed
    history = client().get_metric_history(summary["mlflow"], "accuracy")
    assert [point.value for point in history] == [point["accuracy"] for point in summary["val_curve"][1:]]
    assert "perplexity" not in client().get_run(summary["mlflow"]).data.metrics
    refused(sample.main, [out], "holds a resnet, which takes images and writes no text: name a run on text")


def test_prepared_images_say_how_they_are_used(digits, tmp_path, capfd):
    assert read_json(digits / "summary.json", "summary.json", "") == read_json(digits / "manifest.json", "", "")
    assert prepare.main(["--task", "digits", "--set", "data.size=4", "--out", str(tmp_path / "small")]) == 0
    assert f"use it with --data {tmp_path / 'small'} --set data.size=4" in capfd.readouterr().err


def test_data_of_another_kind_or_size_is_refused(digits, store, tmp_path, refused):
    for line, sentence in (
        (["--preset", "demo", "--data", digits], "holds prepared images, and the preset is for text"),
        (["--task", "digits", "--set", "host.image_size=16"], "are 8 × 8 × 1, and the host takes 16 × 16 × 1"),
    ):
        refused(train.main, ["static", *line, "--out", tmp_path / "out"], sentence)
        assert not (tmp_path / "out").exists()
    line = ["--task", "digits", "--tokenizer", "char", "--out", tmp_path / "out"]
    refused(prepare.main, line, "unknown key in the spec 'data.tokenizer'")
