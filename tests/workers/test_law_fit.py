"""Laws fitted to static runs foretell them, and so do surrogates that play them; what the fit lacks is named."""

import math
from dataclasses import replace

import numpy as np
import pytest

from esper.platform.contracts import GraftAction, Instance
from esper.platform.errors import UserError
from esper.platform.spec import RunSpec, load_spec
from esper.workers.instances import instance_set
from esper.workers.laws.fit import BOUNDS, CONSTANTS, LawFit, StaticPoint, fit_laws, law_distance, points_of, predicted
from esper.workers.laws.oracle import bound
from esper.workers.laws.scaling_law import Law, budget_tokens, start_of
from esper.workers.laws.surrogate import SurrogateRun

SPEC = load_spec("tinystories-char")
NOISE = 0.005  # nats
TEXT = {"floor": 1.11, "size": 0.22, "size_exponent": 1.1, "data": 0.014, "data_exponent": 1.15}
"""About what `tinystories-char` is fitted by."""
TRUTHS = [{}, TEXT]  # the constants of law 4, or those of text


def truth(constants: dict[str, float]) -> Law:
    return replace(Law.drawn(4, SPEC), **constants)


def static_points(law: Law, sizes=(1, 2, 3, 4, 6), fractions=(0.25, 0.5, 1.0), seeds=5, noise=NOISE):
    """Annealed losses of static runs that fall by a law."""
    random = np.random.default_rng(0)
    points = [
        StaticPoint(layers, fraction * budget_tokens(SPEC, start_of(SPEC, layers)), 1.0, seed)
        for layers in sizes
        for fraction in fractions
        for seed in range(seeds)
    ]
    losses = predicted(law, SPEC, points) + noise * random.standard_normal(len(points))
    return [replace(point, loss=float(loss)) for point, loss in zip(points, losses, strict=True)]


@pytest.fixture(scope="module", params=TRUTHS, ids=["default", "text"])
def fitted(request) -> tuple[Law, list[StaticPoint], LawFit]:
    law = truth(request.param)
    points = static_points(law)
    return law, points, fit_laws(SPEC, points)


def with_laws(fit: LawFit, *, exact: bool = False, spec: RunSpec = SPEC) -> RunSpec:
    return spec.model_copy(update={"laws": fit.exact() if exact else fit.laws})


def test_it_foretells_every_size_at_every_count_of_tokens(fitted):
    law, points, fit = fitted
    others = static_points(law, sizes=range(1, 7), fractions=(0.2, 0.35, 0.7, 1.5), noise=0)
    exact = [*static_points(law, noise=0), *others]
    assert np.abs(predicted(fit.law(SPEC), SPEC, exact) - [point.loss for point in exact]).max() < 0.01
    assert fit.residual == pytest.approx(law_distance(fit.law(SPEC), SPEC, points))
    assert 0.8 * NOISE < fit.residual < 1.2 * NOISE
    assert fit.held_out is not None
    assert 0.6 * NOISE < fit.held_out < 1.6 * NOISE


def test_the_ranges_surround_the_truth_and_the_fit(fitted):
    law, _, fit = fitted
    for name in CONSTANTS:
        low, high = getattr(fit.laws, name)
        assert BOUNDS[name][0] <= low < getattr(law, name) < high <= BOUNDS[name][1]
        assert low < 0.81 * getattr(fit, name)
        assert high > 1.24 * getattr(fit, name) or high == BOUNDS[name][1]
    for name in ("heads", "width", "layer"):  # static sizes say nothing of them
        assert getattr(fit.laws, name) == getattr(SPEC.laws, name)


def test_the_laws_drawn_surround_the_curves(fitted):
    law, points, fit = fitted
    spec, exact = with_laws(fit), static_points(law, noise=0, seeds=1)
    curves = np.array([predicted(Law.drawn(seed, spec), spec, exact) for seed in range(200)])
    losses = np.array([point.loss for point in exact])
    assert (curves.min(axis=0) < losses).all()
    assert (curves.max(axis=0) > losses).all()
    of_one = Law.drawn(11, with_laws(fit, exact=True))  # a law drawn from the fit without its ranges is the fit
    assert law_distance(of_one, SPEC, points) == pytest.approx(fit.residual)


def test_it_is_the_same_every_time(fitted):
    _, points, fit = fitted
    assert fit_laws(SPEC, points) == fit
    assert fit_laws(SPEC, points[::-1]).floor == pytest.approx(fit.floor, rel=1e-3)  # the order says nothing


def test_a_surrogate_that_stays_at_a_size_ends_where_it_was_seen_to(fitted):
    _, points, fit = fitted
    spec = with_laws(fit, exact=True)
    for layers in (1, 3, 6):
        run = SurrogateRun(spec)
        run.reset(Instance(n_layer=layers), seed=3)
        while not run.ended:
            run.step(GraftAction(0, run.telemetry.sequence))
        last = max(point.tokens for point in points if point.layers == layers)
        measured = np.mean([point.loss for point in points if (point.layers, point.tokens) == (layers, last)])
        assert abs(run.loss - measured) < 0.02
        assert points_of(run.summary()) == [StaticPoint(layers, run.ledger.tokens, run.loss, 3)]


def test_controllers_train_on_it(fitted):
    _, _, fit = fitted
    run, random = SurrogateRun(with_laws(fit)), np.random.default_rng(0)
    for instance in list(instance_set("train", SPEC).values())[:12]:
        run.reset(instance)
        while not run.ended:
            run.step(GraftAction(int(random.choice(run.telemetry.legal())), run.telemetry.sequence))
        assert run.loss >= bound(run.spec, instance) - 1e-9


def test_its_clairvoyant_bound_is_the_best_of_everything(fitted):
    _, _, fit = fitted
    small = ["budget.amount=2e5", "budget.decisions=3", "growth.max_layers=2", "growth.min_optimizer_steps=1"]
    spec = with_laws(fit, spec=load_spec("tinystories-char", small))

    def best_from(run: SurrogateRun) -> float:
        if run.ended:
            return run.loss
        found = []
        for row in run.telemetry.legal():
            branch = SurrogateRun(spec)
            branch.load(*run.state())
            branch.step(GraftAction(int(row), run.telemetry.sequence))
            found.append(best_from(branch))
        return min(found)

    for law in range(2):
        run, instance = SurrogateRun(spec), Instance(n_layer=1, law=law)
        run.reset(instance)
        assert bound(spec, instance) == pytest.approx(best_from(run), abs=1e-9)


def test_an_outlier_and_a_steep_first_phase_do_not_bend_it():
    law = truth(TEXT)
    points = static_points(law, seeds=2)
    exact = static_points(law, seeds=1, noise=0)
    points[0] = replace(points[0], loss=points[0].loss + 0.3)
    early = [i for i, point in enumerate(points) if point.loss > 1.8]
    assert early
    for i in early:
        points[i] = replace(points[i], loss=points[i].loss + 0.15)
    good = [point for point in exact if point.loss < 1.5]
    assert law_distance(fit_laws(SPEC, points).law(SPEC), SPEC, good) < 0.02


def test_one_seed_has_the_stated_share_alone():
    fit = fit_laws(SPEC, static_points(truth({}), seeds=1))
    assert fit.held_out is None
    for name in CONSTANTS:
        assert getattr(fit.laws, name) == pytest.approx((getattr(fit, name) / 1.25, getattr(fit, name) * 1.25))


def test_a_seed_without_which_too_little_is_left_is_not_left_out():
    points = static_points(truth({}), seeds=3)
    alone = [point for point in points if point.seed == 0 or point.tokens > 1e6 * 7 / point.layers**2]
    fit = fit_laws(SPEC, alone)
    assert fit.held_out is not None
    assert fit.held_out < 0.02
    assert max(getattr(fit.laws, name)[1] / getattr(fit, name) for name in CONSTANTS) < 1.9


def test_points_of_other_budgets_are_measured_at_the_same_tokens():
    points = static_points(truth(TEXT))
    smaller = load_spec("tinystories-char", ["budget.amount=1e6"])
    fit = fit_laws(smaller, points)
    assert fit.data == pytest.approx(fit_laws(SPEC, points).data * 3**fit.data_exponent, rel=0.1)
    assert law_distance(fit.law(smaller), smaller, points) < 1.2 * NOISE


def test_high_losses_leave_the_laws_room_below_the_start():
    fit = fit_laws(SPEC, static_points(truth({"floor": 2.4, "size": 1.6})))
    assert fit.laws.floor[1] + fit.laws.size[1] < math.log(96)
    assert fit.residual < 1.2 * NOISE
    SurrogateRun(with_laws(fit)).reset(seed=0)


def test_runs_that_diverged_have_no_points():
    assert points_of({"diverged": True}) == []
    ends = [{"tokens": 10, "val_loss": 2.0}, {"tokens": 20, "val_loss": 1.5}]
    summary = {"diverged": False, "layers": 2, "seed": 7, "annealed": ends, "tokens": 40, "val_loss": 1.2}
    assert points_of(summary) == [StaticPoint(2, 10, 2.0, 7), StaticPoint(2, 20, 1.5, 7), StaticPoint(2, 40, 1.2, 7)]


GOOD = static_points(truth({}), seeds=1)


@pytest.mark.parametrize(
    ("points", "sentence"),
    [
        ([], r"3 sizes or more, but there are only these \(layers\): none"),
        ([p for p in GOOD if p.layers < 3], r"these \(layers\): 1, 2: run static with more numbers of layers"),
        ([p for p in GOOD if p.layers < 6 or p.tokens > 1e6], r"6 layer\(s\) have losses at only one .*cooldowns=\["),
        ([*GOOD, StaticPoint(1, 1e5, 4.7, 0)], r"loss 4.7 at 1e\+05 tokens.*ln 96 = 4.56 nats.*leave this"),
        ([*GOOD, StaticPoint(1, 1e5, math.nan, 0)], r"loss nan at"),
        ([*GOOD, StaticPoint(1, 0, 2.0, 0)], r"at 0 tokens"),
    ],
)
def test_what_cannot_be_fitted_is_told_in_one_sentence(points, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        fit_laws(SPEC, points)
    assert "\n" not in str(error.value)
