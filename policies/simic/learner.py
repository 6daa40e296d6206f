"""Simic's learner: RLlib's PPO with Esper's settings, its metrics and its checkpoints.

Settings that are not in PPOSpec, and why (PPO: Schulman et al. 2017, 1707.06347):

- γ = 1: rewards are loss drops, whose sum is what counts; less than 1 turns them into greed, and grafts pay late.
- The value is the part of the return that telemetry's globals do not give linearly, in units of its own spread
  (`baseline.py`); without that PPO learned next to nothing on the loss laws.
- `vf_clip_param` = ∞: RLlib clamps the value's *squared error* at it, with no gradient beyond, so that a value which is
  far off would never be learned.
- Advantages are standardised over the batch's decisions (`module.py`), so the policy's loss has no unit.
- `vf_loss_coeff` 0.5 (Huang et al. 2022) and a gradient clip of 0.5 *per tensor* (`grad_clip_by="norm"`), not of the
  global norm: policy and value share no tensor (`net.py`), and a global clip would let a large error of the value
  shrink the policy's step, the only coupling left.
- KL loss as in RLlib (coefficient 0.2, target 0.01, adaptive): data may be an update or two old.

A checkpoint is a folder of two files, neither of them pickled: `learner.safetensors`, from which a training goes on,
and then `policy.safetensors`, which needs no Ray.
"""

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast

import torch
from pydantic import Field
from ray.rllib.algorithms.ppo import PPO, PPOConfig
from ray.rllib.core import COMPONENT_LEARNER, COMPONENT_OPTIMIZER, COMPONENT_RL_MODULE, DEFAULT_MODULE_ID
from ray.rllib.core.learner.learner_group import LearnerGroup
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.utils.metrics import LEARNER_RESULTS, TIMERS, WEIGHTS_SEQ_NO
from torch import Tensor

from esper.platform import checkpoint
from esper.platform.contracts import Instance
from esper.platform.errors import UserError
from esper.platform.frozen import Frozen
from esper.platform.seeding import derive
from esper.platform.spaces import action_space, observation_space
from esper.platform.spec import RunSpec
from esper.platform.telemetry import TelemetrySpace
from esper.policies.simic.dispatcher import Dispatcher, Progress
from esper.policies.simic.fleet import Fleet
from esper.policies.simic.journal import EpisodeJournal
from esper.policies.simic.module import KL_COEFFICIENT, SimicLearner, SimicModule
from esper.policies.simic.net import ControllerNet
from esper.policies.simic.policy import FILE, SimicPolicy
from esper.policies.simic.runner import SimicEnvRunner, net_weights
from esper.policies.simic.worker_table import Deadlines

STATE = "learner.safetensors"  # beside the policy
SIMIC = "simic"  # our metrics in an iteration's result
AHEAD = 2  # iterations of decisions that may wait for the learner

_LEARNER_METRICS = {  # ours → RLlib's, of the last minibatch of the last epoch
    "kl_coefficient": "curr_kl_coeff",
    "policy_loss": "policy_loss",
    "value_loss": "vf_loss",
}


class LearnerState(Frozen):
    """What a checkpoint holds beside its tensors."""

    format: Literal["learner-1"] = "learner-1"
    updates: int = Field(ge=0)  # number of the weights
    kl_coefficient: float = Field(ge=0)  # PPO's, adapted so far
    progress: Progress  # of the dispatcher
    baseline: dict[str, Any]  # its JSON values


def build_algorithm(
    spec: RunSpec,
    space: TelemetrySpace,
    make_fleet: Callable[[], Fleet],
    *,
    seed: int,
    instances: Callable[[int], Instance | None] | None = None,
    journal: Path | None = None,
    check: Callable[[], None] | None = None,
    start: Path | None = None,
) -> PPO:
    """PPO over the fleet, whose workers start while PPO is built. Ray must be initialised; end it with `stop()`.

    This process computes with one torch thread from here on: the network is tiny, the cores are the workers', and on
    busy cores two threads wait for each other (measured: an update 8 times slower). It also fixes the rounding.

    Args:
        spec: its `ppo` is used, and the deadlines of its `fleet`.
        space: what telemetry looks like.
        make_fleet: makes the workers.
        seed: of the network, episodes, action noise and minibatches.
        instances: episode number → instance; none means the spec's own.
        journal: folder in which the episodes are kept until a checkpoint has learned from them.
        check: called a few times a second while the learner waits for episodes; what it raises passes through.
        start: a checkpoint to go on from; episodes under way go on from the journal.

    Raises:
        UserError: `start` holds no checkpoint, or one that does not fit the spec.
    """
    kept = None if start is None else _read(start, spec.ppo.hidden)
    ppo, learners = spec.ppo, max(1, spec.ppo.learners)
    fleet = make_fleet()
    config = (
        PPOConfig()
        .environment(observation_space=observation_space(space), action_space=action_space(space))
        .env_runners(env_runner_cls=SimicEnvRunner, num_env_runners=0, batch_mode="complete_episodes")
        .learners(learner_class=SimicLearner, num_learners=ppo.learners, num_gpus_per_learner=ppo.learner_gpus)
        .rl_module(rl_module_spec=RLModuleSpec(module_class=SimicModule), model_config={"hidden": ppo.hidden})
        .training(
            gamma=1.0,
            lambda_=ppo.gae_lambda,
            lr=ppo.learning_rate,
            train_batch_size_per_learner=ppo.decisions // learners,
            minibatch_size=min(ppo.minibatch, ppo.decisions) // learners,
            num_epochs=ppo.epochs,
            clip_param=ppo.clip,
            entropy_coeff=ppo.entropy,
            vf_loss_coeff=0.5,
            vf_clip_param=float("inf"),
            grad_clip=0.5,
            grad_clip_by="norm",
        )
        .callbacks(on_train_result=_add_metrics)
        .debugging(log_level="ERROR", seed=derive(seed, "rllib") % 2**31)
    )
    for noisy in ("ray.rllib", "ray.tune"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    try:
        algorithm = cast(PPO, config.build_algo())
        _drop_log_folder(algorithm)
        dispatcher = Dispatcher(
            fleet,
            ControllerNet(ppo.hidden),
            space,
            seed=seed,
            ahead=AHEAD * config.total_train_batch_size,
            start=None if kept is None else kept[0].progress,
            instances=instances,
            deadlines=Deadlines(spec.fleet.deadline, spec.fleet.grace),
            journal=None if journal is None else EpisodeJournal(journal, space),
        )
        if kept is not None:
            try:
                _give(algorithm, *kept)
            except (KeyError, ValueError, TypeError, RuntimeError) as error:
                raise UserError(f"checkpoint {start} holds what PPO cannot go on with ({error}).") from error
    except BaseException:
        fleet.close()
        raise
    runner(algorithm).connect(dispatcher, check)
    return algorithm


def iteration_metrics(result: dict[str, Any]) -> dict[str, float]:
    """What `algorithm.train()` returned, flat; docs/mlflow.md says what each means, `metrics.py` how it is computed."""
    learner = result[LEARNER_RESULTS][DEFAULT_MODULE_ID]
    return {
        **result[SIMIC],
        **{name: float(learner[theirs]) for name, theirs in _LEARNER_METRICS.items() if theirs in learner},
        "sample_seconds": float(result[TIMERS]["env_runner_sampling_timer"]),
        "learn_seconds": float(result[TIMERS]["learner_update_timer"]),
    }


def current_policy(algorithm: PPO) -> SimicPolicy:
    """The policy as learned so far, a copy."""
    return _policy(_learner_state(algorithm))


def save_algorithm(algorithm: PPO, folder: Path, extra: dict[str, Any] | None = None) -> None:
    """Write a checkpoint; it is one once its policy is there, which comes last.

    Args:
        algorithm: to be saved.
        folder: made if need be.
        extra: plain JSON values for the policy's card.

    Raises:
        UserError: `folder` holds a checkpoint already.
    """
    if (folder / FILE).exists():
        raise UserError(f"checkpoint {folder} exists already: name a new folder, or delete it first.")
    ours = runner(algorithm)
    learner = _learner_state(algorithm)
    module = learner[COMPONENT_RL_MODULE][DEFAULT_MODULE_ID]
    [optimizer] = learner[COMPONENT_OPTIMIZER].values()
    values, baseline = ours.baseline.state()
    tensors = {f"module.{name}": torch.tensor(array) for name, array in module.items()}
    for index, moments in optimizer["state"]["state"].items():
        tensors |= {f"optimizer.{index}.{name}": torch.tensor(array) for name, array in moments.items()}
    tensors |= {f"baseline.{name}": tensor for name, tensor in baseline.items()}
    state = LearnerState(
        updates=learner[WEIGHTS_SEQ_NO],
        kl_coefficient=learner[KL_COEFFICIENT],
        progress=ours.dispatcher.progress(),
        baseline=values,
    )
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.write(folder / STATE, state.model_dump(mode="json"), tensors)
    _policy(learner).save(folder / FILE, extra)
    ours.dispatcher.forget()


def runner(algorithm: PPO) -> SimicEnvRunner:
    """The algorithm's only runner: it has the fleet."""
    return cast(SimicEnvRunner, algorithm.env_runner)


def _read(folder: Path, hidden: int) -> tuple[LearnerState, dict[str, Tensor]]:
    """A checkpoint's state, if it fits a network of that width."""
    values, tensors = checkpoint.read(folder / STATE)
    state = LearnerState.checked(values, f"checkpoint {folder}")
    wanted = {f"module.net.{name}": tensor.shape for name, tensor in ControllerNet(hidden).state_dict().items()}
    found = {name: tensor.shape for name, tensor in tensors.items() if name.startswith("module.")}
    if found != wanted:
        raise UserError(f"checkpoint {folder} does not fit ppo.hidden {hidden}: use the spec that it was made with.")
    return state, tensors


def _give(algorithm: PPO, state: LearnerState, tensors: dict[str, Tensor]) -> None:
    """Put what a checkpoint held where RLlib and the runner have it."""
    learner = _learner_state(algorithm)
    [(name, optimizer)] = learner[COMPONENT_OPTIMIZER].items()
    moments: dict[int, dict[str, Any]] = {}
    for key, tensor in _below("optimizer", tensors).items():
        index, moment = key.split(".")
        moments.setdefault(int(index), {})[moment] = tensor.numpy()
    optimizer["state"]["state"] = moments
    cast(LearnerGroup, algorithm.learner_group).set_state(
        {
            COMPONENT_LEARNER: {
                WEIGHTS_SEQ_NO: state.updates,
                KL_COEFFICIENT: state.kl_coefficient,
                COMPONENT_RL_MODULE: {
                    DEFAULT_MODULE_ID: {key: tensor.numpy() for key, tensor in _below("module", tensors).items()}
                },
                COMPONENT_OPTIMIZER: {name: optimizer},
            }
        }
    )
    learner = _learner_state(algorithm)
    ours = runner(algorithm)
    ours.set_state({WEIGHTS_SEQ_NO: state.updates, COMPONENT_RL_MODULE: learner[COMPONENT_RL_MODULE]})
    ours.baseline.load(state.baseline, _below("baseline", tensors))


def _below(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}


def _learner_state(algorithm: PPO) -> dict[str, Any]:
    """Of one learner: they are equal."""
    return cast(LearnerGroup, algorithm.learner_group).get_state()[COMPONENT_LEARNER]


def _policy(learner: dict[str, Any]) -> SimicPolicy:
    weights = net_weights(learner[COMPONENT_RL_MODULE][DEFAULT_MODULE_ID])
    net = ControllerNet(weights["score.2.weight"].shape[1])
    net.load_state_dict(weights)
    return SimicPolicy(net)


def _add_metrics(*, algorithm: Any, result: dict[str, Any], **_: Any) -> None:
    """RLlib's callback at the end of an iteration: the runner has the new weights by then."""
    result[SIMIC] = runner(algorithm).iteration()


def _drop_log_folder(algorithm: PPO) -> None:
    """Remove the empty folder that RLlib makes for each algorithm below ~/ray_results."""
    folder = Path(str(algorithm.logdir))
    with contextlib.suppress(OSError):
        folder.rmdir()
        folder.parent.rmdir()
