"""SimicEnvRunner: what stock PPO takes for its (only, local) EnvRunner. `sample()` does nothing but drain a queue.

PPO samples and updates in turns in one thread. A runner that served workers inside `sample()` would stall them during
every update; here the dispatcher serves them all the time, and `sample()` takes what has ended meanwhile. RLlib's
`env/external/env_runner_server_for_external_inference.py` shows what a runner owes.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray.rllib.core import COMPONENT_RL_MODULE, DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.env import INPUT_ENV_SPACES
from ray.rllib.env.env_runner import EnvRunner
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.utils.checkpoints import Checkpointable
from ray.rllib.utils.metrics import (
    EPISODE_LEN_MEAN,
    EPISODE_RETURN_MAX,
    EPISODE_RETURN_MEAN,
    EPISODE_RETURN_MIN,
    WEIGHTS_SEQ_NO,
)

from esper.platform.contracts import Instance
from esper.platform.memory import give_back
from esper.platform.telemetry import CANDIDATE, GROWTH_KINDS, OPERATIONS, TelemetrySpace
from esper.policies.simic.baseline import Baseline, places
from esper.policies.simic.desk import Deadlines
from esper.policies.simic.dispatcher import Dispatcher
from esper.policies.simic.fleet import Fleet
from esper.policies.simic.journal import Journal
from esper.policies.simic.net import ControllerNet, entropy
from esper.policies.simic.view import WorkerView

NEXT_EPISODE = "next_episode"
BASELINE = "baseline"
LEARNED = "learned"  # episodes whose files in the journal may go
COUNTS, DROPPED = "counts", "dropped"  # the dispatcher's
SIMIC = "simic"  # our metrics' group in the result's `env_runners`
AHEAD = 2  # iterations of decisions that may wait for the learner


@dataclass(frozen=True)
class Source:
    """Where episodes come from. It belongs to this process: copies are itself, and a pickled one is empty.

    RLlib deep-copies its config and pickles it into the object store and into checkpoints; a fleet holds handles and
    locks, and a checkpoint has no use for it (`restore_algorithm` is given it anew).

    Attributes:
        space: what telemetry looks like.
        fleet: the workers.
        seed: of episodes and action noise.
        instances: episode number → instance.
        deadlines: how long orders may take.
        journal: folder that keeps the episodes.
        check: called while the learner waits for episodes; what it raises ends the waiting.
    """

    space: TelemetrySpace
    fleet: Fleet | None = None
    seed: int = 0
    instances: Callable[[int], Instance | None] | None = None
    deadlines: Deadlines | None = None
    journal: Path | None = None
    check: Callable[[], None] | None = None

    def __deepcopy__(self, memo: Any) -> "Source":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Source, (self.space,)


class SimicEnvRunner(EnvRunner, Checkpointable):
    """Whole episodes from a fleet, chosen by the learner's latest weights. `env_config["source"]` is a Source."""

    def __init__(self, *, config: Any, **kwargs: Any) -> None:
        super().__init__(config=config, **kwargs)
        self._source: Source = self.config.env_config["source"]
        self._hidden: int = self.config.model_config["hidden"]
        self._weights: dict[str, Any] = {}
        self._weights_seq_no = 0
        self._next_episode = 0
        self._dispatcher: Dispatcher | None = None
        self._journal = Journal(self._source.journal) if self._source.journal is not None else None
        self._baseline = Baseline()
        self._sampled: list[tuple[SingleAgentEpisode, int]] = []  # last, with their lengths
        self._before: tuple[dict[str, int], list[int]] = ({}, [])  # counts and dropped episodes of earlier processes
        self._learned: list[int] = []  # numbers of episodes that no checkpoint of ours has learned from yet

    # -- EnvRunner -----------------------------------------------------------------------------------------------

    def sample(self, **kwargs: Any) -> list[SingleAgentEpisode]:
        """Whole episodes of at least `train_batch_size` decisions, numpy'ised, in the order in which they ended.

        Their rewards are the shaped ones (`baseline.py`); what is logged is true.
        """
        self._sampled = []
        give_back()
        episodes = self._started().collect(self.config.total_train_batch_size, self._source.check)
        self._sampled = [(episode, len(episode)) for episode in episodes]  # PPO's connector appends a row to each
        self._learned += [int(episode.id_) for episode in episodes]
        instances = [self._instance(episode) for episode in episodes]
        states = np.concatenate([_states(episode)[:-1] for episode in episodes])
        spots = [spot for e, instance in zip(episodes, instances, strict=True) for spot in places(instance, len(e))]
        self._log(episodes, self._baseline.potential(states, spots))
        self._baseline.update(states, _to_come(episodes), spots)
        for episode, instance in zip(episodes, instances, strict=True):
            shaped = self._baseline.shaped(episode.get_rewards(), _states(episode), episode.is_terminated, instance)
            episode.rewards.data = shaped  # `set_rewards` would check each against a space, with a warning each
        return episodes

    def get_metrics(self) -> Any:
        """Metrics of what was sampled since the last call."""
        return self.metrics.reduce()

    def get_spaces(self) -> dict[str, Any]:
        """The environment's and the module's: the same, there are no connectors between."""
        spaces = (self.config.observation_space, self.config.action_space)
        return {INPUT_ENV_SPACES: spaces, DEFAULT_MODULE_ID: spaces}

    def assert_healthy(self) -> None:
        """It has a way to episodes."""
        assert self._source.fleet is not None

    def stop(self) -> None:
        """End the fleet; a journal keeps the episodes under way."""
        if self._dispatcher is not None:
            self._dispatcher.stop()
        elif self._source.fleet is not None:
            self._source.fleet.close()

    # -- What the pipeline asks ----------------------------------------------------------------------------------

    def update_metrics(self) -> dict[str, float]:
        """What the last update did to the policy, over all decisions it learned from, of which A is the mean of

        - `clip_fraction`: p_new/p_old of the action is outside 1 ± clip;
        - `kl`: Σ p_old ln(p_old/p_new), nats.
        """
        logits = [e.get_extra_model_outputs(Columns.ACTION_DIST_INPUTS)[:n] for e, n in self._sampled]
        before = torch.from_numpy(np.concatenate(logits)).log_softmax(dim=-1)
        net = ControllerNet(self._hidden)
        net.load_state_dict(self._net_weights())
        seen = [episode.get_observations(slice(0, n)) for episode, n in self._sampled]
        rows = {name: torch.from_numpy(np.concatenate([each[name] for each in seen])) for name in seen[0]}
        with torch.no_grad():
            after = net.logits(rows).log_softmax(dim=-1)
        taken = np.concatenate([episode.get_actions()[:n] for episode, n in self._sampled])
        chosen = torch.from_numpy(taken).unsqueeze(-1)
        ratio = (after - before).gather(-1, chosen).exp()
        kl = (before.exp() * (before - after)).sum(dim=-1)
        clip = float(self.config.clip_param)  # pyright: ignore[reportAttributeAccessIssue]  (PPO's)
        return {"clip_fraction": float(((ratio - 1).abs() > clip).float().mean()), "kl": float(kl.mean())}

    def checkpointed(self) -> None:
        """A checkpoint with this runner's state is whole: episodes that it has learned from need no keeping."""
        if self._journal is not None:
            self._journal.remove(self._learned)
        self._learned = []

    def workers(self) -> list[WorkerView]:
        """A line a worker; from any thread."""
        return self._dispatcher.workers() if self._dispatcher is not None else []

    def in_flight(self) -> list[int]:
        """Numbers of the episodes that have begun and were not learned from."""
        return self._dispatcher.in_flight() if self._dispatcher is not None else []

    def dropped(self) -> list[int]:
        """Numbers of the episodes that were given up, in earlier processes too."""
        return [*self._before[1], *(self._dispatcher.dropped if self._dispatcher is not None else ())]

    def counts(self) -> dict[str, int]:
        """`Dispatcher.counts`, with those of earlier processes."""
        now = self._dispatcher.counts if self._dispatcher is not None else {}
        return {name: self._before[0].get(name, 0) + now.get(name, 0) for name in {**self._before[0], **now}}

    # -- Checkpointable ------------------------------------------------------------------------------------------

    def get_ctor_args_and_kwargs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What it was made of."""
        return (), {"config": self.config}

    def get_checkpointable_components(self) -> list[tuple[str, Checkpointable]]:
        """None: the learner keeps the weights."""
        return []

    def get_state(
        self,
        components: str | Collection[str] | None = None,
        *,
        not_components: str | Collection[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Numbers of the weights, of the next episode, and of those learned from; episodes lie in the journal."""
        if self._dispatcher is not None:
            self._next_episode = self._dispatcher.next_episode
        state: dict[str, Any] = {
            WEIGHTS_SEQ_NO: self._weights_seq_no,
            NEXT_EPISODE: self._next_episode,
            BASELINE: self._baseline.state(),
            LEARNED: list(self._learned),
            COUNTS: self.counts(),
            DROPPED: self.dropped(),
        }
        if self._check_component(COMPONENT_RL_MODULE, components, not_components):
            state[COMPONENT_RL_MODULE] = self._weights
        return state

    def set_state(self, state: Any) -> None:
        """Take weights that are newer (or have no number yet), and the number of the next episode."""
        if isinstance(state, ray.ObjectRef):
            state = ray.get(state)
        if NEXT_EPISODE in state:
            self._next_episode = state[NEXT_EPISODE]
            self._baseline.load(state[BASELINE])
            if self._journal is not None:
                self._journal.remove(state[LEARNED])
            self._before = (state[COUNTS], state[DROPPED])
        if COMPONENT_RL_MODULE not in state:
            return
        number = state.get(WEIGHTS_SEQ_NO, 0)
        if 0 < number <= self._weights_seq_no:
            return
        weights = state[COMPONENT_RL_MODULE]
        if isinstance(weights, ray.ObjectRef):
            weights = ray.get(weights)
        self._weights = dict(weights.get(DEFAULT_MODULE_ID, weights))
        self._weights_seq_no = number
        if self._dispatcher is not None:
            self._dispatcher.set_weights(self._net_weights(), number)

    # -- Helpers -------------------------------------------------------------------------------------------------

    def _instance(self, episode: SingleAgentEpisode) -> str | None:
        """What names an episode's instance to the baseline; None where all play the spec's own."""
        instance = self._source.instances(int(episode.id_)) if self._source.instances is not None else None
        return None if instance is None else instance.model_dump_json()

    def _started(self) -> Dispatcher:
        """The dispatcher, made at the first sample: a resumed training has its weights and numbers by then."""
        if self._dispatcher is None:
            assert self._source.fleet is not None, "a Source from a checkpoint has no fleet"
            self._dispatcher = Dispatcher(
                self._source.fleet,
                ControllerNet(self._hidden),
                self._source.space,
                seed=self._source.seed,
                ahead=AHEAD * self.config.total_train_batch_size,
                first_episode=self._next_episode,
                instances=self._source.instances,
                deadlines=self._source.deadlines,
                journal=self._journal,
            )
            self._dispatcher.set_weights(self._net_weights(), self._weights_seq_no)
        return self._dispatcher

    def _net_weights(self) -> dict[str, torch.Tensor]:
        """The module's weights as the network's, copied: the learner goes on changing its own."""
        return {name.removeprefix("net."): torch.tensor(np.array(value)) for name, value in self._weights.items()}

    def _log(self, episodes: list[SingleAgentEpisode], potential: np.ndarray) -> None:
        """Each value is that of one sample (window 1), so that a point of a curve belongs to one iteration.

        Args:
            episodes: the sample.
            potential: Φ at each decision, as it was before the sample was seen.
        """
        decisions = sum(map(len, episodes))
        SingleAgentEnvRunner._increase_sampled_metrics(self, decisions, len(episodes))  # type: ignore[arg-type]
        returns = [episode.get_return() for episode in episodes]
        values = {
            EPISODE_RETURN_MEAN: np.mean(returns),
            EPISODE_RETURN_MIN: np.min(returns),
            EPISODE_RETURN_MAX: np.max(returns),
            EPISODE_LEN_MEAN: decisions / len(episodes),
        }
        for key, value in values.items():
            self.metrics.log_value(key, float(value), window=1)
        for key, value in self._own(episodes, potential).items():
            self.metrics.log_value((SIMIC, key), float(value), window=1)

    def _own(self, episodes: list[SingleAgentEpisode], potential: np.ndarray) -> dict[str, float]:
        assert self._dispatcher is not None
        # Not below 0: a resumed training may learn from what was chosen by weights after its checkpoint's.
        lag = np.maximum(0, self._weights_seq_no - _stacked(episodes, WEIGHTS_SEQ_NO))
        own = {
            "episodes": len(episodes),
            "decisions": sum(map(len, episodes)),
            "explained_variance": self._explained_variance(episodes, potential),
            "entropy": float(entropy(torch.from_numpy(_stacked(episodes, Columns.ACTION_DIST_INPUTS))).mean()),
            "lag_mean": lag.mean(),
            "lag_max": lag.max(),
            **action_shares(episodes),
            **self.counts(),
        }
        busy = self._dispatcher.busy_fraction()
        if busy is not None:
            infos = [info for episode in episodes for info in episode.get_infos() if "waited" in info]
            waited, worked = (sum(info[key] for info in infos) for key in ("waited", "worked"))
            own |= {"busy": busy, "waiting": waited / max(1e-9, waited + worked)}
        spent = [sum(info.get("worked", 0.0) for info in episode.get_infos()) for episode in episodes]
        own |= {"episode_seconds": np.mean(spent), "episode_seconds_max": np.max(spent)}
        losses = [episode.get_infos(-1).get("val_loss") for episode in episodes]
        known = [loss for loss in losses if loss is not None]
        if known:
            own["val_loss"] = np.mean(known)
        return own

    def _explained_variance(self, episodes: list[SingleAgentEpisode], potential: np.ndarray) -> float:
        """1 − Var[G − V] / Var[G | k], at least −1: G the rewards still to come at decision k, V what was said of them.

        Stricter than RLlib's `vf_explained_var`: of all decisions, before the update on them, and against what is
        left when the mean of each decision is known. Most of the plain variance is the fall of the loss itself.
        """
        to_come = _to_come(episodes)
        said = potential + self._baseline.scale * _stacked(episodes, Columns.VF_PREDS)
        decision = np.concatenate([np.arange(len(episode)) for episode in episodes])
        means = np.bincount(decision, to_come) / np.bincount(decision)
        variance = ((to_come - means[decision]) ** 2).mean()
        return float(max(-1.0, 1 - (to_come - said).var() / variance)) if variance > 0 else 0.0


def action_shares(episodes: list[SingleAgentEpisode]) -> dict[str, float]:
    """Fraction of the decisions by operation, and by what a graft adds: `wait`, `graft`, `prune`, `heads` …"""
    chosen = np.concatenate(
        [e.get_observations(slice(0, len(e)))["candidates"][np.arange(len(e)), e.get_actions()] for e in episodes]
    )
    grafts = chosen[:, CANDIDATE.index("is_graft")]
    shares = {name: chosen[:, CANDIDATE.index(f"is_{name}")].mean() for name in OPERATIONS}
    return shares | {kind: (grafts * chosen[:, CANDIDATE.index(f"adds_{kind}")]).mean() for kind in GROWTH_KINDS}


def _states(episode: SingleAgentEpisode) -> np.ndarray:
    """Globals, float32 (K + 1, G)."""
    return episode.get_observations()["globals"]


def _to_come(episodes: list[SingleAgentEpisode]) -> np.ndarray:
    """True rewards still to come at each decision, in nats."""
    return np.concatenate([np.cumsum(episode.get_rewards()[::-1])[::-1] for episode in episodes])


def _stacked(episodes: list[SingleAgentEpisode], column: str) -> np.ndarray:
    return np.concatenate([episode.get_extra_model_outputs(column) for episode in episodes])
