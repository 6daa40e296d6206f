"""Which laws are drawn: from the spec's ranges, and by default those that results were measured on."""

from dataclasses import astuple

import pytest

from esper.platform.errors import UserError
from esper.platform.spec import LawSpec, load_spec
from esper.workers.laws.scaling_law import ScalingLaw

# (size, size_exponent, data, data_exponent, heads, width, layer, reference) of tinystories-char, E = 0.3
DEFAULT = {
    0: "1.3623587062315965 0.460694791683833 0.0746366423558637 0.8877552805242819 "
    "2.2003743634970974 0.2524956663510089 5722.77186182663 16925.14767330669",
    1_000_003: "1.430686145781546 0.6605807821966968 0.0822012232335667 0.7987411960541011 "
    "0.17827426425846288 4.2959357867127395 602.1055734473289 38586.67210222287",
}


@pytest.mark.parametrize("seed", DEFAULT)
def test_the_default_laws_stay_what_results_were_measured_on(seed):
    law = ScalingLaw.drawn(seed, load_spec("tinystories-char"))
    assert astuple(law)[:-1] == (0.3, *map(float, DEFAULT[seed].split()))


@pytest.mark.parametrize("between", ["[1.0,0.9]", "[0,1]", "[-1,1]"])
def test_a_range_that_is_none_is_refused(between):
    for name in LawSpec.model_fields:
        with pytest.raises(UserError, match=rf"laws.{name}.*(the lower number must be the first|greater than 0)"):
            load_spec("tinystories-char", [f"laws.{name}={between}"])


def test_laws_above_where_a_surrogate_starts_are_refused():
    with pytest.raises(UserError, match=r"laws.floor and laws.size reach 4.80 nats together.*ln 96 = 4.56"):
        ScalingLaw.drawn(0, load_spec("tinystories-char", ["laws.floor=[2,3]"]))
