"""PPO (Schulman et al. 2017, 1707.06347) by RLlib's learners, on a dispatcher's episodes: settings, checkpoints.

A checkpoint is a folder of `policy.safetensors`, which needs no Ray, and `learner.safetensors`, the rest to go on from.
"""

import ctypes
import logging
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.core import COMPONENT_LEARNER, COMPONENT_OPTIMIZER, COMPONENT_RL_MODULE, DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.env.utils.infinite_lookback_buffer import InfiniteLookbackBuffer
from ray.rllib.utils.metrics import WEIGHTS_SEQ_NO
from ray.rllib.utils.metrics.metrics_logger import MetricsLogger
from torch import Tensor

from esper.platform import checkpoint
from esper.platform.contracts import Instance
from esper.platform.errors import UserError
from esper.platform.frozen import Frozen
from esper.platform.seeding import derive
from esper.platform.spaces import action_space, observation_space
from esper.platform.spec import PPOSpec, RunSpec
from esper.platform.telemetry import TelemetrySpace
from esper.policies.simic.baseline import Baseline
from esper.policies.simic.dispatcher import Dispatcher, Progress
from esper.policies.simic.episode import Played
from esper.policies.simic.fleet import Fleet
from esper.policies.simic.learner import ANCHOR, SEED, SimicLearner, SimicModule
from esper.policies.simic.metrics import decided_on, sample_metrics, stacked, update_metrics
from esper.policies.simic.net import ControllerNet
from esper.policies.simic.policy import FILE, SimicPolicy

STATE = "learner.safetensors"  # beside the policy
AHEAD = 2  # iterations of decisions that may wait for the learner
# Metrics, ours → RLlib's, of the last minibatch.
LEARNED = {"kl_coefficient": "curr_kl_coeff", "policy_loss": "policy_loss", "value_loss": "vf_loss"}


class LearnerState(Frozen):
    """What a checkpoint holds beside its tensors."""

    format: Literal["learner-1"] = "learner-1"
    updates: int = Field(ge=0)  # number of the weights
    kl_coefficient: float = Field(ge=0)  # PPO's, adapted so far
    progress: Progress  # of the dispatcher
    baseline: dict[str, Any]  # its JSON values


class PPOTraining:
    """PPO over a fleet, whose workers start meanwhile. Ray must be initialised; end it with `stop()`."""

    def __init__(
        self,
        spec: RunSpec,
        space: TelemetrySpace,
        make_fleet: Callable[[], Fleet],
        *,
        seed: int,  # of the network, episodes, action noise and minibatches
        instances: Callable[[int], Instance | None] | None = None,  # of an episode's number; None: the spec's own
        journal: Path | None = None,  # folder of the episodes that no checkpoint has learned from yet
        check: Callable[[], None] = lambda: None,  # called a few times a second while waiting; its errors pass through
        start: Path | None = None,  # checkpoint to resume; a UserError where it is none, or does not fit the spec
    ) -> None:
        kept = None if start is None else _read(start, spec.ppo.hidden)
        self._clip, self._config = spec.ppo.clip, _config(spec.ppo, space, derive(seed, "rllib") % 2**31)
        self._kl_coefficient = float(self._config.kl_coeff or 0)
        self._check, self._net, self.baseline = check, ControllerNet(spec.ppo.hidden), Baseline()
        self.anchor: ControllerNet | None = None  # that updates are held near to, by `ppo.anchor`
        self.episodes: list[Played] = []  # of the last iteration
        for noisy in ("ray.rllib", "ray.tune", "ray._common.deprecation"):
            logging.getLogger(noisy).setLevel(logging.ERROR)
        torch.set_num_threads(1)  # on busy cores two made an update 8 times slower; also fixes the rounding
        with ExitStack() as undo:
            fleet = make_fleet()
            undo.callback(fleet.close)
            self._learners = self._config.build_learner_group()
            undo.callback(self._learners.shutdown)
            self.dispatcher = Dispatcher(
                fleet,
                ControllerNet(spec.ppo.hidden),
                space,
                seed=seed,
                ahead=AHEAD * self._config.total_train_batch_size,
                limits=spec.fleet,
                start=None if kept is None else kept[0].progress,
                instances=instances,
                journal=journal,
            )
            if kept is not None:
                try:
                    self._load(*kept)
                except (KeyError, ValueError, TypeError, RuntimeError) as error:
                    raise UserError(f"checkpoint {start} holds what PPO cannot go on with ({error}).") from error
            self._publish()
            undo.pop_all()  # from here on it is `stop` that ends them

    def iterate(self) -> dict[str, float]:
        """Learn from the next episodes, shaped by `baseline`; docs/mlflow.md says what each metric means."""
        if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):  # musl has none
            ctypes.CDLL(None).malloc_trim(0)  # glibc keeps 5 MiB per 512 decisions (measured)
        config, begun = self._config, time.perf_counter()
        self.episodes = episodes = self.dispatcher.collect(config.total_train_batch_size, self._check)
        potentials = self.baseline.potentials(episodes)
        said = np.concatenate([each[:-1] for each in potentials]) + self.baseline.scale * stacked(episodes, "values")
        metrics = sample_metrics(episodes, said, self._updates) | self._fleet_metrics(episodes)
        anchor = None if self.anchor is None else self.anchor.logits(decided_on(episodes)).detach().numpy()
        ends = np.cumsum([len(each) for each in episodes])[:-1]
        anchors: Any = [None] * len(episodes) if anchor is None else np.split(anchor, ends)
        shaped: list[Any] = list(map(_shaped, episodes, self.baseline.shaped(episodes, potentials), anchors))
        self.baseline.update(episodes)
        sampled = time.perf_counter()
        results = MetricsLogger(root=True)
        results.aggregate(
            self._learners.update(
                episodes=shaped,
                num_epochs=config.num_epochs,
                minibatch_size=config.minibatch_size,
                shuffle_batch_per_epoch=config.shuffle_batch_per_epoch,
            )
        )
        of_learning = {ours: float(results.peek((DEFAULT_MODULE_ID, theirs)) or 0) for ours, theirs in LEARNED.items()}
        self._kl_coefficient = of_learning["kl_coefficient"]
        self._publish()
        learned = time.perf_counter()
        return {
            **metrics,
            **update_metrics(episodes, self._net, self._clip, anchor),
            **of_learning,
            "sample_seconds": sampled - begun,
            "learn_seconds": learned - sampled,
        }

    def policy(self) -> SimicPolicy:
        return SimicPolicy(deepcopy(self._net))

    def save(self, folder: Path, extra: dict[str, Any] | None = None) -> None:
        """Write a checkpoint; `extra` is JSON for the policy's card. A UserError where `folder` holds one already."""
        if (folder / FILE).exists():
            raise UserError(f"checkpoint {folder} exists already: name a new folder, or delete it first.")
        [optimizer] = self._state()[COMPONENT_OPTIMIZER].values()
        moments = {}
        for index, each in optimizer["state"]["state"].items():
            moments |= {f"optimizer.{index}.{name}": torch.tensor(array) for name, array in each.items()}
        progress = {"updates": self._updates, "kl_coefficient": self._kl_coefficient}
        _write(folder, self.policy(), self.baseline, extra, moments, progress=self.dispatcher.progress, **progress)
        self.dispatcher.forget()

    def stop(self) -> None:
        self.dispatcher.stop()
        self._learners.shutdown()

    def _state(self, components: str | None = None) -> dict[str, Any]:
        return self._learners.get_state(components)[COMPONENT_LEARNER]

    def _publish(self) -> None:
        """Give the learners' weights to the dispatcher."""
        learner = self._state(f"{COMPONENT_LEARNER}/{COMPONENT_RL_MODULE}")
        self._updates = learner[WEIGHTS_SEQ_NO]
        module = learner[COMPONENT_RL_MODULE][DEFAULT_MODULE_ID]
        self._net.load_state_dict({name.removeprefix("net."): torch.tensor(array) for name, array in module.items()})
        self.dispatcher.set_weights(self._net.state_dict(), self._updates)

    def _load(self, state: LearnerState, tensors: dict[str, Tensor], net: ControllerNet) -> None:
        [(name, optimizer)] = self._state()[COMPONENT_OPTIMIZER].items()
        moments: dict[int, dict[str, Any]] = {}
        for key, tensor in _below("optimizer", tensors).items():
            index, moment = key.split(".")
            moments.setdefault(int(index), {})[moment] = tensor.numpy()
        optimizer["state"]["state"] = moments
        module = {f"net.{name}": tensor.numpy() for name, tensor in net.state_dict().items()}
        learner = {
            WEIGHTS_SEQ_NO: state.updates,
            COMPONENT_RL_MODULE: {DEFAULT_MODULE_ID: module},
            COMPONENT_OPTIMIZER: {name: optimizer},
        }
        self._learners.set_state({COMPONENT_LEARNER: learner})
        self._kl_coefficient = state.kl_coefficient
        go_on: Any = lambda learner: learner.set_kl_coefficient(state.kl_coefficient)  # noqa: E731
        self._learners.foreach_learner(go_on)
        self.baseline.load(state.baseline, _below("baseline", tensors))

    def _fleet_metrics(self, episodes: list[Played]) -> dict[str, float]:
        dispatcher = self.dispatcher
        progress, busy = dispatcher.progress, dispatcher.busy_fraction()
        share = progress.learned / dispatcher.begun
        metrics = {"learned_share": share, "overtaking": dispatcher.waiting, **progress.counts}
        if busy is not None:
            waited, worked = stacked(episodes, "waited").sum(), stacked(episodes, "worked").sum()
            metrics |= {"busy": busy, "waiting": float(waited / max(1e-9, waited + worked))}
        return metrics


def begin_from(policy: SimicPolicy, baseline: Baseline, folder: Path, extra: dict[str, Any]) -> None:
    """Write a checkpoint from which a training begins with another's policy and baseline; `extra` as for `save`."""
    kl_coefficient = float(PPOConfig().kl_coeff or 0)
    _write(folder, policy, baseline, extra, {}, updates=0, kl_coefficient=kl_coefficient, progress=Progress())


def _write(
    folder: Path, policy: SimicPolicy, baseline: Baseline, extra: Any, moments: dict[str, Tensor], **state: Any
) -> None:
    values, tensors = baseline.state()
    known = LearnerState(baseline=values, **state)
    folder.mkdir(parents=True, exist_ok=True)
    own = {f"baseline.{name}": tensor for name, tensor in tensors.items()}
    checkpoint.write(folder / STATE, known.model_dump(mode="json"), own | moments)
    policy.save(folder / FILE, extra)


def _config(ppo: PPOSpec, space: TelemetrySpace, seed: int) -> PPOConfig:
    learners = max(1, ppo.learners)
    return (
        PPOConfig()
        .environment(observation_space=observation_space(space), action_space=action_space(space))
        .learners(
            learner_class=SimicLearner,
            num_learners=ppo.learners,
            num_gpus_per_learner=ppo.learner_gpus,
            learner_config_dict={ANCHOR: ppo.anchor, SEED: seed},
        )
        .rl_module(rl_module_spec=RLModuleSpec(module_class=SimicModule), model_config={"hidden": ppo.hidden})
        .training(
            gamma=1.0,  # the return is the sum of loss drops, and grafts pay late
            lambda_=ppo.gae_lambda,
            lr=ppo.learning_rate,
            train_batch_size_per_learner=ppo.decisions // learners,
            minibatch_size=min(ppo.minibatch, ppo.decisions) // learners,
            num_epochs=ppo.epochs,
            clip_param=ppo.clip,
            entropy_coeff=ppo.entropy,
            vf_loss_coeff=0.5,  # Huang et al. 2022
            vf_clip_param=float("inf"),  # RLlib clamps the *squared error* there, without a gradient beyond
            grad_clip=0.5,
            grad_clip_by="norm",  # per tensor: a global clip would let a large value error shrink the policy's step
        )
    )


def _shaped(played: Played, rewards: np.ndarray, anchor: np.ndarray | None = None) -> SingleAgentEpisode:
    """The episode for RLlib, with other rewards, float32 (K,), and an anchor's logits, float32 (K, A)."""
    outputs = {
        Columns.ACTION_DIST_INPUTS: played.logits,
        Columns.ACTION_LOGP: played.log_p,
        Columns.VF_PREDS: played.values,
    } | ({} if anchor is None else {ANCHOR: anchor})
    return SingleAgentEpisode(
        id_=str(played.number),
        observations=InfiniteLookbackBuffer(played.observations),  # pyright: ignore[reportArgumentType]
        actions=InfiniteLookbackBuffer(played.actions),
        rewards=InfiniteLookbackBuffer(rewards),
        extra_model_outputs={name: InfiniteLookbackBuffer(values) for name, values in outputs.items()},
        terminated=played.terminated,
        truncated=not played.terminated,
        len_lookback_buffer=0,
    )


def _read(folder: Path, hidden: int) -> tuple[LearnerState, dict[str, Tensor], ControllerNet]:
    values, tensors = checkpoint.read(folder / STATE)
    state, net = LearnerState.checked(values, f"checkpoint {folder}"), SimicPolicy.load(folder / FILE).net
    if net.hidden != hidden:
        raise UserError(f"checkpoint {folder} does not fit ppo.hidden {hidden}: use the spec that it was made with.")
    return state, tensors, net


def _below(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
