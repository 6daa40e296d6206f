"""What hosts of a stack of layers share, whatever a layer is: their shape's bookkeeping, and parts put in and out.

A layer is named `h<uid>` for good, and no other gets its uid later; a part inside it is `h<uid>.<name>`.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from esper.platform.frozen import Frozen
from esper.platform.host_spec import BlockSpec, LayerSpec

Pairs = list[tuple[nn.Parameter, nn.Parameter]]  # (new parameter, sibling whose optimizer settings it takes)


class Layout(Frozen):
    """The structure of a host's tree of modules and parameters."""

    layers: tuple[LayerSpec | BlockSpec, ...]
    next_uid: int  # of the next new layer


class LayeredShape(ABC):
    """A shape whose `layers` have uids; a frozen dataclass."""

    born: Any  # the next new layer
    layers: tuple[Any, ...]

    def depth(self) -> int:
        return len(self.layers)

    def attention_parameters(self) -> int:
        return 0

    def experts(self) -> int:
        return 0

    def expert_parameters(self) -> int:
        return 0

    def without(self, name: str) -> Self:
        """A copy without a layer `h<uid>`, or without a part inside one."""
        layer, part = self.layer(name), name.partition(".")[2]
        return self._put(layer, layer.without(part)) if part else self._put(layer)

    @abstractmethod
    def with_layer(self, site_id: str) -> Self:
        """A copy with the born layer put in at a stream site."""

    def parts(self) -> list[str]:
        own = ((f"h{layer.uid}", layer.parts) for layer in self.layers)
        return [part for name, inside in own for part in (name, *(f"{name}.{each}" for each in inside))]

    def part_after(self, other: "LayeredShape") -> str:
        """The name of the one part that this shape has and `other` lacks."""
        return next(part for part in self.parts() if part not in other.parts())

    def deepened(self, n_layer: int) -> Self:
        """A copy with layers appended up to `n_layer`: the shape with the most sites a run may reach."""
        shape = self
        while shape.depth() < n_layer:
            shape = shape.with_layer(f"h{shape.layers[-1].uid}.stream")
        return shape

    def layers_as_json(self) -> list[dict[str, Any]]:
        return [layer.model_dump(mode="json") for layer in self.layers]

    def layer(self, place: str) -> Any:
        return next(layer for layer in self.layers if f"h{layer.uid}" == place.partition(".")[0])

    def _inserted(self, position: int, **own: Any) -> Self:
        new, born = self.born.model_copy(update=own), self.born.model_copy(update={"uid": self.born.uid + 1})
        layers = (*self.layers[:position], new, *self.layers[position:])
        return replace(self, born=born, layers=layers)  # pyright: ignore[reportArgumentType, reportCallIssue]

    def _with(self, place: str, **changes: Any) -> Self:
        layer = self.layer(place)
        return self._put(layer, layer.model_copy(update=changes))

    def _put(self, old: Any, *new: Any) -> Self:
        layers = tuple(each for layer in self.layers for each in (new if layer is old else (layer,)))
        return replace(self, layers=layers)  # pyright: ignore[reportArgumentType, reportCallIssue]


class LayeredHost(nn.Module):
    """A host whose layers are the modules of `h`, each with `uid`, `shape()`, `outgoing()` and `inside`, its parts."""

    Shape: ClassVar[type[Any]]
    OUTPUTS: ClassVar[str]  # name of a parameter with a row per output

    h: nn.ModuleList
    spec: Any
    _shape: Any  # its layers are those at birth

    @property
    def shape(self) -> Any:
        """What the host is now, read off its tensors."""
        return replace(self._shape, layers=tuple(block.shape() for block in self.blocks()))

    def blocks(self) -> Iterator[Any]:
        return iter(self.h)

    def part(self, name: str) -> Any:
        """The module of an inserted part; None when it is gone."""
        layer, _, inner = name.partition(".")
        block = next((block for block in self.blocks() if layer == f"h{block.uid}"), None)
        return dict(block.inside.items()).get(inner) if block is not None and inner else block

    def remove(self, name: str) -> list[nn.Parameter]:
        block, inner = self.at(name)
        if inner:
            return list(block.inside.pop(inner).parameters())
        del self.h[list(self.h).index(block)]
        return list(block.parameters())

    def reserve(self, next_uid: int) -> None:
        """Give no new layer a uid below this."""
        born = self._shape.born
        self._shape = replace(self._shape, born=born.model_copy(update={"uid": max(born.uid, next_uid)}))

    def layout(self) -> Layout:
        """The structure that `rebuilt` needs beside the tensors."""
        return Layout(layers=self.shape.layers, next_uid=self.shape.born.uid)

    @classmethod
    def tied(cls, spec: Any) -> Mapping[str, str]:
        """Name in the state dict → the parameter that it is."""
        return {}

    def own_state(self) -> dict[str, Tensor]:
        tied = self.tied(self.spec)
        return {name: tensor for name, tensor in self.state_dict().items() if name not in tied}

    @classmethod
    def rebuilt(cls, spec: Any, outputs: int, layout: Layout, state: Mapping[str, Tensor]) -> Self:
        """The host of this layout and `own_state`, not copied; an error, before allocating, where they do not fit."""
        layers = layout.layers
        with torch.device("meta"):
            host = cls(spec.model_copy(update={"n_layer": len(layers), "layers": layers}), outputs)
        tied = cls.tied(spec)
        host.load_state_dict({**state, **{name: state[of] for name, of in tied.items()}}, assign=True)
        for name, of in tied.items():
            module, _, key = name.rpartition(".")
            setattr(host.get_submodule(module), key, host.get_parameter(of))
        host.spec, host._shape = spec, cls.Shape.of(spec, outputs)
        host.reserve(layout.next_uid)
        return host

    def at(self, place: str) -> tuple[Any, str]:
        """The block of a site or part, and what the name says beside."""
        name, _, rest = place.partition(".")
        return next(block for block in self.blocks() if name == f"h{block.uid}"), rest

    def _put_in(self, name: str, shape: Any, position: int, new: nn.Module) -> tuple[str, Pairs]:
        """A new layer at `position`: siblings are the parameters of the layer before (else behind) it."""
        siblings = dict(self.h[max(0, position - 1)].named_parameters())
        self.h.insert(position, new.to(next(self.parameters())).train(self.training))
        self.reserve(shape.born.uid)
        return name, [(parameter, siblings[key]) for key, parameter in new.named_parameters()]
