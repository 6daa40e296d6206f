"""The instance sets: on text, episodes differ in budget by a factor of 32, in where they start and in the text.

Alone: `pytest tests/workers/test_instances.py`.
"""

import numpy as np
import pytest

from esper.platform.spec import RunSpec, load_spec
from esper.workers.instances import SETS, instance_set


@pytest.mark.parametrize("name", SETS)
def test_instances_on_text_are_spread_evenly_over_budgets(name: str):
    found = list(instance_set(name, load_spec("tinystories-char"), text=True).values())
    doublings = np.log2([each.budget for each in found])
    assert -3 <= doublings.min() < -2.8
    assert 1.8 < doublings.max() <= 2
    shares = np.histogram(doublings, bins=5, range=(-3, 2))[0] / len(found)
    assert shares.min() > 0.15
    assert len({int(doubling + 3) // 2 for doubling in doublings[:4]}) == 3  # the first few hold small and large ones
    assert {each.n_layer for each in found} == {None, 2}
    assert min(high - low for low, high in (each.data for each in found)) > 0.5
    assert len({each.data for each in found}) == len(found)
    assert {each.law for each in found} == {None}


def test_the_sets_share_no_instance_and_none_starts_beyond_the_cap(tiny_spec: RunSpec):
    sets = [{each.model_dump_json() for each in instance_set(name, tiny_spec, text=True).values()} for name in SETS]
    assert len(set.union(*sets)) == sum(map(len, sets))
    capped = tiny_spec.overridden({"host.n_layer": 3})
    assert {each.n_layer for each in instance_set("train", capped, text=True).values()} == {None}
