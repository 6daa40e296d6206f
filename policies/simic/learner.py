"""Simic's learner: RLlib's PPO, unchanged, with Esper's settings, its metrics and its checkpoints.

Settings that are not in PPOSpec, and why (PPO: Schulman et al. 2017, 1707.06347):

- γ = 1: rewards are loss drops, whose sum is what counts; less than 1 turns them into greed, and grafts pay late.
- The value is the part of the return that telemetry's globals do not give linearly, in units of its own spread
  (`baseline.py`); without that PPO learned next to nothing on the loss laws.
- `vf_clip_param` = ∞: RLlib clamps the value's *squared error* at it, with no gradient beyond, so that a value which is
  far off would never be learned.
- Advantages are standardised over the whole batch by RLlib's GAE connector, so the policy's loss has no unit.
- `vf_loss_coeff` 0.5 (Huang et al. 2022) and a gradient clip of 0.5 *per tensor* (`grad_clip_by="norm"`), not of the
  global norm: policy and value share no tensor (`net.py`), and a global clip would let a large error of the value
  shrink the policy's step, the only coupling left.
- KL loss as in RLlib (coefficient 0.2, target 0.01, adaptive): data may be an update or two old.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from ray.rllib.algorithms.ppo import PPO, PPOConfig
from ray.rllib.core import COMPONENT_LEARNER, COMPONENT_RL_MODULE, DEFAULT_MODULE_ID
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.utils.metrics import ENV_RUNNER_RESULTS, LEARNER_RESULTS, TIMERS

from esper.platform.contracts import Instance
from esper.platform.errors import UserError
from esper.platform.seeding import derive
from esper.platform.spaces import action_space, observation_space
from esper.platform.spec import RunSpec
from esper.platform.storage import whole_folder
from esper.platform.telemetry import TelemetrySpace
from esper.policies.simic.desk import Deadlines
from esper.policies.simic.fleet import Fleet
from esper.policies.simic.module import SimicModule
from esper.policies.simic.net import ControllerNet
from esper.policies.simic.policy import FOLDER, SimicPolicy
from esper.policies.simic.runner import SIMIC, SimicEnvRunner, Source

ALGORITHM = "algorithm"  # RLlib's checkpoint, beside `policy/`

_LEARNER_METRICS = {  # ours → RLlib's, of the last minibatch of the last epoch
    "kl_coefficient": "curr_kl_coeff",
    "policy_loss": "policy_loss",
    "value_loss": "vf_loss",
}


def build_algorithm(
    spec: RunSpec,
    space: TelemetrySpace,
    make_fleet: Callable[[], Fleet],
    *,
    seed: int,
    instances: Callable[[int], Instance | None] | None = None,
    journal: Path | None = None,
    check: Callable[[], None] | None = None,
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
    """
    ppo, learners = spec.ppo, max(1, spec.ppo.learners)
    fleet = make_fleet()
    deadlines = Deadlines(spec.fleet.deadline, spec.fleet.grace)
    source = Source(space, fleet, seed, instances, deadlines, journal, check)
    config = (
        PPOConfig()
        .environment(
            observation_space=observation_space(space), action_space=action_space(space), env_config={"source": source}
        )
        .env_runners(env_runner_cls=SimicEnvRunner, num_env_runners=0, batch_mode="complete_episodes")
        .learners(num_learners=ppo.learners, num_gpus_per_learner=ppo.learner_gpus)
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
        .callbacks(on_train_result=_add_update_metrics)
        .debugging(log_level="ERROR", seed=derive(seed, "rllib") % 2**31)
    )
    for noisy in ("ray.rllib", "ray.tune"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    try:
        algorithm = cast(PPO, config.build_algo())
    except BaseException:
        fleet.close()
        raise
    _drop_log_folder(algorithm)
    return algorithm


def iteration_metrics(result: dict[str, Any]) -> dict[str, float]:
    """What `algorithm.train()` returned, flat.

    - `return_mean`, `return_min`, `return_max` (nats), `val_loss` (mean final loss), `episodes`, `decisions`,
      `episode_length`.
    - `explained_variance` (strict: see `SimicEnvRunner`) and `entropy` (nats), of the policy as it chose.
    - `wait`, `graft`, `prune` and, by what a graft adds, `heads`, `width`, `expert`, `layer`: shares of the decisions.
    - `kl`, `clip_fraction`: what the update did to the policy, over the whole batch (`SimicEnvRunner.update_metrics`).
    - `kl_coefficient`, `policy_loss`, `value_loss`: of the last minibatch.
    - `lag_mean`, `lag_max`: updates between choosing and learning. `busy`: fraction of the time in which a worker has
      an order; `waiting`: fraction of a worker's own time in which it has none. `episode_seconds` and
      `episode_seconds_max`: that a worker spent on an episode.
    - `failures`, `late`, `refused`, `dropped`, `redone`, `unsaved`: counts since the start (`Dispatcher.counts`).
    - `sample_seconds`: the learner waits for episodes. `learn_seconds`: it updates (both smoothed by RLlib).
    """
    sampled = result[ENV_RUNNER_RESULTS]
    learner = result[LEARNER_RESULTS][DEFAULT_MODULE_ID]
    metrics = {
        **{f"return_{what}": sampled[f"episode_return_{what}"] for what in ("mean", "min", "max")},
        "episode_length": sampled["episode_len_mean"],
        **sampled[SIMIC],
        **{name: learner[theirs] for name, theirs in _LEARNER_METRICS.items() if theirs in learner},
        "sample_seconds": result[TIMERS]["env_runner_sampling_timer"],
        "learn_seconds": result[TIMERS]["learner_update_timer"],
    }
    return {name: float(value) for name, value in metrics.items()}


def current_policy(algorithm: PPO) -> SimicPolicy:
    """The policy as learned so far, a copy."""
    module = COMPONENT_LEARNER + "/" + COMPONENT_RL_MODULE
    assert algorithm.learner_group is not None
    state = algorithm.learner_group.get_state(components=module)[COMPONENT_LEARNER][COMPONENT_RL_MODULE]
    weights = {name.removeprefix("net."): torch.tensor(value) for name, value in state[DEFAULT_MODULE_ID].items()}
    net = ControllerNet(cast(Any, algorithm.config).model_config["hidden"])
    net.load_state_dict(weights)
    return SimicPolicy(net)


def save_algorithm(algorithm: PPO, folder: Path, extra: dict[str, Any] | None = None) -> None:
    """Write `folder`, whole or not at all: RLlib's checkpoint in `algorithm/`, and `policy/`, which needs no Ray.

    Raises:
        UserError: `folder` exists.
    """
    if folder.exists():
        raise UserError(f"checkpoint {folder} exists already: name a new folder, or delete it first.")
    with whole_folder(folder) as partial:
        algorithm.save_to_path(str((partial / ALGORITHM).absolute()))
        current_policy(algorithm).save(partial / FOLDER, extra)
    runner(algorithm).checkpointed()


def restore_algorithm(
    folder: Path,
    spec: RunSpec,
    space: TelemetrySpace,
    make_fleet: Callable[[], Fleet],
    *,
    seed: int,
    instances: Callable[[int], Instance | None] | None = None,
    journal: Path | None = None,
    check: Callable[[], None] | None = None,
) -> PPO:
    """`build_algorithm`, going on where `save_algorithm` left off: weights, optimizer, counters, next episode.

    Episodes under way go on from the journal. RLlib's checkpoints hold pickles: restore only what you trust.

    Raises:
        UserError: `folder` holds no checkpoint, or one that does not fit the spec.
    """
    path = (folder / ALGORITHM).absolute()
    if not path.is_dir():
        raise UserError(f"checkpoint {folder} holds no {ALGORITHM}/ folder: name one that `esper ppo` left.")
    algorithm = build_algorithm(spec, space, make_fleet, seed=seed, instances=instances, journal=journal, check=check)
    try:
        algorithm.restore_from_path(str(path))
    except Exception as error:
        algorithm.stop()
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"checkpoint {folder} cannot be restored ({reason}): use the spec that it was made with."
        ) from error
    return algorithm


def runner(algorithm: PPO) -> SimicEnvRunner:
    """The algorithm's only runner: it has the fleet."""
    return cast(SimicEnvRunner, algorithm.env_runner)


def _add_update_metrics(*, algorithm: Any, result: dict[str, Any], **_: Any) -> None:
    """RLlib's callback at the end of an iteration: the runner has the new weights by then, and still the old batch."""
    result[ENV_RUNNER_RESULTS][SIMIC] |= runner(algorithm).update_metrics()


def _drop_log_folder(algorithm: PPO) -> None:
    """Remove the empty folder that RLlib makes for each algorithm below ~/ray_results."""
    folder = Path(str(algorithm.logdir))
    try:
        folder.rmdir()
        folder.parent.rmdir()
    except OSError:
        pass
