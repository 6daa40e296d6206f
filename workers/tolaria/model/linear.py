"""A linear layer made of segments, so that it can grow while it trains.

The segments of its weight are separate parameters, concatenated in `forward`: there is one GEMM whatever was
grafted, and each segment can have its own optimizer state and learning rate. A layer that was never grown holds one
segment and runs like `torch.nn.Linear`.

R output features (rows), K input features (columns).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Pairs = list[tuple[nn.Parameter, nn.Parameter]]
"""(new parameter, its sibling): the sibling's optimizer settings are the new one's."""


class GrowableLinear(nn.Module):
    """`y = x Wᵀ + b`, W float (R, K) in segments of rows (`axis` 0) or of columns (`axis` 1).

    A layer of row segments has a segment of the bias for each; one of column segments has a single bias.
    """

    def __init__(self, in_features: int, out_features: int, *, axis: int) -> None:
        super().__init__()
        self.axis = axis
        self.weight = nn.ParameterList([nn.Parameter(torch.empty(out_features, in_features))])
        self.bias = nn.ParameterList([nn.Parameter(torch.zeros(out_features))])

    @property
    def split(self) -> bool:
        """Whether there is more than one segment."""
        return len(self.weight) > 1

    @property
    def in_features(self) -> int:
        """K, as it is now."""
        return sum(w.shape[1] for w in self.weight) if self.axis == 1 else self.weight[0].shape[1]

    @property
    def out_features(self) -> int:
        """R, as it is now."""
        return sum(w.shape[0] for w in self.weight) if self.axis == 0 else self.weight[0].shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., K) → (..., R)."""
        return F.linear(x, _joined(self.weight, self.axis), _joined(self.bias, 0))

    def add_rows(self, weight: Tensor, bias: Tensor) -> Pairs:
        """Add output features: weight (r, K), bias (r,)."""
        assert self.axis == 0
        return [self._append(self.weight, weight), self._append(self.bias, bias)]

    def add_columns(self, weight: Tensor) -> Pairs:
        """Add input features: weight (R, k)."""
        assert self.axis == 1
        return [self._append(self.weight, weight)]

    @staticmethod
    def _append(segments: nn.ParameterList, value: Tensor) -> tuple[nn.Parameter, nn.Parameter]:
        first = segments[0]
        new = nn.Parameter(value.to(device=first.device, dtype=first.dtype))
        segments.append(new)
        return new, first


def _joined(segments: nn.ParameterList, axis: int) -> Tensor:
    if len(segments) == 1:
        return segments[0]
    return torch.cat(list(segments), dim=axis)
