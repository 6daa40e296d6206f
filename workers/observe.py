"""From a run's records to Telemetry: the one place where its fields are computed."""

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any, Self

import numpy as np

from esper.platform.clock import ClockSpec
from esper.platform.contracts import HostShape
from esper.platform.ledger import Axis
from esper.platform.spec import RunSpec
from esper.platform.telemetry import CANDIDATE, GLOBALS, SITE, Candidate, Telemetry, TelemetrySpace
from esper.workers.candidates import Options, within_caps
from esper.workers.tolaria.rate import rate

SEGMENTS = ("heads", "width")  # kinds of growth that are segments of the host's own matrices
SLOW = 4  # decisions that the slow slope looks back

_SITE = {name: i for i, name in enumerate(SITE)}
_CANDIDATE = {name: i for i, name in enumerate(CANDIDATE)}
_STEPS = _CANDIDATE["steps_per_decision"]
_FIRST_OF_SITE = len(CANDIDATE) - len(SITE)


@dataclass(frozen=True)
class Measured:
    """What training measured in the last slice; None and absent sites mean: not measured.

    Attributes:
        train_loss: mean training loss, nats per token.
        gradient_noise: standard deviation of the gradient's norm over its mean.
        norms: site id → (gradient norm, norm of the last update), both over the site's weight norm.
        stages: site id → (a seed is on probation, a seed has left it).
        contributions: site id → loss with its newest seed masked less the loss with it, in nats.
    """

    train_loss: float | None = None
    gradient_noise: float | None = None
    norms: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    stages: Mapping[str, tuple[bool, bool]] = field(default_factory=dict)
    contributions: Mapping[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Moment:
    """Where a run stands at a decision.

    Attributes:
        losses: (budget fraction, validation loss in nats) at every decision so far, the first at 0.
        grafts: (decision, site id) of every graft so far.
        outcome: of the last graft: 1 kept, −1 rolled back, None while it is on probation.
        lockout: (site id, blueprint) of the grafts that are blocked for a while after a rollback.
    """

    sequence: int
    decision: int
    decisions: int
    budget_used: float
    decaying: bool
    tokens: int
    vocab_size: int
    losses: Sequence[tuple[float, float]]
    grafts: Sequence[tuple[int, str]]
    outcome: float | None
    lockout: Collection[tuple[str, str]]
    reference: float  # parameter-seconds that cost the rent


@dataclass(frozen=True)
class Pricing:
    """What of a spec candidates are priced and allowed by. Hashable, so that a process's runs share what is laid out.

    Attributes:
        space: whose sizes the tables are padded to.
        clock: of the spec.
        axis: of its budget.
        tokens: of an optimizer step.
        max_layers: that a run may have.
        max_parameters: that a run may have.
    """

    space: TelemetrySpace
    clock: ClockSpec
    axis: Axis
    tokens: int
    max_layers: int
    max_parameters: int | None

    @classmethod
    def of(cls, spec: RunSpec, space: TelemetrySpace) -> Self:
        """That of a spec."""
        growth = spec.growth
        return cls(space, spec.clock, spec.budget.axis, batch_tokens(spec), growth.max_layers, growth.max_parameters)


@dataclass(frozen=True)
class Layout:
    """What of the observations only a change of shape changes, which is most of the work.

    Attributes:
        found: the candidates it is of.
        split: whether some seed's segments are separate tensors.
        parameters: of the shape; `non_embedding` of them without embeddings and output head.
        relative: ln(parameters / those at the start), and parameters over the most the spec allows.
        step_seconds: of an optimizer step.
        site_ids: of the sites.
        sites: their table, but for what training changes, float32 (S, F).
        candidates: the candidates' table, but for their sites' rows and what the budget decides, float32 (A, Fc).
        axis_per_step: what a step of each present candidate uses on the budget's axis; None where there is no shape.
        allowed: whether the caps allow each present candidate.
        site_of: index of each present candidate's site, WAIT left out, int64 (A' − 1,).
        actions: what each present candidate stands for.
    """

    found: Options
    split: bool
    parameters: int
    non_embedding: int
    relative: tuple[float, float]
    step_seconds: float
    site_ids: tuple[str, ...]
    sites: np.ndarray
    candidates: np.ndarray
    axis_per_step: tuple[float | None, ...]
    allowed: tuple[bool, ...]
    site_of: np.ndarray
    actions: tuple[Candidate, ...]


@lru_cache(maxsize=512)
def lay_out(pricing: Pricing, found: Options, split: bool, start: HostShape) -> Layout:
    """The layout of a shape's candidates (the first, WAIT, leads to the shape itself).

    Args:
        pricing: of the run's spec.
        found: every candidate.
        split: whether some seed's segments are separate tensors.
        start: the shape that the run started with.
    """
    shape = found[0].after
    assert shape is not None
    parameters = shape.parameters_count()
    cap = pricing.max_parameters or start.deepened(pricing.max_layers).parameters_count()
    seconds = pricing.clock.step_seconds(shape, pricing.tokens, split=split)
    ids, sites = _site_rows(pricing.space, shape, parameters)
    return Layout(
        found=found,
        split=split,
        parameters=parameters,
        non_embedding=shape.parameters_count(non_embedding=True),
        relative=(math.log(parameters / start.parameters_count()), parameters / cap),
        step_seconds=seconds,
        site_ids=ids,
        sites=sites,
        **_candidate_rows(pricing, found, split, parameters, seconds),
        site_of=np.array([option.site for option in found[1:]], dtype=np.int64),
        actions=tuple(option.candidate for option in found),
    )


@dataclass(frozen=True)
class Priced:
    """A layout under a budget.

    Attributes:
        layout: the layout.
        whole_steps: optimizer steps that the whole budget holds at this size.
        whole_cost: their parameter-seconds.
        candidates: the layout's, complete but for the sites' rows, float32 (A, Fc).
        fits: which candidates are legal while the rate does not decay, lockout left out, bool (A,).
    """

    layout: Layout
    whole_steps: float
    whole_cost: float
    candidates: np.ndarray
    fits: np.ndarray

    def __deepcopy__(self, memo: Any) -> Self:
        return self  # never changed: a run's forks share it

    @classmethod
    def of(cls, layout: Layout, budget: float, decisions: int, min_steps: int) -> Self:
        """The layout under a budget (in the spec's axis) of so many decisions, each to hold at least `min_steps`."""
        assert layout.axis_per_step[0] is not None
        whole_steps = budget / layout.axis_per_step[0]
        candidates, fits = layout.candidates.copy(), np.zeros(len(layout.candidates), dtype=bool)
        steps = [None if each is None else budget / decisions / each for each in layout.axis_per_step]
        candidates[: len(steps), _STEPS] = [0.0 if each is None else math.log10(1 + each) for each in steps]
        fits[: len(steps)] = [
            each is not None and (action.operation == "prune" or (each >= min_steps and allowed))
            for each, action, allowed in zip(steps, layout.actions, layout.allowed, strict=True)
        ]
        return cls(layout, whole_steps, whole_steps * layout.step_seconds * layout.parameters, candidates, fits)


def observe(spec: RunSpec, moment: Moment, priced: Priced, measured: Measured) -> Telemetry:
    """The observation at a decision: every number finite, rows padded to the space of the layout."""
    layout = priced.layout
    sites, candidates = _sites(moment, layout, measured), priced.candidates.copy()
    candidates[1 : len(layout.actions), _FIRST_OF_SITE:] = sites[layout.site_of]
    return Telemetry(
        sequence=moment.sequence,
        globals=_globals(spec, moment, priced, measured),
        sites=sites,
        candidates=candidates,
        mask=_mask(moment, priced),
        site_ids=layout.site_ids,
        actions=layout.actions,
    )


def batch_tokens(spec: RunSpec) -> int:
    """Tokens of one optimizer step."""
    return spec.data.batch_size * spec.host.block_size


def _globals(spec: RunSpec, moment: Moment, priced: Priced, measured: Measured) -> np.ndarray:
    layout, loss = priced.layout, moment.losses[-1][1]
    decay_from = spec.optimizer.decay_from
    last = moment.grafts[-1][0] if moment.grafts else None
    values = {
        "budget_used": moment.budget_used,
        "decisions_left": 1 - moment.decision / moment.decisions,
        "growth_left": max(0.0, decay_from - moment.budget_used),
        "growth_decisions_left": math.log10(
            1 + max(0, math.ceil(decay_from * moment.decisions - 1e-9) - moment.decision)
        ),
        "decaying": float(moment.decaying),
        "rate": rate(spec.optimizer, moment.budget_used, layout.non_embedding) / spec.optimizer.rate_max,
        "loss": loss / math.log(moment.vocab_size),
        "train_gap": 0.0 if measured.train_loss is None else (loss - measured.train_loss) / loss,
        "train_gap_measured": float(measured.train_loss is not None),
        "slope_fast": _slope(moment.losses, 1),
        "slope_slow": _slope(moment.losses, SLOW),
        "slopes_measured": float(len(moment.losses) > 1),
        "since_graft": 1.0 if last is None else (moment.decision - last) / moment.decisions,
        "grafts": math.log1p(len(moment.grafts)),
        "size_vs_start": layout.relative[0],
        "size_vs_cap": layout.relative[1],
        "tokens_per_parameter": math.log10(1 + moment.tokens / layout.non_embedding),
        "steps_left": math.log10(1 + priced.whole_steps * (1 - moment.budget_used)),
        "rent_rate": spec.reward.rent * priced.whole_cost / moment.reference,
        "gradient_noise": measured.gradient_noise or 0.0,
        "gradient_noise_measured": float(measured.gradient_noise is not None),
        "last_graft_outcome": moment.outcome or 0.0,
        "last_graft_outcome_measured": float(moment.outcome is not None),
    }
    return np.array([values.get(name, 0.0) for name in GLOBALS], dtype=np.float32)


def _slope(losses: Sequence[tuple[float, float]], decisions: int) -> float:
    """−d ln(loss)/d(budget fraction) over the last `decisions` decisions (fewer at the start), within ±10."""
    (u0, before), (u1, after) = losses[max(0, len(losses) - 1 - decisions)], losses[-1]
    if u1 <= u0:
        return 0.0
    return min(10.0, max(-10.0, math.log(before / after) / (u1 - u0)))


def _site_rows(space: TelemetrySpace, shape: HostShape, total: int) -> tuple[tuple[str, ...], np.ndarray]:
    table = np.zeros((space.sites, len(SITE)), dtype=np.float32)
    specs = shape.injection_specs()
    for i, site in enumerate(specs):
        values = {
            "present": 1.0,
            "depth": site.depth,
            f"is_{site.kind}": 1.0,
            "relative_size": site.parameters / total,
            "units": math.log1p(site.units),
            "since_graft": 1.0,
        }
        for name, value in values.items():
            table[i, _SITE[name]] = value
    return tuple(site.id for site in specs), table


def _sites(moment: Moment, layout: Layout, measured: Measured) -> np.ndarray:
    table = layout.sites.copy()
    ids = layout.site_ids
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
    for site, count in Counter(site for _, site in moment.grafts).items():
        values[site, "grafts"] = math.log1p(count)
    for decision, site in moment.grafts:  # the last one counts
        values[site, "since_graft"] = (moment.decision - decision) / moment.decisions
    for site, _ in moment.lockout:
        values[site, "lockout"] = 1.0
    for (site, name), value in values.items():
        if site in ids:
            table[ids.index(site), _SITE[name]] = value
    return table


def _log_norm(relative: float) -> float:
    return math.log(min(1e20, max(1e-20, relative))) / 10


def _candidate_rows(pricing: Pricing, found: Options, split: bool, parameters: int, seconds: float) -> dict[str, Any]:
    table = np.zeros((pricing.space.candidates, len(CANDIDATE)), dtype=np.float32)
    clock, axis, tokens = pricing.clock, pricing.axis, pricing.tokens
    per_step: list[float | None] = []
    allowed = []
    for i, option in enumerate(found):
        values = {"present": 1.0, f"is_{option.candidate.operation}": 1.0}
        if option.adds:
            values[f"adds_{option.adds}"] = 1.0
        after = option.after
        if after is None:
            per_step.append(None)
            allowed.append(False)
        else:
            after_split, size = split or option.adds in SEGMENTS, after.parameters_count()
            per_step.append(clock.axis_per_step(axis, after, tokens, split=after_split))
            allowed.append(within_caps(after, pricing.max_layers, pricing.max_parameters))
            values["parameters"] = math.log(size / parameters)
            values["seconds"] = math.log(clock.step_seconds(after, tokens, split=after_split) / seconds)
            values["steps_measured"] = 1.0
        for name, value in values.items():
            table[i, _CANDIDATE[name]] = value
    return {"candidates": table, "axis_per_step": tuple(per_step), "allowed": tuple(allowed)}


def _mask(moment: Moment, priced: Priced) -> np.ndarray:
    mask = np.zeros_like(priced.fits) if moment.decaying else priced.fits.copy()
    mask[0] = True
    if moment.lockout:
        for i, action in enumerate(priced.layout.actions):
            if action.operation == "graft" and (action.site, action.blueprint) in moment.lockout:
                mask[i] = False
    return mask
