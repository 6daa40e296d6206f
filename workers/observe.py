"""Computes every field of Telemetry from a run's records."""

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from esper.platform.contracts import HostShape
from esper.platform.spec import RunSpec
from esper.platform.telemetry import CANDIDATE, GLOBALS, SITE, Candidate, Telemetry
from esper.workers.candidates import Option, options, telemetry_space, within_caps
from esper.workers.kasmina.registry import Planted, make_blueprints
from esper.workers.tolaria.rate import rate

SEGMENTS = ("heads", "width")  # kinds of growth that are segments of the host's own matrices
SLOW = 4  # decisions that the slow slope looks back

_SITE = {name: i for i, name in enumerate(SITE)}
_CANDIDATE = {name: i for i, name in enumerate(CANDIDATE)}
_FIRST_OF_SITE = len(CANDIDATE) - len(SITE)


@dataclass(frozen=True)
class Measured:
    """What training measured in the last slice; None or an absent site: not measured."""

    train_loss: float | None = None  # mean, nats per token
    gradient_noise: float | None = None  # standard deviation of the gradient's norm over its mean
    norms: Mapping[str, tuple[float, float]] = field(
        default_factory=dict
    )  # gradient's, last update's, over the weights'
    stages: Mapping[str, tuple[bool, bool]] = field(default_factory=dict)  # a seed is on probation, a seed has left it
    contributions: Mapping[str, float] = field(
        default_factory=dict
    )  # loss with the newest seed masked less that with it


@dataclass(frozen=True)
class Standing:
    """Where a run stands at a decision."""

    sequence: int
    decision: int  # boundaries passed
    decisions: int
    budget: float  # on the spec's axis
    budget_used: float  # fraction spent
    tokens: int
    vocab_size: int
    losses: Sequence[tuple[float, float]]  # (budget fraction, validation loss in nats) at every decision so far
    grafts: Sequence[tuple[int, str]]  # (decision, site id) of every graft so far
    outcome: float | None  # of the last graft: 1 kept, −1 rolled back, None while it is on probation
    lockout: Collection[tuple[str, str]]  # (site id, blueprint) of the grafts that are blocked for a while
    reference: float  # parameter-seconds that cost the rent


@dataclass(frozen=True, eq=False)  # hashed by identity: a cheap cache key
class Layout:
    """The part of observations that only the shape changes: S sites, A candidates in the space, A' present."""

    options: tuple[Option, ...]
    actions: tuple[Candidate, ...]
    parameters: int
    non_embedding: int  # of them, without embeddings and output head
    relative: tuple[float, float]  # ln(parameters / those at the start), and parameters over the most allowed
    step_seconds: float
    axis_per_step: (
        np.ndarray
    )  # a step's use of the budget's axis after each candidate, float64 (A',); ∞ without a shape
    allowed: np.ndarray  # by the caps, bool (A',)
    prunes: np.ndarray  # bool (A',)
    site_of: np.ndarray  # index of each candidate's site, WAIT left out, int64 (A' − 1,)
    site_ids: tuple[str, ...]
    sites: np.ndarray  # float32 (S, F), but for what training changes
    candidates: np.ndarray  # float32 (A, Fc), but for their sites' rows and what the budget decides


class Observer:
    """Makes the observations of a spec's runs, padded to `space`."""

    def __init__(self, spec: RunSpec) -> None:
        self._spec = spec
        self.space = telemetry_space(spec)
        self.blueprints = make_blueprints(spec.growth.blueprints)
        self.layout = lru_cache(maxsize=512)(self._layout)

    def _layout(self, shape: HostShape, newest: tuple[Planted, ...], split: bool, start: HostShape) -> Layout:
        growth, clock = self._spec.growth, self._spec.clock
        axis, tokens = self._spec.budget.axis, batch_tokens(self._spec)
        found = options(shape, self.blueprints.values(), newest)
        parameters = shape.parameters_count()
        cap = growth.max_parameters or start.deepened(growth.max_layers).parameters_count()
        seconds = clock.step_seconds(shape, tokens, split=split)
        table = np.zeros((self.space.candidates, len(CANDIDATE)), dtype=np.float32)
        per_step, allowed = np.full(len(found), math.inf), np.zeros(len(found), dtype=bool)
        for i, option in enumerate(found):
            values = {"present": 1.0, f"is_{option.candidate.operation}": 1.0}
            if option.adds:
                values[f"adds_{option.adds}"] = 1.0
            after, separate = option.after, split or option.adds in SEGMENTS
            if after is not None:
                per_step[i] = clock.axis_per_step(axis, after, tokens, split=separate)
                allowed[i] = within_caps(after, growth.max_layers, growth.max_parameters)
                values["parameters"] = math.log(after.parameters_count() / parameters)
                values["seconds"] = math.log(clock.step_seconds(after, tokens, split=separate) / seconds)
                values["steps_measured"] = 1.0
            for name, value in values.items():
                table[i, _CANDIDATE[name]] = value
        return Layout(
            options=found,
            actions=tuple(option.candidate for option in found),
            parameters=parameters,
            non_embedding=shape.parameters_count(non_embedding=True),
            relative=(math.log(parameters / start.parameters_count()), parameters / cap),
            step_seconds=seconds,
            axis_per_step=per_step,
            allowed=allowed,
            prunes=np.array([option.candidate.operation == "prune" for option in found]),
            site_of=np.array([option.site for option in found[1:]], dtype=np.int64),
            site_ids=tuple(site.id for site in shape.injection_specs()),
            sites=self._site_rows(shape, parameters),
            candidates=table,
        )

    def _site_rows(self, shape: HostShape, parameters: int) -> np.ndarray:
        table = np.zeros((self.space.sites, len(SITE)), dtype=np.float32)
        for row, site in zip(table, shape.injection_specs(), strict=False):
            values = {
                "present": 1.0,
                "depth": site.depth,
                f"is_{site.kind}": 1.0,
                "relative_size": site.parameters / parameters,
                "units": math.log1p(site.units),
                "since_graft": 1.0,
            }
            for name, value in values.items():
                row[_SITE[name]] = value
        return table

    def observe(self, now: Standing, layout: Layout, measured: Measured) -> Telemetry:
        """The observation at a decision: every number finite, rows padded to the space."""
        steps = now.budget / now.decisions / layout.axis_per_step
        count = len(layout.actions)
        sites, candidates = _sites(now, layout, measured), layout.candidates.copy()
        candidates[:count, _CANDIDATE["steps_per_decision"]] = np.log10(1 + steps)
        candidates[1:count, _FIRST_OF_SITE:] = sites[layout.site_of]
        mask = np.zeros(len(candidates), dtype=bool)
        mask[0] = True
        if now.budget_used < self._spec.optimizer.decay_from:
            mask[1:count] = (layout.prunes | (layout.allowed & (steps >= self._spec.growth.min_optimizer_steps)))[1:]
            for i, action in enumerate(layout.actions if now.lockout else ()):
                mask[i] &= action.operation != "graft" or (action.site, action.blueprint) not in now.lockout
        return Telemetry(
            sequence=now.sequence,
            globals=self._globals(now, layout, measured),
            sites=sites,
            candidates=candidates,
            mask=mask,
            site_ids=layout.site_ids,
            actions=layout.actions,
        )

    def _globals(self, now: Standing, layout: Layout, measured: Measured) -> np.ndarray:
        optimizer, loss = self._spec.optimizer, now.losses[-1][1]
        growing = math.ceil(optimizer.decay_from * now.decisions - 1e-9)  # decisions before the rate decays
        whole_steps = now.budget / float(layout.axis_per_step[0])  # that the budget would hold at this size
        whole_cost = whole_steps * layout.step_seconds * layout.parameters
        last = now.grafts[-1][0] if now.grafts else None
        values = {
            "budget_used": now.budget_used,
            "decisions_left": 1 - now.decision / now.decisions,
            "growth_left": max(0.0, optimizer.decay_from - now.budget_used),
            "growth_decisions_left": math.log10(1 + max(0, growing - now.decision)),
            "decaying": float(now.budget_used >= optimizer.decay_from),
            "rate": rate(optimizer, now.budget_used, layout.non_embedding) / optimizer.rate_max,
            "loss": loss / math.log(now.vocab_size),
            "train_gap": 0.0 if measured.train_loss is None else (loss - measured.train_loss) / loss,
            "train_gap_measured": float(measured.train_loss is not None),
            "slope_fast": _slope(now.losses, 1),
            "slope_slow": _slope(now.losses, SLOW),
            "slopes_measured": float(len(now.losses) > 1),
            "since_graft": 1.0 if last is None else (now.decision - last) / now.decisions,
            "grafts": math.log1p(len(now.grafts)),
            "size_vs_start": layout.relative[0],
            "size_vs_cap": layout.relative[1],
            "tokens_per_parameter": math.log10(1 + now.tokens / layout.non_embedding),
            "steps_left": math.log10(1 + whole_steps * (1 - now.budget_used)),
            "rent_rate": self._spec.reward.rent * whole_cost / now.reference,
            "gradient_noise": measured.gradient_noise or 0.0,
            "gradient_noise_measured": float(measured.gradient_noise is not None),
            "last_graft_outcome": now.outcome or 0.0,
            "last_graft_outcome_measured": float(now.outcome is not None),
        }
        return np.array([values[name] for name in GLOBALS], dtype=np.float32)


def batch_tokens(spec: RunSpec) -> int:
    """Tokens of one optimizer step."""
    return spec.data.batch_size * spec.host.block_size


def _slope(losses: Sequence[tuple[float, float]], decisions: int) -> float:
    """−d ln(loss)/d(budget fraction) over the last `decisions` decisions (fewer at the start), within ±10."""
    (u0, before), (u1, after) = losses[max(0, len(losses) - 1 - decisions)], losses[-1]
    if u1 <= u0:
        return 0.0
    return min(10.0, max(-10.0, math.log(before / after) / (u1 - u0)))


def _sites(now: Standing, layout: Layout, measured: Measured) -> np.ndarray:
    table, ids = layout.sites.copy(), layout.site_ids
    if measured.norms:
        norms = [measured.norms.get(site) for site in ids]
        for name, of in (("gradient_norm", 0), ("update_norm", 1)):
            table[: len(ids), _SITE[name]] = [0.0 if norm is None else _log_norm(norm[of]) for norm in norms]
        table[: len(ids), _SITE["norms_measured"]] = [norm is not None for norm in norms]
    values: dict[tuple[str, str], float] = {}
    for site, (probation, established) in measured.stages.items():
        values[site, "on_probation"], values[site, "established"] = probation, established
    for site, contribution in measured.contributions.items():
        values[site, "contribution"], values[site, "contribution_measured"] = contribution, 1.0
    for site, count in Counter(site for _, site in now.grafts).items():
        values[site, "grafts"] = math.log1p(count)
    for decision, site in now.grafts:  # the last one counts
        values[site, "since_graft"] = (now.decision - decision) / now.decisions
    for site, _ in now.lockout:
        values[site, "lockout"] = 1.0
    for (site, name), value in values.items():
        if site in ids:
            table[ids.index(site), _SITE[name]] = value
    return table


def _log_norm(relative: float) -> float:
    return math.log(min(1e20, max(1e-20, relative))) / 10
