"""Causal attention kernels, called as `attend(q, k, v, *, dropout)`: q, k and v (B, T, H, D) → (B, T, H, D).

B batch, T time, H heads, D head dimension.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from esper.platform.errors import UserError

Attend = Callable[..., Tensor]

INSTALL = 'pip install --no-build-isolation "esper-growth[flash-attn]"'  # its build imports the torch it is built for


def sdpa(q: Tensor, k: Tensor, v: Tensor, *, dropout: float) -> Tensor:
    """torch's `scaled_dot_product_attention`: any device, any float dtype."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # each (B, H, T, D)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True).transpose(1, 2)


def flash(q: Tensor, k: Tensor, v: Tensor, *, dropout: float) -> Tensor:
    """FlashAttention-2 (Dao 2023, 2307.08691): float16 or bfloat16 on a CUDA GPU, D at most 256."""
    from flash_attn import flash_attn_func  # pyright: ignore[reportMissingImports]

    deterministic = torch.are_deterministic_algorithms_enabled()
    return flash_attn_func(q, k, v, dropout_p=dropout, causal=True, deterministic=deterministic)


KERNELS: dict[str, Attend] = {"sdpa": sdpa, "flash": flash}


def kernel(name: str) -> Attend:
    """The kernel of this name; UserError where this machine cannot run it."""
    if name == "flash":
        what, otherwise = "host.attention is 'flash', but", "or use --set host.attention=sdpa."
        try:
            import flash_attn  # noqa: F401  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise UserError(
                f"{what} flash-attn cannot be imported ({error}): install it with {INSTALL}, {otherwise}"
            ) from None
        if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
            raise UserError(f"{what} this machine shows no CUDA GPU of Ampere or newer: run on one, {otherwise}")
    return KERNELS[name]
