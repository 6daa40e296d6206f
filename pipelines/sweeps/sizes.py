"""The static sizes of a sweep, `2` or `2x96h4` (layers × MLP width, heads); and the specs that runs of them have."""

import re
from collections.abc import Iterable, Sequence
from typing import Any, Self

from esper.platform.errors import UserError
from esper.platform.frozen import Frozen, Heads, Layers, Neurons
from esper.platform.host_spec import Host
from esper.platform.spec import RunSpec
from esper.workers.tolaria.rate import rate, stable_rate

FORM = re.compile(r"(\d+)(?:x(\d+))?(?:h(\d+))?")


class Size(Frozen):
    """Layers that are all alike; None is the preset's."""

    layers: Layers
    width: Neurons | None = None  # of an MLP, or hidden channels of a block in the first stage
    heads: Heads | None = None  # of a layer, each of the preset's dimension

    @classmethod
    def of(cls, text: str) -> Self:
        """Read `2x96h4`. Raises UserError for anything else."""
        if not (found := FORM.fullmatch(text.strip())):
            raise UserError(f"--sizes {text!r} is not a list of sizes: write it as 1,2,2x96,1x256h4, layers x width.")
        return cls.checked(dict(zip(cls.model_fields, found.groups(), strict=True)), f"--sizes {text}")

    def __str__(self) -> str:
        return f"{self.layers}" + f"x{self.width}" * bool(self.width) + f"h{self.heads}" * bool(self.heads)

    def numbers(self, host: Host) -> tuple[int, int, int]:
        return self.layers, self.width or host.own_width, self.heads or host.own_heads

    def born(self, spec: RunSpec, **optimizer: Any) -> RunSpec:
        own = [layer.model_dump(mode="json") for layer in spec.host.alike(*self.numbers(spec.host))]
        return born(spec, own if self.width or self.heads else self.layers, **optimizer)

    def parameters(self, spec: RunSpec) -> int:
        from esper.workers.tolaria.hosts import start_shape  # torch: seconds that `esper sweep --help` does not take

        return start_shape(self.born(spec), vocab_size=1).parameters_count(non_embedding=True)


def parse_sizes(text: str) -> list[Size]:
    """The sizes that `--sizes` names, each once."""
    return list(dict.fromkeys(map(Size.of, text.split(","))))


def born(spec: RunSpec, layers: int | Sequence[dict[str, Any]], **optimizer: Any) -> RunSpec:
    """With so many layers from the start, all alike; or with these (a summary's `shape`)."""
    count, own = (layers, None) if isinstance(layers, int) else (len(layers), layers)
    values = {"host.n_layer": count, "host.layers": own, "growth.max_layers": max(count, spec.growth.max_layers)}
    return spec.overridden({**values, **{f"optimizer.{key}": value for key, value in optimizer.items()}})


def with_rates(spec: RunSpec, rates: Iterable[tuple[Size, float]]) -> RunSpec:
    """With the stable rates of static sizes, which any run has while it has as many parameters."""
    pairs = {size.parameters(spec): rate for size, rate in rates}
    return spec.overridden({"optimizer.rates": sorted(pairs.items())})


def lrpath_spec(spec: RunSpec, size: Size, curve: Iterable[dict[str, float]]) -> RunSpec:
    """A static size under the stable rate that a run had (its summary's `val_curve`), read at its decisions."""
    path = []
    for point in curve:
        fraction = point["budget_fraction"]
        share = rate(spec.optimizer, fraction, 1) / stable_rate(spec.optimizer, 1)  # that warm-up and decay leave
        if share > 0 and fraction >= spec.optimizer.warmup:
            path.append([fraction, point["learning_rate"] / share])
    return size.born(spec, rate_path=path)
