"""Instance sets for training, tuning and testing: fixed, disjoint, as in DACBench (Eimer et al. 2021, 2105.08541)."""

from typing import Literal

from esper.platform.contracts import Instance
from esper.platform.errors import unknown
from esper.platform.seeding import stream
from esper.platform.spec import RunSpec

SetName = Literal["train", "test", "tuning"]
# A set's number of instances, and the number of its first law.
SETS: dict[str, tuple[int, int]] = {"train": (128, 0), "test": (64, 1_000_000), "tuning": (64, 2_000_000)}
BUDGETS = (0.25, 4.0)  # factors on the spec's budget, log-uniform


def instance_set(name: str, spec: RunSpec) -> dict[int, Instance]:
    """Instances by id; budget, starting layers and (for a surrogate) the law vary. UserError for an unknown name."""
    if name not in SETS:
        raise unknown("instance set", name, SETS)
    (size, first_law), (low, high) = SETS[name], BUDGETS
    instances = {}
    for i in range(size):
        random = stream(0, f"instances {name}", i)
        instances[i] = Instance(
            budget=round(float(low * (high / low) ** random.random()), 3),
            n_layer=int(random.integers(1, max(2, spec.growth.max_layers // 2 + 1))),
            law=first_law + i,
        )
    return instances
