"""ControllerNet: set properties, the mask, the prior, and no size built in."""

from typing import cast

import numpy as np
import pytest
import torch

from esper.platform.telemetry import CANDIDATE, GLOBALS, HIDDEN, SITE
from esper.policies.simic.net import ILLEGAL, WAIT_PRIOR, ControllerNet, entropy
from tests.pipelines.helpers import made_net


def inputs(b: int, s: int, a: int, *, sites: int | None = None, legal: int | None = None, seed: int = 0):
    """Random telemetry: `sites` present of S, WAIT in row 0 and `legal` other rows legal of A."""
    random = torch.Generator().manual_seed(seed)
    rows = torch.randn(b, s, len(SITE), generator=random)
    rows[..., SITE.index("present")] = 1
    rows[:, s if sites is None else sites :] = 0
    candidates = torch.randn(b, a, len(CANDIDATE), generator=random)
    candidates[..., CANDIDATE.index("is_wait")] = 0
    candidates[:, 0, CANDIDATE.index("is_wait")] = 1
    mask = torch.zeros(b, a)
    mask[:, : 1 + (a - 1 if legal is None else legal)] = 1
    states = torch.randn(b, len(GLOBALS), generator=random)
    return {"globals": states, "sites": rows, "candidates": candidates, "mask": mask}


@pytest.fixture
def net() -> ControllerNet:
    return made_net(hidden=32)


def test_order_and_padding_change_nothing_but_the_order_of_the_logits(net: ControllerNet):
    x, order, pad = inputs(2, 4, 6, legal=3), torch.tensor([3, 0, 5, 1, 4, 2]), torch.nn.functional.pad
    y = x | {"sites": pad(x["sites"][:, [2, 0, 3, 1]], (0, 0, 0, 96)), "mask": pad(x["mask"][:, order], (0, 194))}
    y["candidates"] = pad(x["candidates"][:, order], (0, 0, 0, 194))
    torch.testing.assert_close(net.logits(y)[:, :6], net.logits(x)[:, order])
    assert (net.logits(y)[:, 6:] == ILLEGAL).all()
    torch.testing.assert_close(net.value(y), net.value(x))


def test_what_is_hidden_changes_nothing(net: ControllerNet):
    x = inputs(2, 4, 6, legal=3)
    y = {name: array.clone() for name, array in x.items()}
    for array, columns in (("globals", GLOBALS), ("sites", SITE), ("candidates", CANDIDATE)):
        hidden = [i for i, column in enumerate(columns) if column.removeprefix("site_") in HIDDEN]
        assert len(hidden) == (4 if array == "globals" else 5)
        y[array][..., hidden] += 3
    for changed, same in zip(net(y), net(x), strict=True):
        assert torch.equal(changed, same)


def test_no_sites_and_no_grafts_are_fine(net: ControllerNet):
    logits, values = net(inputs(2, 4, 6, sites=0, legal=0))
    assert torch.isfinite(values).all()
    (entropy(logits).sum() + logits.log_softmax(-1)[:, 1].sum() + values.sum()).backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)
    np.testing.assert_array_equal(logits.softmax(-1).detach().numpy(), np.eye(6)[[0, 0]])


def test_draws_follow_the_probabilities_and_masked_rows_are_never_drawn(net: ControllerNet):
    x = inputs(1, 4, 30, legal=5)
    with torch.no_grad():
        cast(torch.nn.Linear, net.score[-1]).weight.mul_(0.1)  # so that every legal row has its chance
        wanted = net.logits(x)[0].softmax(-1).numpy()
    uniform = np.array([*((np.arange(20000) + 0.5) / 20000), 0.0, np.nextafter(1, 0)])
    many = {name: array.expand(len(uniform), *array.shape[1:]).numpy() for name, array in x.items()}
    actions, _, log_p, _ = net.choose(many, uniform)
    np.testing.assert_allclose(np.bincount(actions, minlength=30) / 20000, wanted, atol=1e-3)
    assert set(actions) == set(range(6))
    np.testing.assert_allclose(np.exp(log_p), wanted[actions], rtol=1e-4)
    few = net.choose({name: array[:99] for name, array in many.items()}, uniform[:99])[0]
    assert few.tolist() == actions[:99].tolist()


@pytest.mark.parametrize("legal", [1, 3, 40])
def test_wait_starts_at_its_prior(legal: int):
    torch.manual_seed(0)
    chance = ControllerNet(64).logits(inputs(50, 4, 41, legal=legal)).softmax(-1)[:, 0]
    np.testing.assert_allclose(chance.detach().numpy(), WAIT_PRIOR, atol=0.02)
