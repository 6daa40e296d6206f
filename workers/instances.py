"""Instance sets for training, tuning and testing: fixed, disjoint, as in DACBench (Eimer et al. 2021, 2105.08541)."""

from typing import Literal

from esper.platform.contracts import Instance
from esper.platform.seeding import stream
from esper.platform.spec import RunSpec

SetName = Literal["train", "test", "tuning"]
SIZES: dict[SetName, int] = {"train": 128, "test": 64, "tuning": 64}
BUDGETS = (0.25, 4.0)  # factors on the spec's budget, log-uniform
LAWS: dict[SetName, int] = {"train": 0, "test": 1_000_000, "tuning": 2_000_000}  # number of a set's first law


def instance_set(name: SetName, spec: RunSpec) -> dict[int, Instance]:
    """Instances by id; budget, starting layers and (for a surrogate) the law vary."""
    instances = {}
    for i in range(SIZES[name]):
        random = stream(0, f"instances {name}", i)
        low, high = BUDGETS
        instances[i] = Instance(
            budget=round(float(low * (high / low) ** random.random()), 3),
            n_layer=int(random.integers(1, max(2, spec.growth.max_layers // 2 + 1))),
            law=LAWS[name] + i,
        )
    return instances
