"""Laws fitted to static runs foretell them, and so do surrogates that play them; what the fit lacks is named."""

import math
from dataclasses import replace

import numpy as np
import pytest

from esper.platform.contracts import GraftAction, Instance
from esper.platform.errors import UserError
from esper.platform.spec import LawSpec, load_spec
from esper.workers.laws.fit import BOUNDS, LawFit, StaticPoint, fit_laws, points_of, predicted
from esper.workers.laws.scaling_law import VOCABULARY, ScalingLaw, budget_tokens
from esper.workers.laws.surrogate import SurrogateRun
from esper.workers.tolaria.hosts import start_shape

SPEC = load_spec("tinystories-char")
NOISE = 0.005  # nats
TEXT = {"floor": 1.11, "size": 0.22, "size_exponent": 1.1, "data": 0.014, "data_exponent": 1.15}
"""About what `tinystories-char` is fitted by."""


def truth(constants: dict[str, float]) -> ScalingLaw:
    return replace(ScalingLaw.drawn(4, SPEC), **constants)


def static_points(law: ScalingLaw, sizes=(1, 2, 3, 4, 6), fractions=(0.25, 0.5, 1.0), seeds=5, noise=NOISE):
    """Annealed losses of static runs that fall by a law."""
    random = np.random.default_rng(0)
    points = [
        StaticPoint(layers, fraction * budget_tokens(SPEC, start_shape(SPEC, VOCABULARY, layers)), 1.0, seed)
        for layers in sizes
        for fraction in fractions
        for seed in range(seeds)
    ]
    losses = predicted(law, SPEC, points) + noise * random.standard_normal(len(points))
    return [point._replace(loss=float(loss)) for point, loss in zip(points, losses, strict=True)]


@pytest.fixture(scope="module", params=[{}, TEXT], ids=["default", "text"])
def fitted(request) -> tuple[ScalingLaw, list[StaticPoint], LawFit]:
    law = truth(request.param)
    points = static_points(law)
    return law, points, fit_laws(SPEC, points)


def with_laws(laws: LawSpec):
    return SPEC.model_copy(update={"laws": laws})


def test_it_foretells_every_size_at_every_count_of_tokens(fitted):
    law, points, fit = fitted
    others = static_points(law, sizes=range(1, 7), fractions=(0.2, 0.35, 0.7, 1.5), noise=0)
    exact = [*static_points(law, noise=0), *others]
    assert np.abs(predicted(fit.law, SPEC, exact) - [point.loss for point in exact]).max() < 0.01
    assert 0.8 * NOISE < fit.residual < 1.2 * NOISE
    assert fit_laws(SPEC, points[::-1]).law.floor == pytest.approx(fit.law.floor, rel=1e-3)  # the order says nothing


def test_the_ranges_surround_the_truth_the_fit_and_the_curves(fitted):
    law, _, fit = fitted
    for name in BOUNDS:
        low, high = getattr(fit.laws, name)
        assert BOUNDS[name][0] <= low < getattr(law, name) < high <= BOUNDS[name][1]
        assert low < 0.81 * getattr(fit.law, name)
        assert high > 1.24 * getattr(fit.law, name) or high == BOUNDS[name][1]
    for name in ("heads", "width", "layer"):  # static sizes say nothing of them
        assert getattr(fit.laws, name) == getattr(SPEC.laws, name)
    exact = static_points(law, noise=0, seeds=1)
    curves = np.array([predicted(ScalingLaw.drawn(seed, with_laws(fit.laws)), SPEC, exact) for seed in range(200)])
    losses = np.array([point.loss for point in exact])
    assert ((curves.min(axis=0) < losses) & (losses < curves.max(axis=0))).all()


def test_a_surrogate_that_stays_at_a_size_ends_where_it_was_seen_to(fitted):
    _, points, fit = fitted
    laws = {name: (getattr(fit.law, name),) * 2 for name in BOUNDS}
    run = SurrogateRun(with_laws(LawSpec.model_validate(laws)))
    for layers in (1, 3, 6):
        run.reset(Instance(n_layer=layers), seed=3)
        while not run.ended:
            run.step(GraftAction(0, run.telemetry.sequence))
        last = max(point.tokens for point in points if point.layers == layers)
        measured = np.mean([point.loss for point in points if (point.layers, point.tokens) == (layers, last)])
        assert abs(run.loss - measured) < 0.02
        assert points_of(run.summary()) == [StaticPoint(layers, run.ledger.tokens, run.loss, 3)]


GOOD = static_points(truth({}), seeds=1)


@pytest.mark.parametrize(
    "points",
    [
        [],
        [p for p in GOOD if p.layers < 3],
        [p for p in GOOD if p.layers < 6 or p.tokens > 1e6],  # one number of tokens at 6 layers
        [*GOOD, StaticPoint(1, 1e5, math.nan, 0)],
    ],
)
def test_what_cannot_be_fitted_is_told_in_one_sentence(points):
    sizes = ", ".join(map(str, sorted({point.layers for point in points}))) or "none"
    with pytest.raises(UserError, match=rf"3 sizes or more.* 4.56 nats.*\(layers\): {sizes}: .*cooldowns=\["):
        fit_laws(SPEC, points)
