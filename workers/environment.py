"""GrowthEnv: an episode as a Gymnasium environment (spaces in `platform/spaces.py`), for any RL library.

    env = gym.make("esper.workers.environment:Esper/GrowthSurrogate-v0", spec="tinystories-char")    # a scaling law
    env = gym.make("esper.workers.environment:Esper/Growth-v0", spec="demo", data="SHARDS")          # GPTs on text
    env = gym.make("esper.workers.environment:Esper/GrowthRecorded-v0", data="RECORDING")            # recorded runs

Instances as in DACBench (Eimer et al. 2021, 2105.08541). The end of the budget is `terminated`; nothing is truncated.
Equal seeds and actions give equal numbers to the bit by the reference clock on the CPU.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from esper.platform.contracts import GraftAction, Instance
from esper.platform.errors import UserError
from esper.platform.spaces import action_space, observation, observation_space
from esper.platform.spec import RunSpec, load_spec
from esper.workers.episode import Episode
from esper.workers.instances import instance_set
from esper.workers.laws.surrogate import SurrogateRun
from esper.workers.recorded import RecordedInstance, RecordedRun
from esper.workers.run import GrowthRun
from esper.workers.tolaria.data import open_data

# By id, or the name of a set of `workers/instances.py`.
Instances = Mapping[int, Instance] | Mapping[int, RecordedInstance] | str
Observation = dict[str, np.ndarray]
SEEDS = 2**32  # episodes draw their seeds below this


class GrowthEnv(gym.Env[Observation, np.int64]):
    """An environment that owns a run.

    Info: `instance_id` and `val_loss` (nats per token); after a step also `action` (text) and `illegal` (the row was
    not legal and was taken as the first that is, which is WAIT but in recordings where nobody waited: for agents
    without masks); at the end the run's `summary`.
    """

    metadata = {"render_modes": []}  # noqa: RUF012  (Gymnasium's own name and form)

    def __init__(self, run: Episode | RecordedRun, instances: Instances) -> None:
        self.run: Any = run
        self.instance_set = dict(instance_set(instances, run.spec) if isinstance(instances, str) else instances)
        self.inst_id: int | None = None  # the current instance's
        self.observation_space = observation_space(run.space)
        self.action_space = action_space(run.space)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start the next instance by id, cyclically, or the one that `options={"instance_id": …}` names.

        A `seed` draws the place in that order and is the episode's own; without it the episode's seed is drawn.
        """
        super().reset(seed=seed)
        ids = sorted(self.instance_set)
        following = next((i for i in ids if self.inst_id is not None and i > self.inst_id), ids[0])
        if seed is not None:
            following = ids[int(self.np_random.integers(len(ids)))]
        wanted = (options or {}).get("instance_id", following)
        if wanted not in self.instance_set:
            raise UserError(f"unknown instance_id {wanted!r}: the set has {len(ids)}, from {ids[0]} to {ids[-1]}.")
        drawn = int(self.np_random.integers(SEEDS))
        self.run.reset(self.instance_set[wanted], drawn if seed is None else seed)
        self.inst_id = wanted
        return observation(self.run.telemetry), self._info()

    def step(self, action: np.int64 | int) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        if not self.action_space.contains(action):
            raise UserError(f"action {action!r} is not in {self.action_space}: choose a row of the candidates.")
        before = self.run.telemetry
        legal = bool(before.mask[action])
        row = int(action) if legal else int(before.legal()[0])
        if isinstance(self.run, RecordedRun):
            self.run.unrecorded += not legal
        transition = self.run.step(GraftAction(row, before.sequence))
        info = self._info() | {"action": str(before.actions[row]), "illegal": not legal}
        if transition.terminated:
            info["summary"] = transition.info["summary"]
        return observation(transition.telemetry), float(transition.reward), bool(transition.terminated), False, info

    def action_masks(self) -> np.ndarray:
        """The legal rows, bool (A,), under sb3-contrib's name."""
        return self.run.telemetry.mask.copy()

    def _info(self) -> dict[str, Any]:
        return {"instance_id": self.inst_id, "val_loss": float(self.run.loss)}


def growth_env(
    spec: RunSpec | str = "demo", data: Path | str | None = None, instances: Instances = "train"
) -> GrowthEnv:
    """`Esper/Growth-v0`: GPTs on the prepared shards in `data`; `spec` may be a preset's name or file."""
    if data is None:
        raise UserError("Esper/Growth-v0 trains on text: give data=FOLDER, prepared shards that `esper prepare` left.")
    spec = load_spec(spec) if isinstance(spec, str) else spec
    return GrowthEnv(GrowthRun(spec, open_data(Path(data))), instances)


def growth_surrogate_env(spec: RunSpec | str = "tinystories-char", instances: Instances = "train") -> GrowthEnv:
    """`Esper/GrowthSurrogate-v0`: a scaling law instead of training, under a millisecond per decision."""
    return GrowthEnv(SurrogateRun(load_spec(spec) if isinstance(spec, str) else spec), instances)


def growth_recorded_env(data: Path | str) -> GrowthEnv:
    """`Esper/GrowthRecorded-v0`: the runs that `esper record` left in `data`, as instances of one seed and budget."""
    run = RecordedRun(Path(data))
    return GrowthEnv(run, run.instances)


MAKERS = {"Growth": growth_env, "GrowthSurrogate": growth_surrogate_env, "GrowthRecorded": growth_recorded_env}
for _name, _maker in MAKERS.items():
    if f"Esper/{_name}-v0" not in gym.registry:
        gym.register(f"Esper/{_name}-v0", entry_point=f"{__name__}:{_maker.__name__}")
