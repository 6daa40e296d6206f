"""Laws are drawn from the spec's ranges, by default those that results were measured on, or fitted to static runs."""

import math
from dataclasses import astuple, replace

import numpy as np
import pytest

from esper.platform.contracts import Instance
from esper.platform.errors import UserError
from esper.platform.spec import LawSpec, load_spec
from esper.workers.laws.fit import (
    BOUNDS,
    Annealed,
    LawFit,
    annealed_losses,
    decision_losses,
    fit_laws,
    held_out_residual,
    predicted,
)
from esper.workers.laws.scaling_law import VOCABULARY, ScalingLaw, budget_tokens, size_of
from esper.workers.laws.surrogate import SurrogateRun
from esper.workers.tolaria.hosts import start_shape
from tests.workers.growing_run import act, play

SPEC = load_spec("tinystories-char")
NOISE = 0.005  # nats
TEXT = {"floor": 1.11, "size": 0.22, "size_exponent": 1.1, "data": 0.014, "data_exponent": 1.15}
"""About what `tinystories-char` is fitted by."""


def truth(constants: dict[str, float]) -> ScalingLaw:
    return replace(ScalingLaw.drawn(4, SPEC), **constants)


def static_points(law: ScalingLaw, sizes=(1, 2, 3, 4, 6), fractions=(0.25, 0.5, 1.0), seeds=5, noise=NOISE):
    """Annealed losses of static runs that fall by a law."""
    random = np.random.default_rng(0)
    shapes = {layers: start_shape(SPEC, VOCABULARY, layers) for layers in sizes}
    points = [
        Annealed(size_of(shapes[layers]).T, np.array([fraction * budget_tokens(SPEC, shapes[layers])]), 1.0, seed)
        for layers in sizes
        for fraction in fractions
        for seed in range(seeds)
    ]
    losses = predicted(law, points) + noise * random.standard_normal(len(points))
    return [point._replace(loss=float(loss)) for point, loss in zip(points, losses, strict=True)]


def by_run(points):
    """The points of each size and seed."""
    runs = {}
    for point in points:
        runs.setdefault((point.seed, point.sizes[0, 2]), []).append(point)
    return list(runs.values())


@pytest.fixture(scope="module", params=[{}, TEXT], ids=["default", "text"])
def fitted(request) -> tuple[ScalingLaw, list[Annealed], LawFit]:
    law = truth(request.param)
    points = static_points(law)
    return law, points, fit_laws(SPEC, by_run(points), 12)


def test_it_foretells_every_size_at_every_count_of_tokens(fitted):
    law, points, fit = fitted
    others = static_points(law, sizes=range(1, 7), fractions=(0.2, 0.35, 0.7, 1.5), noise=0)
    exact = [*static_points(law, noise=0), *others]
    assert np.abs(predicted(fit.law, exact) - [point.loss for point in exact]).max() < 0.01
    assert 0.8 * NOISE < fit.residual < 1.2 * NOISE
    assert fit_laws(SPEC, by_run(points[::-1]), 0).law.floor == pytest.approx(fit.law.floor, rel=1e-3)  # in any order


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
    spec = SPEC.model_copy(update={"laws": fit.laws})
    curves = np.array([predicted(ScalingLaw.drawn(seed, spec), exact) for seed in range(200)])
    losses = np.array([point.loss for point in exact])
    assert ((curves.min(axis=0) < losses) & (losses < curves.max(axis=0))).all()


GOOD = static_points(truth({}), seeds=1)


@pytest.mark.parametrize(
    "points",
    [
        [],
        [p for p in GOOD if p.sizes[0, 2] < 3],
        [p for p in GOOD if p.sizes[0, 2] < 3 or p.tokens[0] > 2e6],  # one number of tokens at the larger sizes
        [*GOOD, GOOD[0]._replace(loss=math.nan)],
    ],
)
def test_what_cannot_be_fitted_is_told_in_one_sentence(points):
    sizes = ", ".join(map(str, sorted({int(point.sizes[0, 2]) for point in points}))) or "none"
    with pytest.raises(UserError, match=rf"3 sizes or more.* 4.56 nats.*\(layers\): {sizes}: .*cooldowns=\["):
        fit_laws(SPEC, [points])


@pytest.fixture(scope="module", params=[(0.0, 0.0), (0.2, 0.5)], ids=["shallow", "deep"])
def grown(request):
    """Losses of static and of growing runs, two seeds of each, that fall by the law of number 8, and depth's part."""
    spec = SPEC.overridden(dict(zip(("laws.depth", "laws.slowness"), ((x, x) for x in request.param), strict=True)))
    run, found = SurrogateRun(spec), []
    for plan in ((), ("ffn",) * 2, ("attention",) * 3, ("attention", "ffn", "block"), ("block", "attention")):
        for budget, seed in ((0.5, 1), (1.0, 2)):
            run.reset(Instance(law=8, budget=budget), seed)
            play(run, {3 * (i + 1): kind for i, kind in enumerate(plan)})
            found.append(annealed_losses(run.summary()))
    law = ScalingLaw.drawn(8, spec)
    return law, by_run(static_points(law, seeds=2)) + found


def test_growing_runs_tell_what_heads_width_and_depth_are_worth(grown):
    law, runs = grown
    random = np.random.default_rng(0)
    noisy = [[p._replace(loss=p.loss + 0.5 * NOISE * random.standard_normal()) for p in run] for run in runs]
    fit, blind = (fit_laws(SPEC, [run for run in noisy if known or len(run[0].tokens) == 1], 12) for known in (1, 0))
    one = size_of(start_shape(SPEC, VOCABULARY, 1))[:, 0]
    for i, name in enumerate(("heads", "width")):

        def share(law, i=i, name=name):  # of a layer that these parameters make up
            return getattr(law, name) * one[i] / law.reference

        assert share(fit.law) == pytest.approx(share(law), abs=0.25 if law.depth else 0.08)
        spread, before = (np.std([share(each) for each in fitted.ensemble]) for fitted in (fit, blind))
        assert 2 * spread < before  # static runs of one width leave it where it was
    assert fit.law.slowness == pytest.approx(law.slowness, abs=0.2)
    raised = [point._replace(loss=point.loss + 0.1) for point in runs[-1]]
    sound, odd = (held_out_residual(SPEC, each) for each in (noisy, [*noisy[:-1], raised]))
    assert sound is not None
    assert odd is not None
    assert sound < 0.02 < odd
    assert held_out_residual(SPEC, by_run(static_points(law, seeds=2))) is None


def test_experts_and_prunes_are_told_by_the_runs_that_have_them():
    """Experts of a law in which each of their parameters counts a fifth of another; a prune adds what it takes away."""
    ranges = {"laws.expert": (0.2, 0.2), "laws.slowness": (0.4, 0.4)}
    spec = SPEC.overridden({**ranges, "growth.blueprints": {"expert": {}, "ffn": {}}})
    run, law, found = SurrogateRun(spec), ScalingLaw.drawn(8, spec), []
    for kinds in (["expert"] * 2, ["expert"] * 5, ["ffn"] * 3, ["ffn", "expert", "ffn", "expert"]):
        run.reset(Instance(law=8), seed=len(found))
        play(run, {2 + i: kind for i, kind in enumerate(kinds)})
        found.append(annealed_losses(run.summary()))
        assert predicted(law, found[-1])[-1] == pytest.approx(run.loss_now, abs=1e-6)
    fit = fit_laws(SPEC, by_run(static_points(law, seeds=2, noise=0.001)) + found, 0)
    assert fit.law.expert == pytest.approx(0.2, abs=0.1)
    assert fit.laws.expert[0] < 0.2 < fit.laws.expert[1] < 1
    run.reset(Instance(law=8), seed=9)
    while not run.ended:
        act(run, *{2: ("ffn",), 5: ("ffn",), 9: ("ffn", None, "prune")}.get(run.sequence, ()))
    (pruned,) = annealed_losses(run.summary())
    assert len(pruned.tokens) == 4
    assert predicted(law, [pruned])[0] == pytest.approx(run.loss_now, abs=1e-6)


def test_runs_without_a_decision_at_full_rate_say_nothing_of_the_noise():
    law, found = ScalingLaw.drawn(8, SPEC), []
    for spec in (SPEC, SPEC.overridden({"budget.decisions": 2})):
        run = SurrogateRun(spec)
        run.reset(Instance(law=8), seed=0)
        play(run, {})
        found.append((spec, run.summary()))
        for i, point in enumerate(found[-1][1]["val_curve"]):
            point["val_loss"] += 0.01 * (-1) ** i
    assert decision_losses(law, found)["noise"] == decision_losses(law, found[:1])["noise"] > 2e-3
    with pytest.raises(UserError, match="these runs have none: fit runs of more decisions"):
        decision_losses(law, found[1:])


# (size, size_exponent, data, data_exponent, heads, width, layer, reference) of tinystories-char, E = 0.3
DEFAULT = {
    0: "1.3623587062315965 0.460694791683833 0.0746366423558637 0.8877552805242819 "
    "2.2003743634970974 0.2524956663510089 5722.77186182663 16925.14767330669",
    1_000_003: "1.430686145781546 0.6605807821966968 0.0822012232335667 0.7987411960541011 "
    "0.17827426425846288 4.2959357867127395 602.1055734473289 38586.67210222287",
}


@pytest.mark.parametrize("seed", DEFAULT)
def test_the_default_laws_stay_what_results_were_measured_on(seed):
    law = ScalingLaw.drawn(seed, SPEC)
    assert astuple(law)[:-4] == (0.3, *map(float, DEFAULT[seed].split()))
    assert (law.depth, law.slowness, law.expert) == (0, 0, 1)


@pytest.mark.parametrize("between", ["[1.0,0.9]", "[-1,1]"])
def test_a_range_that_is_none_is_refused(between):
    for name in LawSpec.model_fields:
        with pytest.raises(UserError, match=rf"laws.{name}.*(the lower number must be the first|greater than )"):
            load_spec("tinystories-char", [f"laws.{name}={between}"])


def test_laws_above_where_a_surrogate_starts_are_refused():
    with pytest.raises(UserError, match=r"laws.floor and laws.size reach 4.80 nats together.*ln 96 = 4.56"):
        ScalingLaw.drawn(0, load_spec("tinystories-char", ["laws.floor=[2,3]"]))
