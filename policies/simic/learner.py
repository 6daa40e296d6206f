"""PPO (Schulman et al. 2017, 1707.06347) on RLlib: its settings, metrics and checkpoints.

A checkpoint is a folder of `learner.safetensors`, to go on from, and `policy.safetensors`, which needs no Ray.
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
    seed: int,  # of the network, episodes, action noise and minibatches
    instances: Callable[[int], Instance | None] | None = None,  # of an episode's number; None: the spec's own
    journal: Path | None = None,  # folder of the episodes that no checkpoint has learned from yet
    check: Callable[[], None] | None = None,  # called a few times a second while waiting; its errors pass through
    start: Path | None = None,  # checkpoint to resume; a UserError where it is none, or does not fit the spec
) -> PPO:
    """PPO over a fleet, whose workers start meanwhile. Ray must be initialised; end it with `stop()`."""
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
        .callbacks(on_train_result=_add_metrics)
        .debugging(log_level="ERROR", seed=derive(seed, "rllib") % 2**31)
    )
    for noisy in ("ray.rllib", "ray.tune"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    torch.set_num_threads(1)  # on busy cores two made an update 8 times slower; also fixes the rounding
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
    """The result of `algorithm.train()`, flat; docs/mlflow.md says what each metric means."""
    learner = result[LEARNER_RESULTS][DEFAULT_MODULE_ID]
    return {
        **result[SIMIC],
        **{name: float(learner[theirs]) for name, theirs in _LEARNER_METRICS.items() if theirs in learner},
        "sample_seconds": float(result[TIMERS]["env_runner_sampling_timer"]),
        "learn_seconds": float(result[TIMERS]["learner_update_timer"]),
    }


def current_policy(algorithm: PPO) -> SimicPolicy:
    """A copy of the policy as learned so far."""
    return _policy(_learner_state(algorithm))


def save_algorithm(algorithm: PPO, folder: Path, extra: dict[str, Any] | None = None) -> None:
    """Write a checkpoint; `extra` is JSON for the policy's card. A UserError where `folder` holds one already."""
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
    """The algorithm's only runner, which has the fleet."""
    return cast(SimicEnvRunner, algorithm.env_runner)


def _read(folder: Path, hidden: int) -> tuple[LearnerState, dict[str, Tensor]]:
    values, tensors = checkpoint.read(folder / STATE)
    state = LearnerState.checked(values, f"checkpoint {folder}")
    wanted = {f"module.net.{name}": tensor.shape for name, tensor in ControllerNet(hidden).state_dict().items()}
    found = {name: tensor.shape for name, tensor in tensors.items() if name.startswith("module.")}
    if found != wanted:
        raise UserError(f"checkpoint {folder} does not fit ppo.hidden {hidden}: use the spec that it was made with.")
    return state, tensors


def _give(algorithm: PPO, state: LearnerState, tensors: dict[str, Tensor]) -> None:
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
    return cast(LearnerGroup, algorithm.learner_group).get_state()[COMPONENT_LEARNER]


def _policy(learner: dict[str, Any]) -> SimicPolicy:
    weights = net_weights(learner[COMPONENT_RL_MODULE][DEFAULT_MODULE_ID])
    net = ControllerNet(weights["score.2.weight"].shape[1])
    net.load_state_dict(weights)
    return SimicPolicy(net)


def _add_metrics(*, algorithm: Any, result: dict[str, Any], **_: Any) -> None:
    result[SIMIC] = runner(algorithm).iteration()  # the runner has the new weights by now


def _drop_log_folder(algorithm: PPO) -> None:
    folder = Path(str(algorithm.logdir))
    with contextlib.suppress(OSError):
        folder.rmdir()
        folder.parent.rmdir()
