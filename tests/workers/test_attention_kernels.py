"""Attention: every kernel computes the same function, and one that cannot run here is refused in a sentence."""

import sys
import types
from typing import get_args

import pytest
import torch
from torch import Tensor

from esper.platform.errors import UserError
from esper.platform.host_spec import HostSpec
from esper.platform.spec import RunSpec
from esper.workers.tolaria.model.transformer import KERNELS, kernel, sdpa


def random_qkv(B: int, T: int, H: int, D: int, **options) -> Tensor:
    """q, k and v in one, (B, T, H, 3, D), as the host has them."""
    return torch.randn(B, T, H, 3, D, generator=torch.Generator().manual_seed(0)).to(**options)


def with_gradient(attend, qkv: Tensor, **options) -> tuple[Tensor, Tensor]:
    """What `attend` returns for views of qkv, (B, T, H, D), and the gradient of qkv for some gradient of that."""
    qkv = qkv.detach().clone().requires_grad_()
    y = attend(*qkv.unbind(3), **options)
    y.backward(qkv.detach()[:, :, :, 2].flip(1))
    assert qkv.grad is not None
    return y.detach(), qkv.grad


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("shape", [(2, 256, 4, 64), (3, 77, 2, 32), (1, 130, 3, 20)])
def test_flash_is_sdpa_in_bfloat16(shape):
    """Within 0.02 + 2 % of torch's in float32 (rounding takes half), and twice that of torch's in bfloat16."""
    pytest.importorskip("flash_attn")
    qkv = random_qkv(*shape, dtype=torch.bfloat16, device="cuda")
    found = with_gradient(kernel("flash"), qkv, dropout=0.0)
    assert found[0].shape == shape
    torch.testing.assert_close(found, with_gradient(sdpa, qkv, dropout=0.0), rtol=4e-2, atol=4e-2)
    exact = with_gradient(sdpa, qkv.float(), dropout=0.0)
    torch.testing.assert_close(tuple(x.float() for x in found), exact, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("installed", "sentence"),
    [
        (False, r"flash-attn cannot be imported .*: install it with pip install .*\[flash-attn\]"),
        (True, r"no CUDA GPU .*: run on one, or use --set host\.attention=sdpa\.$"),
    ],
)
def test_where_flash_cannot_run_is_one_sentence(monkeypatch, installed, sentence):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn") if installed else None)
    with pytest.raises(UserError, match=sentence):
        kernel("flash")


@pytest.mark.parametrize("settings", [{"dtype": "float32"}, {"device": "cpu"}, {"host": {"n_embd": 1028}}])
def test_a_spec_that_flash_cannot_run_is_refused(settings):
    host = {"attention": "flash", **settings.get("host", {})}
    with pytest.raises(UserError, match="needs dtype = bfloat16, a CUDA GPU and heads of at most 256"):
        RunSpec.checked({"dtype": "bfloat16", **settings, "host": host}, "the spec")
    assert RunSpec.checked({"dtype": "bfloat16", "host": {"attention": "flash"}}, "the spec").host.attention == "flash"
    assert set(get_args(HostSpec.model_fields["attention"].annotation)) == set(KERNELS)
