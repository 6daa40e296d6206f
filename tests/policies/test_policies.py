"""The hand-written controllers do what their docstrings say. Runs are SurrogateRuns: real episodes, no training."""

import json
from dataclasses import replace

import numpy as np
import pytest

from esper.pipelines.common.play import play as play_on
from esper.platform.contracts import Instance
from esper.platform.errors import UserError
from esper.platform.spec import load_spec
from esper.platform.telemetry import GLOBALS
from esper.policies.arms import ArmInputs, make_policy
from esper.policies.random import RandomPolicy
from esper.policies.schedule import NAMED, Entry, SchedulePolicy, median_schedule, named_schedule
from esper.policies.static import StaticPolicy
from esper.policies.tamiyo import TamiyoPolicy
from esper.workers.laws.surrogate import SurrogateRun
from tests.workers.growing_run import changed


@pytest.fixture(scope="module")
def spec():
    return load_spec("tinystories-char")


def play(spec, policy, seed=0, **instance):
    run = SurrogateRun(spec)
    run.reset(Instance(**instance), seed)
    return play_on(run, policy, arm="any")


def kinds(spec, policy):
    return [graft["blueprint"] for graft in play(spec, policy)["grafts"]]


def test_random_is_seeded_and_static_never_grows(spec):
    first, again, other = (play(spec, RandomPolicy(seed))["grafts"] for seed in (1, 1, 2))
    assert first == again != other
    assert first
    assert play(spec, StaticPolicy())["grafts"] == []


def test_random_matches_another_run_by_its_summary(spec, tmp_path):
    wanted, path = ["attention", "block", "ffn", "ffn"], tmp_path / "summary.json"
    path.write_text(json.dumps({"grafts": [{"blueprint": kind} for kind in wanted]}))
    for seed in range(3):
        assert sorted(kinds(spec, make_policy("random", ArmInputs(seed=seed, match=path)))) == wanted


def test_schedule_grafts_when_and_where_it_says(spec):
    first, second = Entry(at=0.15, blueprint="block"), Entry(at=0.15, blueprint="block", site="h1.stream")
    policy = SchedulePolicy([Entry(at=0.3, blueprint="ffn", site="h0.ffn"), first, second])
    grafts = play(spec, policy)["grafts"]
    found = [(graft["site"], graft["blueprint"]) for graft in grafts]
    assert found == [("h0.stream", "block"), ("h1.stream", "block"), ("h0.ffn", "ffn")]
    slice_ = 1 / spec.budget.decisions
    for graft, at in zip(grafts, (0.15, 0.15 + slice_, 0.3), strict=True):
        assert at <= graft["budget_fraction"] + 1e-3 < at + 2 * slice_


def test_planned_grafts_that_were_not_played_are_known(spec):
    tight = changed(spec, growth={"max_layers": spec.host.n_layer + 1})
    for policy, left in (
        (SchedulePolicy([Entry(at=0.1, blueprint="block"), Entry(at=0.2, blueprint="block")]), ["block at 20%"]),
        (RandomPolicy(0, matched=["block", "block"]), ["block"]),
    ):
        play(spec, policy)
        assert policy.unplayed() == []
        play(tight, policy)
        assert policy.unplayed() == left


@pytest.mark.parametrize("name", NAMED)
def test_named_schedules_graft_all_that_they_name(spec, name):
    policy = make_policy(name, ArmInputs(spec=spec))
    for decisions in (20, 24, 25):
        own = changed(spec, budget={"decisions": decisions})
        assert kinds(own, policy) == [entry.blueprint for entry in named_schedule(name, "transformer")]
    with pytest.raises(UserError, match=f"blueprint in arm '{name}'"):
        make_policy(name, ArmInputs(spec=load_spec("tinystories-char", ['growth.blueprints={"expert":{}}'])))


def block(fraction, site="wte.stream", blueprint="block"):
    return {"budget_fraction": fraction, "blueprint": blueprint, "site": site}


def ffn(fraction):
    return block(fraction, "h0.ffn", "ffn")


def median(episodes, decisions=8, sites=()):
    entries = median_schedule([{"grafts": grafts} for grafts in episodes], decisions, sites)
    return [(entry.at, entry.blueprint, entry.site) for entry in entries]


def test_the_schedule_is_that_of_the_median_episode():
    alike = [block(0.0), ffn(0.25), block(0.25), ffn(0.5)]
    own = [(0.0, "block"), (0.25, "block"), (0.25, "ffn"), (0.5, "ffn")]
    assert median([alike] * 3) == [(*each, None) for each in own]
    counts = ((0, 1), (1, 0), (2, 0), (2, 0), (9, 1))
    assert median([[block(0.5)] * n + [ffn(0.5)] * m for n, m in counts]) == [(0.5, "block", None)] * 2
    assert median([[], [], [block(0.5)]]) == []
    assert len(median([[], [block(0.5)]])) == 1  # a half counts as one
    episodes = [[block(0.125)], [block(0.25), block(0.5)], [block(0.5), block(0.75)], [block(0.25), block(0.625)]]
    assert [at for at, *_ in median(episodes)] == [0.25, 0.625]  # the j-th by those that have one


def test_an_entry_is_due_at_the_decision_that_it_was_taken_at():
    """Whatever the overshoot past the boundary, and through the telemetry's float32."""
    random = np.random.default_rng(0)
    for decisions, k in ((7, 5), (24, 7), (1000, 3), (1000, 997)):
        taken = [[block((k + share) / decisions)] for share in random.uniform(0, 0.4, 5)]
        [(at, *_)] = median(taken, decisions)
        assert (k - 1 + 0.5) / decisions < at <= np.float32(k / decisions)


def test_a_site_is_named_if_most_took_it_and_every_episode_has_it():
    episodes = [[block(0.5, site)] for site in ("wte.stream", "wte.stream", "h0.stream")]
    assert median(episodes, sites={"wte.stream"}) == [(0.5, "block", "wte.stream")]
    for other, sites in ((episodes, {"h0.stream"}), (episodes[1:], {"wte.stream"})):
        assert median(other, sites=sites) == [(0.5, "block", None)]


@pytest.fixture(scope="module")
def flat(spec):
    """An observation of a two-layer host whose loss is nearly flat, in mid-run."""
    run = SurrogateRun(changed(spec, host={"n_layer": 2}))
    telemetry = run.reset(seed=0)
    for _ in range(6):
        telemetry = run.step(StaticPolicy().act(telemetry)).telemetry
    return other(telemetry, slope_fast=0.01, tokens_per_parameter=6.0)


def other(telemetry, **globals):
    """The observation with other globals."""
    values = telemetry.globals.copy()
    values[[GLOBALS.index(name) for name in globals]] = list(globals.values())
    return replace(telemetry, globals=values)


def test_tamiyo_takes_the_graft_that_is_largest_for_what_its_steps_cost(flat):
    action = TamiyoPolicy().act(flat)
    larger, steps = (flat.candidate_column(name).astype(float) for name in ("parameters", "steps_per_decision"))
    cost = (10 ** steps[0] - 1) / (10**steps - 1)
    rows = [i for i in flat.legal() if i]
    values = [larger[i] / (np.sqrt(cost[i]) - 1) for i in rows]
    assert action.index == max(zip(values, rows, strict=True))[1]
    without = replace(flat, mask=flat.mask & (np.arange(len(flat.mask)) != action.index))
    assert TamiyoPolicy().act(without).index not in (0, action.index)


LIKE_TEXT = {  # about what `esper policy fit` finds on `tinystories-char` at 500,000 parameter-seconds
    "floor": 0.99, "size": 0.315, "size_exponent": 0.52, "data": 0.085, "data_exponent": 1.1,
    "heads": 0.33, "width": 0.88, "layer": 0.13,
}  # fmt: skip


def test_tamiyo_beats_any_static_size_and_random_grafts_of_its_kinds_over_budgets():
    laws = [f"laws.{name}=[{value},{value}]" for name, value in LIKE_TEXT.items()]
    spec = load_spec("tinystories-char", ["budget.amount=500000", "host.n_layer=1", *laws])
    found = {}
    for budget in (1, 2, 4, 8, 16):
        for name, grafts in {"1": [], "256": ["ffn"], "384": ["ffn"] * 2, "512": ["ffn"] * 3, "2": ["block"]}.items():
            nearly_static = SchedulePolicy([Entry(at=0.0, blueprint=blueprint) for blueprint in grafts])
            found.setdefault(name, []).append(play(spec, nearly_static, 1, budget=budget)["val_loss"])
        tamiyo = play(spec, TamiyoPolicy(), 1, budget=budget)
        matched = [graft["blueprint"] for graft in tamiyo["grafts"]]
        found.setdefault("tamiyo", []).append(tamiyo["val_loss"])
        others = [play(spec, RandomPolicy(seed, matched=matched), 1, budget=budget) for seed in range(8)]
        found.setdefault("random", []).append(np.mean([summary["val_loss"] for summary in others]))
        assert matched
        assert found["tamiyo"][-1] < found["random"][-1] + 1e-3
    means = {name: np.mean(losses) for name, losses in found.items()}
    own = means.pop("tamiyo")
    assert own < means.pop("random") - 0.001
    assert own < min(means.values()) - 0.005


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"slope_fast": 3.0, "slope_slow": 3.0}, "still falling"),
        ({"since_graft": 0.04}, "young"),
        ({"steps_left": 2.0}, "can train"),
        ({"slopes_measured": 0.0}, "no slope"),
    ],
)
def test_tamiyo_waits(flat, changed, reason):
    action = TamiyoPolicy().act(other(flat, **changed))
    assert action.index == 0
    assert reason in action.reason
