"""Telemetry: every candidate action at a shape, and every field, from the registry and a run's records."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np

from esper.platform.contracts import HostShape, InjectionSpec
from esper.platform.spec import RunSpec
from esper.platform.telemetry import CANDIDATE, GLOBALS, SITE, SITE_COLUMN, WAIT, Candidate, Telemetry, TelemetrySpace
from esper.workers.kasmina.registry import Blueprint, Planted, blueprints_of
from esper.workers.tolaria.hosts import start_shape

SLOW = 4  # decisions that the slow slope looks back
OUTCOMES = {"kept": 1.0, "rolled back": -1.0}  # of the last graft, as telemetry tells them

GlobalMeasured = Literal["train_gap", "gradient_noise"]
Run = Any  # an `Episode`, whose module imports this one

_SITE = {name: i for i, name in enumerate(SITE)}
_FIRST_OF_SITE = len(CANDIDATE) - len(SITE)


@dataclass(frozen=True)
class Measured:
    """What training measured in the last slice, by telemetry's names; what is absent was not measured."""

    globals: Mapping[GlobalMeasured, float] = field(default_factory=dict)
    sites: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # site id → field → value


class Option(NamedTuple):
    """A candidate and what it leads to."""

    candidate: Candidate
    site: int  # index of its site among the shape's; −1 for WAIT
    adds: str  # one of `telemetry.GROWTH_KINDS`; empty for WAIT
    after: HostShape | None  # the shape it leads to; None where the blueprint's own limit forbids it


@dataclass(frozen=True, eq=False)  # hashed by identity: a cheap cache key
class Layout:
    """The part of observations that only the shape changes: S sites, A candidates in the space, A' present."""

    options: tuple[Option, ...]
    actions: tuple[Candidate, ...]
    parameters: int
    non_embedding: int  # of them, without embeddings and output head
    flops_per_token: int
    step_seconds: float
    size: Mapping[str, float]  # the two globals that only the shape changes
    axis_per_step: np.ndarray  # a step's use of the budget's axis after each candidate, float64 (A',); ∞: no shape
    least_steps: np.ndarray  # that a decision must hold for a candidate to be legal, float64 (A',); ∞: beyond the caps
    site_of: np.ndarray  # index of each candidate's site, WAIT left out, int64 (A' − 1,)
    site_ids: tuple[str, ...]
    sites: np.ndarray  # float32 (S, F), but for what training changes
    candidates: np.ndarray  # float32 (A, Fc), but for their sites' rows and what the budget decides


class Observer:
    """Makes the observations of a spec's runs, padded to `space`; `born`: of a host that is not the spec's."""

    def __init__(self, spec: RunSpec, born: HostShape | None = None, tokens_per_step: int | None = None) -> None:
        self._spec, self._tokens = spec, tokens_per_step or batch_tokens(spec)
        self.space = telemetry_space(spec, born)
        self.blueprints = blueprints_of(spec.growth)
        self.layout = lru_cache(maxsize=512)(self._layout)

    def _layout(self, shape: HostShape, newest: tuple[Planted, ...], start: HostShape) -> Layout:
        growth, clock = self._spec.growth, self._spec.clock
        axis, tokens = self._spec.budget.axis, self._tokens
        found, sites = options(shape, self.blueprints.values(), newest), shape.injection_specs()
        parameters, seconds = shape.parameters_count(), clock.step_seconds(shape, tokens)
        most = growth.max_parameters or start.deepened(growth.max_layers).parameters_count()
        per_step, least_steps = np.full((2, len(found)), math.inf)
        rows = []
        for i, (candidate, _, adds, after) in enumerate(found):
            row = {"present": 1.0, f"is_{candidate.operation}": 1.0} | ({f"adds_{adds}": 1.0} if adds else {})
            if after is not None:
                per_step[i] = clock.axis_per_step(axis, after, tokens)
                row["parameters"] = math.log(after.parameters_count() / parameters)
                row["seconds"] = math.log(clock.step_seconds(after, tokens) / seconds)
                row["steps_measured"] = 1.0
                if candidate.operation != "graft":
                    least_steps[i] = 0
                elif within_caps(after, growth.max_layers, growth.max_parameters):
                    least_steps[i] = growth.min_optimizer_steps
            rows.append(row)
        return Layout(
            options=found,
            actions=tuple(option.candidate for option in found),
            parameters=parameters,
            non_embedding=shape.parameters_count(non_embedding=True),
            flops_per_token=shape.flops_per_token(),
            step_seconds=seconds,
            size={"size_vs_start": math.log(parameters / start.parameters_count()), "size_vs_cap": parameters / most},
            axis_per_step=per_step,
            least_steps=least_steps,
            site_of=np.array([option.site for option in found[1:]], dtype=np.int64),
            site_ids=tuple(site.id for site in sites),
            sites=_table([_site_row(site, parameters) for site in sites], SITE, self.space.sites),
            candidates=_table(rows, CANDIDATE, self.space.candidates),
        )

    def observe(self, run: Run, measured: Measured) -> Telemetry:
        """The observation at a decision: every number finite, rows padded to the space."""
        layout, clock = run.layout, run.clock
        lockout = {(site, blueprint) for site, blueprint, until in run.lockout if clock.passed < until}
        steps = clock.amount / clock.decisions / layout.axis_per_step
        count = len(layout.actions)
        sites, candidates = _sites(run, measured, lockout), layout.candidates.copy()
        candidates[:count, CANDIDATE.index("steps_per_decision")] = np.log10(1 + steps)
        candidates[1:count, _FIRST_OF_SITE:] = sites[layout.site_of]
        mask = np.zeros(len(candidates), dtype=bool)
        if run.fraction() < self._spec.optimizer.decay_from:
            mask[:count] = steps >= layout.least_steps
            for i, action in enumerate(layout.actions if lockout else ()):
                mask[i] &= action.operation != "graft" or (action.site, action.blueprint) not in lockout
        mask[0] = True
        flags = {f"{name}_measured": 1.0 for name in measured.globals}
        values = {**self._globals(run), **measured.globals, **flags}
        table = _table([values], GLOBALS, 1)[0]
        return Telemetry(run.sequence, table, sites, candidates, mask, layout.site_ids, layout.actions)

    def _globals(self, run: Run) -> dict[str, float]:
        optimizer, layout, clock, used = self._spec.optimizer, run.layout, run.clock, run.fraction()
        losses = run.seen()
        growing = math.ceil(optimizer.decay_from * clock.decisions - 1e-9)  # decisions before the rate decays
        whole_steps = clock.amount / float(layout.axis_per_step[0])  # that the budget would hold at this size
        whole_cost = whole_steps * layout.step_seconds * layout.parameters
        outcome = OUTCOMES.get(run.grafts[-1].outcome or "") if run.grafts else None
        return dict(layout.size) | {
            "budget_used": used,
            "decisions_left": 1 - clock.passed / clock.decisions,
            "growth_left": max(0.0, optimizer.decay_from - used),
            "growth_decisions_left": math.log10(1 + max(0, growing - clock.passed)),
            "decaying": float(used >= optimizer.decay_from),
            "rate": run.host_rate() / optimizer.rate_max,
            "loss": losses[-1][1] / math.log(run.vocab_size),
            "slope_fast": _slope(losses, 1),
            "slope_slow": _slope(losses, SLOW),
            "slopes_measured": float(len(losses) > 1),
            "since_graft": (clock.passed - run.grafted[-1][0]) / clock.decisions if run.grafted else 1.0,
            "grafts": math.log1p(len(run.grafted)),
            "tokens_per_parameter": math.log10(1 + run.ledger.tokens / layout.non_embedding),
            "steps_left": math.log10(1 + whole_steps * (1 - used)),
            "rent_rate": self._spec.reward.rent * whole_cost / run.reference,
            "last_graft_outcome": outcome or 0.0,
            "last_graft_outcome_measured": float(outcome is not None),
        }


def options(shape: HostShape, blueprints: Iterable[Blueprint], newest: Iterable[Planted] = ()) -> tuple[Option, ...]:
    """WAIT, then per site from input to output each accepted blueprint and the prune of the newest seed."""
    found = [Option(WAIT, -1, "", shape)]
    seeds = {seed.site: seed for seed in newest}
    by_name = {blueprint.name: blueprint for blueprint in blueprints}
    for i, site in enumerate(shape.injection_specs()):
        for blueprint in by_name.values():
            if blueprint.name in site.blueprints:
                after = blueprint.resized(shape, site.id) if blueprint.allowed(shape, site.id) else None
                found.append(Option(Candidate("graft", site.id, blueprint.name), i, blueprint.adds, after))
        if seed := seeds.get(site.id):
            blueprint = by_name[seed.blueprint]
            after = blueprint.pruned(shape, seed)
            found.append(Option(Candidate("prune", site.id, seed.blueprint), i, blueprint.adds, after))
    return tuple(found)


def within_caps(shape: HostShape, max_layers: int, max_parameters: int | None) -> bool:
    """Whether `GrowthSpec`'s caps allow this shape."""
    return shape.depth() <= max_layers and (max_parameters is None or shape.parameters_count() <= max_parameters)


def telemetry_space(spec: RunSpec, born: HostShape | None = None) -> TelemetrySpace:
    """A spec's fixed telemetry sizes: those of the deepest shape of its host, or one `born` so, and a prune a site."""
    blueprints = blueprints_of(spec.growth).values()
    start = born or start_shape(spec, vocab_size=1)  # the vocabulary changes no count
    deepest = start.deepened(spec.growth.max_layers)
    sites = len(deepest.injection_specs())
    return TelemetrySpace(sites=sites, candidates=len(options(deepest, blueprints)) + sites)


def batch_tokens(spec: RunSpec) -> int:
    """Tokens of one optimizer step."""
    return spec.data.batch_size * spec.host.tokens


def norm_fields(gradient: float, update: float) -> dict[str, float]:
    """A site's fields for the norms of gradient and last update over the weights' norm."""
    logs = (math.log(min(1e20, max(1e-20, norm))) / 10 for norm in (gradient, update))
    return dict(zip(("gradient_norm", "update_norm", "norms_measured"), (*logs, 1.0), strict=True))


def _slope(losses: Sequence[tuple[float, float]], decisions: int) -> float:
    """−d ln(loss)/d(budget fraction) over the last `decisions` decisions (fewer at the start), within ±10."""
    (u0, before), (u1, after) = losses[max(0, len(losses) - 1 - decisions)], losses[-1]
    if u1 <= u0:
        return 0.0
    return min(10.0, max(-10.0, math.log(before / after) / (u1 - u0)))


def _table(rows: Iterable[Mapping[str, float]], names: Sequence[str], size: int) -> np.ndarray:
    """Rows of values by field, float32 (size, fields); what is absent is zero."""
    table = np.zeros((size, len(names)), dtype=np.float32)
    for row, values in zip(table, rows, strict=False):
        for name, value in values.items():
            row[names.index(name)] = value
    return table


def _site_row(site: InjectionSpec, parameters: int) -> dict[str, float]:
    return {
        "present": 1.0,
        "depth": site.depth,
        SITE_COLUMN[site.kind]: 1.0,
        "relative_size": site.parameters / parameters,
        "units": math.log1p(site.units),
        "since_graft": 1.0,
    }


def _sites(run: Run, measured: Measured, lockout: Iterable[tuple[str, str]]) -> np.ndarray:
    layout, clock = run.layout, run.clock
    table, row_of = layout.sites.copy(), {site: i for i, site in enumerate(layout.site_ids)}
    values = {(site, name): value for site, fields in measured.sites.items() for name, value in fields.items()}
    for site, count in Counter(site for _, site in run.grafted).items():
        values[site, "grafts"] = math.log1p(count)
    for passed, site in run.grafted:  # the last one counts
        values[site, "since_graft"] = (clock.passed - passed) / clock.decisions
    for site, _ in lockout:
        values[site, "lockout"] = 1.0
    for (site, name), value in values.items():
        if site in row_of and name in _SITE:
            table[row_of[site], _SITE[name]] = value
    return table
