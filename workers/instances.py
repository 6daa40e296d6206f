"""Instance sets for training, tuning and testing: fixed, disjoint, as in DACBench (Eimer et al. 2021, 2105.08541)."""

from collections.abc import Callable, Sequence
from typing import Literal

from esper.platform.contracts import Instance
from esper.platform.errors import unknown
from esper.platform.seeding import stream
from esper.platform.spec import RunSpec

SetName = Literal["train", "test", "tuning"]
# A set's number of instances, and the number of its first law.
SETS: dict[str, tuple[int, int]] = {"train": (128, 0), "test": (64, 1_000_000), "tuning": (64, 2_000_000)}
BUDGETS = (0.25, 4.0)  # factors on the spec's budget, log-uniform
# On text a policy has to be right at any budget; a host that starts deeper is rarely of use, a small one can grow.
BUDGETS_ON_TEXT = (0.125, 4.0)
GOLDEN = 0.5 * 5**0.5 - 0.5  # its multiples fill [0, 1) evenly from the start: a few instances hold all budgets
DEEPER = 0.25  # of the instances on text start with a layer more than the spec's
LEAST_TEXT = 0.5  # of the training text, in an instance's slice


def in_turn(name: str, specs: Sequence[RunSpec], *, text: bool) -> Callable[[int], Instance]:
    """An episode's number → its instance: the specs take turns (`Instance.task`), and each goes round its set."""
    sets = [list(instance_set(name, spec, text=text).values()) for spec in specs]

    def instance(number: int) -> Instance:
        each, task = divmod(number, len(sets))
        return sets[task][each % len(sets[task])].model_copy(update={"task": task})

    return instance


def instance_set(name: str, spec: RunSpec, *, text: bool = False) -> dict[int, Instance]:
    """Instances by id, of several budgets, starting layers, and laws or slices of the text; UserError: unknown name."""
    if name not in SETS:
        raise unknown("instance set", name, SETS)
    (size, first_law), (low, high) = SETS[name], BUDGETS_ON_TEXT if text else BUDGETS
    instances = {}
    for i in range(size):
        random = stream(0, f"instances {name}", i)
        quantile = (GOLDEN * (i + 0.5)) % 1 if text else random.random()
        budget = round(float(low * (high / low) ** quantile), 3)
        if text:
            deeper = random.random() < DEEPER and spec.host.n_layer < spec.growth.max_layers
            width = random.uniform(LEAST_TEXT, 1.0)
            begin = random.uniform(0.0, 1.0 - width)
            n_layer = spec.host.n_layer + 1 if deeper else None
            instances[i] = Instance(budget=budget, n_layer=n_layer, data=(begin, begin + width))
        else:
            n_layer = int(random.integers(1, max(2, spec.growth.max_layers // 2 + 1)))
            instances[i] = Instance(budget=budget, n_layer=n_layer, law=first_law + i)
    return instances
