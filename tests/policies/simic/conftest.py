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
