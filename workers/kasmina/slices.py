"""Slices of parameters that are clipped and updated apart from the rest, whatever the optimizer.

Units are rows and columns of the host's own tensors from birth: no concatenation, no groups of their own. A slice's
rate is applied after the optimizer's step, as its way from the old to the new value times a weight.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Slice(NamedTuple):
    """A part of a parameter along one axis, by default all of it."""

    parameter: Any
    axis: int = 0
    start: int = 0
    size: int | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """The same part of a tensor of the parameter's shape: a view."""
        return tensor if self.size is None else tensor.narrow(self.axis, self.start, self.size)


def rest(slices: Iterable[Slice], taken: Iterable[Slice]) -> list[Slice]:
    """What `taken` leaves of `slices`; only whole parameters have others inside them."""
    inside: dict[int, list[Slice]] = {}
    for each in taken:
        inside.setdefault(id(each.parameter), []).append(each)
    left = []
    for each in slices:
        cuts = inside.get(id(each.parameter), [])
        if not cuts or each.size is not None:
            left.append(each)
        elif cuts[0].size is not None:
            axis, begin = cuts[0].axis, 0
            for cut in sorted(cuts, key=lambda cut: cut.start):
                left.append(Slice(each.parameter, axis, begin, cut.start - begin))
                begin = cut.start + (cut.size or 0)
            left.append(Slice(each.parameter, axis, begin, each.parameter.shape[axis] - begin))
    return [each for each in left if each.size != 0]


class Apart:
    """The slices that a step sets apart: groups that are clipped each by itself, and slices that move more slowly.

    It holds views of the parameters: make it anew once one of them is replaced, and after a copy.
    """

    def __init__(
        self, groups: Sequence[Sequence[Slice]], slowed: Sequence[tuple[Callable[[], float], Sequence[Slice]]]
    ) -> None:
        self.slowed = slowed  # with what tells their weight
        pieces: dict[int, list[tuple[int, Slice, int]]] = {}  # of each parameter: (start, slice, group)
        for number, group in enumerate(groups):
            for each in group:
                pieces.setdefault(id(each.parameter), []).append((each.start, each, number))
        cuts = [sorted(there, key=lambda piece: piece[0]) for there in pieces.values()]
        self._cuts = [(cut[0][1].parameter, cut[0][1].axis, [each.size for _, each, _ in cut]) for cut in cuts]
        owners = [number for cut in cuts for _, _, number in cut]
        self._members = [[i for i, owner in enumerate(owners) if owner == number] for number in range(len(groups))]
        self._owners = torch.tensor(owners, device=cuts[0][0][1].parameter.device)
        self._views = [each.of(each.parameter.detach()) for _, slices in slowed for each in slices]
        self._before = [view.clone() for view in self._views]

    @torch.no_grad()
    def clip(self, max_norm: float) -> Tensor:
        """Clip each group's gradients, as torch's `clip_grad_norm_` does one; returns the norms, (groups,)."""
        gradients: list[Tensor] = []
        for parameter, axis, sizes in self._cuts:
            if parameter.grad is None:
                gradients += [self._owners.new_zeros((), dtype=parameter.dtype) for _ in sizes]
            else:
                gradients += [parameter.grad] if sizes[0] is None else parameter.grad.split_with_sizes(sizes, axis)
        squares = torch.stack(torch._foreach_norm(gradients)).square()  # pyright: ignore[reportPrivateImportUsage]
        norms = squares.new_zeros(len(self._members)).index_add_(0, self._owners, squares).sqrt()
        scales = (max_norm / (norms + 1e-6)).clamp(max=1.0)
        known = scales.tolist() if scales.device.type == "cpu" else [None] * len(self._members)
        for members, scale, value in zip(self._members, scales, known, strict=True):
            if value != 1.0:
                torch._foreach_mul_([gradients[i] for i in members], scale)  # pyright: ignore[reportPrivateImportUsage]
        return norms

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer's step, each slowed slice's way in it multiplied by its weight; one inside another by both."""
        if not self._views:
            optimizer.step()
            return
        torch._foreach_copy_(self._before, self._views)  # pyright: ignore[reportPrivateImportUsage]
        optimizer.step()
        views, before = iter(self._views), iter(self._before)
        for weight, slices in self.slowed:  # a GPU works on all tensors of a call at once, and seeds share some
            now, then = list(islice(views, len(slices))), list(islice(before, len(slices)))
            torch._foreach_lerp_(now, then, 1 - weight())  # pyright: ignore[reportPrivateImportUsage]
