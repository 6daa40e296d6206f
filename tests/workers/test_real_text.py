"""Mechanics on real text: no loss spike after a graft, measured against the ungrown twin on the same batches.

Needs the TinyStories slice beside the project (skips without it). Alone: `pytest tests/workers/test_real_text.py`.
"""

import numpy as np
import pytest

from esper.platform.contracts import GraftAction
from esper.platform.spec import load_spec
from esper.workers.run import GrowthRun
from esper.workers.tolaria.data import TokenData, prepare


@pytest.fixture(scope="module")
def real(tinystories, tmp_path_factory):
    out = tmp_path_factory.mktemp("tinystories") / "char"
    prepare(str(tinystories), "char", out)
    return TokenData.open(out)


def test_no_graft_spikes(real):
    """tinystories-char at its stable rate, 600 steps in: every legal graft, the 100 updates after it."""
    spec = load_spec("tinystories-char", ["budget.axis=steps", "budget.amount=3000", "budget.decisions=5"])
    run = GrowthRun(spec, real)
    telemetry = run.step(GraftAction(0, run.reset(seed=0).sequence)).telemetry
    grafts = [GraftAction(int(i), telemetry.sequence) for i in telemetry.legal() if i]
    assert len(grafts) == 3
    losses = run.twins([GraftAction(0, telemetry.sequence), *grafts], 100)
    assert np.isfinite(losses).all()
    excess = losses[1:] - losses[0]
    assert excess[:, 0] == pytest.approx(0, abs=1e-5)
    worst = {str(telemetry.actions[graft.index]): float(row.max()) for graft, row in zip(grafts, excess, strict=True)}
    assert max(worst.values()) <= 0.01, worst


def test_loss_right_after_a_graft_is_the_loss_before(real):
    spec = load_spec("tinystories-char", ["budget.axis=steps", "budget.amount=100", "budget.decisions=5"])
    run = GrowthRun(spec, real)
    telemetry = run.reset(seed=0)
    while True:
        legal = telemetry.legal()
        transition = run.step(GraftAction(int(legal[-1]), telemetry.sequence))
        telemetry = transition.telemetry
        if transition.terminated:
            break
    assert len(run.grafts) >= 3
    for graft in run.grafts:
        assert graft["val_loss_after"] == pytest.approx(graft["val_loss_before"], abs=1e-3)
