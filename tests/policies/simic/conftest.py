"""A local Ray for these tests alone, whose workers get `simic_toy` by value: they could not import it."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="package")
def local_ray():
    import ray
    import simic_toy

    ray.cloudpickle.register_pickle_by_value(simic_toy)
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield ray
    ray.shutdown()
