"""The fitted clock foretells the steps that it was fitted to."""

import pytest

from esper.workers.calibrate import calibrate


def test_a_clock_is_fitted_to_this_device(tiny_spec, tokens):
    clock, rows = calibrate(tiny_spec, tokens, steps=6)
    shapes = {(row["layers"], row["mlp_width"]) for row in rows}
    assert shapes == {(n, width) for n in (1, 2, 3) for width in (64, 128)}
    for row in rows:
        formula = clock.base_seconds + clock.layer_seconds * row["layers"] + row["flops"] / clock.flops_per_second
        assert row["predicted"] == pytest.approx(formula)
        assert abs(row["error"]) < 3
    assert clock.split_factor >= 1
    assert clock.graft_seconds > 0
    assert clock.fuse_seconds > 0
