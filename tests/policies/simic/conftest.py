"""The workers of the session's Ray get `simic_toy` by value: they could not import it."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="package")
def local_ray(one_ray):
    import ray
    import simic_toy

    ray.cloudpickle.register_pickle_by_value(simic_toy)
    return ray


@pytest.fixture
def make(request):
    """Make trainings on the toy, which are stopped at the end; `ppo` changes the settings. `learners` needs Ray."""
    from simic_toy import SPACE, ToyRun

    from esper.platform.spec import PPOSpec, RunSpec
    from esper.policies.simic.fleet import LocalFleet
    from esper.policies.simic.ppo import PPOTraining
    from esper.workers.worker import EpisodeWorker

    settings = {"decisions": 128, "minibatch": 64, "epochs": 6, "learning_rate": 2e-3, "hidden": 64, "entropy": 0.01}

    def training(seed: int = 0, journal: Path | None = None, start: Path | None = None, **ppo: float) -> PPOTraining:
        spec = RunSpec(ppo=PPOSpec.model_validate({**settings, **ppo}))
        fleet = lambda: LocalFleet(lambda: EpisodeWorker(ToyRun), 4)  # noqa: E731
        made = PPOTraining(spec, SPACE, fleet, seed=seed, journal=journal, start=start)
        request.addfinalizer(made.stop)
        return made

    return training
