"""From runs in folders to laws in a file, and an arm that plays by them."""

import json

import pytest

from esper.pipelines import policy, train
from esper.platform.law_file import FittedLaws
from tests.pipelines.helpers import sets, summary_of


@pytest.fixture
def runs(tiny, tmp_path):
    """A folder of ended runs: three static sizes, and one that grew."""
    for layers in (1, 2, 3):
        more = sets(f"host.n_layer={layers}", "budget.cooldowns=[0.5]")
        assert train.main(["static", *tiny, "--out", str(tmp_path / "runs" / f"s{layers}"), *more]) == 0
    assert train.main(["width", *tiny, "--out", str(tmp_path / "runs" / "width"), "--seed", "1"]) == 0
    return tmp_path / "runs"


def test_laws_are_fitted_to_runs_and_played_by(tiny, runs, tmp_path, capfd, refused):
    path, out = tmp_path / "laws.json", tmp_path / "out"
    assert policy.main(["fit", str(runs), "--out", str(path)]) == 0
    told, laws = capfd.readouterr().err, FittedLaws.read(path)
    assert (laws.preset, laws.tokenizer, laws.runs, laws.grown, laws.losses) == ("tiny", "char", 4, 1, 7)
    assert laws.held_out is not None
    assert 0 < laws.held_out < 1
    assert f"{laws.residual:.4f} nats (rms) over 7 annealed losses" in told
    assert f"{laws.held_out:.4f} over growing runs" in told

    assert train.main(["planner", *tiny, "--laws", str(path), "--out", str(out), "--seed", "3"]) == 0
    assert "notice" not in capfd.readouterr().err
    grafts = summary_of(out)["grafts"]
    assert all("expected to end at" in graft["reason"] for graft in grafts)
    (out / "summary.json").unlink()  # as if killed before it was written
    assert train.main(["--resume", str(out)]) == 0
    assert summary_of(out)["grafts"] == grafts

    path.write_text(json.dumps(json.loads(path.read_text()) | {"text": "another"}))
    more = ["--laws", str(path), "--out", str(tmp_path / "other"), *sets("host.n_head=4")]
    assert train.main(["planner", *tiny, *more]) == 0
    assert "was fitted to runs that differ from these in host.n_head, the text" in capfd.readouterr().err

    refused(policy.main, ["fit", runs / "width", "--out", tmp_path / "w"], "laws are fitted to 3 sizes or more")
    (runs / "s1" / "spec.json").write_text((runs / "s1" / "spec.json").read_text().replace('"tiny"', '"tinier"'))
    refused(policy.main, ["fit", runs, "--out", tmp_path / "w"], "are of several: tinier, tiny: name others")
    assert not (tmp_path / "w").exists()
