"""A linear layer that can grow while it trains.

A graft is a segment with parameters of its own, concatenated in `forward`: one GEMM, separate optimizer state.
Fusing stores the concatenation, so no output bit changes. R output features (rows), K input features (columns).
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper.platform.contracts import Swap

Pairs = list[tuple[nn.Parameter, nn.Parameter]]  # (new parameter, sibling whose optimizer settings it takes)


class GrowableLinear(nn.Module):
    """`y = x Wᵀ + b`, W float (R, K), growing by rows and bias (`axis` 0) or by columns (`axis` 1)."""

    def __init__(self, in_features: int, out_features: int, *, axis: int) -> None:
        super().__init__()
        self.axis = axis
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features))
        self.young = nn.ModuleList()  # weight (and bias) of each segment that is not yet fused, oldest first

    @property
    def in_features(self) -> int:
        return self.weight.shape[1] + self.axis * sum(self.young_sizes())

    @property
    def out_features(self) -> int:
        return self.weight.shape[0] + (1 - self.axis) * sum(self.young_sizes())

    def young_sizes(self) -> list[int]:
        return [segment["weight"].shape[self.axis] for segment in self._segments()]

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., K) → (..., R)."""
        return F.linear(x, *self.joined())

    def joined(self) -> tuple[Tensor, Tensor]:
        """Whole W and b, young segments included."""
        if not (segments := self._segments()):
            return self.weight, self.bias
        weight = torch.cat([self.weight, *(segment["weight"] for segment in segments)], dim=self.axis)
        return weight, torch.cat([self.bias, *(segment["bias"] for segment in segments if "bias" in segment)])

    def tail(self, size: int) -> Tensor:
        """A view of W's last `size` rows or columns: the newest graft."""
        last = [self.weight, *(segment["weight"] for segment in self._segments())][-1]
        return last.narrow(self.axis, last.shape[self.axis] - size, size)

    def add(self, weight: Tensor, bias: Tensor | None = None) -> Pairs:
        """Append a segment: weight (r, K) and bias (r,), or weight (R, k)."""
        values = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        segment = nn.ParameterDict({name: nn.Parameter(value.to(self.weight)) for name, value in values.items()})
        self.young.append(segment)
        return [(new, getattr(self, name)) for name, new in segment.named_parameters()]

    def fuse(self) -> list[Swap]:
        oldest, *others = self._segments()
        self.young = nn.ModuleList(others)
        axes = {"weight": self.axis, "bias": 0}
        return [self._swap(name, axes[name], young) for name, young in oldest.named_parameters()]

    def cut(self, size: int) -> tuple[list[Swap], list[nn.Parameter]]:
        """Drop the last `size` rows or columns: (changed parameters, dropped parameters)."""
        if segments := self._segments():
            assert segments[-1]["weight"].shape[self.axis] == size
            self.young = nn.ModuleList(segments[:-1])
            return [], list(segments[-1].parameters())
        swaps = [self._swap("weight", self.axis, cut=size)]
        return (swaps if self.axis == 1 else [*swaps, self._swap("bias", 0, cut=size)]), []

    def split_off(self, sizes: Iterable[int]) -> None:
        """Turn the last rows or columns into uninitialised young segments, to load a saved state into."""
        self.cut(sum(sizes))
        for size in sizes:
            rows = self.axis == 0
            weight = torch.empty((size, self.in_features) if rows else (self.out_features, size))
            self.add(weight, torch.empty(size) if rows else None)

    def _segments(self) -> list[nn.ParameterDict]:
        return [segment for segment in self.young if isinstance(segment, nn.ParameterDict)]

    @torch.no_grad()
    def _swap(self, name: str, axis: int, young: nn.Parameter | None = None, cut: int = 0) -> Swap:
        old = getattr(self, name)
        value = old.narrow(axis, 0, old.shape[axis] - cut).clone() if young is None else torch.cat([old, young], axis)
        new = nn.Parameter(value, requires_grad=old.requires_grad)
        setattr(self, name, new)
        return Swap(new, old, young, axis)
