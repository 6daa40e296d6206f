"""From a run's records to Telemetry: the one place where its fields are computed."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from esper.platform.contracts import HostShape
from esper.platform.spec import RunSpec
from esper.platform.telemetry import CANDIDATE, GLOBALS, SITE, Telemetry, TelemetrySpace
from esper.workers.candidates import Option, within_caps
from esper.workers.tolaria.rate import rate

SEGMENTS = ("heads", "width")  # kinds of growth that are segments of the host's own matrices
SLOW = 4  # decisions that the slow slope looks back


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
        cooling: (site id, blueprint) of the grafts that are blocked for a while after a rollback.
    """

    sequence: int
    decision: int
    decisions: int
    budget_used: float
    decaying: bool
    tokens: int
    vocab_size: int
    start: HostShape
    shape: HostShape
    split: bool  # whether some seed's segments are separate tensors
    losses: Sequence[tuple[float, float]]
    grafts: Sequence[tuple[int, str]]
    outcome: float | None
    cooling: Collection[tuple[str, str]]
    budget: float  # in the spec's axis
    reference: float  # parameter-seconds that cost the rent


def observe(
    spec: RunSpec, space: TelemetrySpace, moment: Moment, found: Sequence[Option], measured: Measured
) -> Telemetry:
    """The observation at a decision: every number finite, rows padded to `space`."""
    sites, ids = _sites(space, moment, measured)
    candidates, mask = _candidates(spec, space, moment, found, sites)
    return Telemetry(
        sequence=moment.sequence,
        globals=_globals(spec, moment, measured),
        sites=sites,
        candidates=candidates,
        mask=mask,
        site_ids=ids,
        actions=tuple(option.candidate for option in found),
    )


def batch_tokens(spec: RunSpec) -> int:
    """Tokens of one optimizer step."""
    return spec.data.batch_size * spec.host.block_size


def _globals(spec: RunSpec, moment: Moment, measured: Measured) -> np.ndarray:
    shape, tokens = moment.shape, batch_tokens(spec)
    parameters = shape.parameters_count()
    cap = spec.growth.max_parameters or moment.start.deepened(spec.growth.max_layers).parameters_count()
    loss = moment.losses[-1][1]
    whole_steps = moment.budget / spec.clock.axis_per_step(spec.budget.axis, shape, tokens, split=moment.split)
    whole_cost = whole_steps * spec.clock.step_seconds(shape, tokens, split=moment.split) * parameters
    decay_from = spec.optimizer.decay_from
    last = moment.grafts[-1][0] if moment.grafts else None
    values = {
        "budget_used": moment.budget_used,
        "decisions_left": 1 - moment.decision / moment.decisions,
        "growth_left": max(0.0, decay_from - moment.budget_used),
        "moments_left": math.log10(1 + max(0, math.ceil(decay_from * moment.decisions - 1e-9) - moment.decision)),
        "decaying": float(moment.decaying),
        "rate": rate(spec.optimizer, moment.budget_used, shape.parameters_count(non_embedding=True))
        / spec.optimizer.rate_max,
        "loss": loss / math.log(moment.vocab_size),
        "train_gap": 0.0 if measured.train_loss is None else (loss - measured.train_loss) / loss,
        "train_gap_measured": float(measured.train_loss is not None),
        "slope_fast": _slope(moment.losses, 1),
        "slope_slow": _slope(moment.losses, SLOW),
        "slopes_measured": float(len(moment.losses) > 1),
        "since_graft": 1.0 if last is None else (moment.decision - last) / moment.decisions,
        "grafts": math.log1p(len(moment.grafts)),
        "size_vs_start": math.log(parameters / moment.start.parameters_count()),
        "size_vs_cap": parameters / cap,
        "tokens_per_parameter": math.log10(1 + moment.tokens / shape.parameters_count(non_embedding=True)),
        "steps_left": math.log10(1 + whole_steps * (1 - moment.budget_used)),
        "rent_rate": spec.reward.rent * whole_cost / moment.reference,
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
    return float(np.clip(math.log(before / after) / (u1 - u0), -10, 10))


def _sites(space: TelemetrySpace, moment: Moment, measured: Measured) -> tuple[np.ndarray, tuple[str, ...]]:
    table = np.zeros((space.sites, len(SITE)), dtype=np.float32)
    specs = moment.shape.injection_specs()
    total = moment.shape.parameters_count()
    for i, site in enumerate(specs):
        here = [decision for decision, site_id in moment.grafts if site_id == site.id]
        gradient, update = measured.norms.get(site.id, (None, None))
        contribution = measured.contributions.get(site.id)
        probation, established = measured.stages.get(site.id, (False, False))
        values = {
            "present": 1.0,
            "depth": site.depth,
            f"is_{site.kind}": 1.0,
            "relative_size": site.parameters / total,
            "units": math.log1p(site.units),
            "gradient_norm": _log_norm(gradient),
            "update_norm": _log_norm(update),
            "norms_measured": float(gradient is not None),
            "on_probation": float(probation),
            "established": float(established),
            "grafts": math.log1p(len(here)),
            "since_graft": (moment.decision - here[-1]) / moment.decisions if here else 1.0,
            "cooling": float(any(cooled == site.id for cooled, _ in moment.cooling)),
            "contribution": contribution or 0.0,
            "contribution_measured": float(contribution is not None),
        }
        table[i] = [values.get(name, 0.0) for name in SITE]
    return table, tuple(site.id for site in specs)


def _log_norm(relative: float | None) -> float:
    return 0.0 if relative is None else math.log(min(1e20, max(1e-20, relative))) / 10


def _candidates(
    spec: RunSpec, space: TelemetrySpace, moment: Moment, found: Sequence[Option], sites: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    table = np.zeros((space.candidates, len(CANDIDATE)), dtype=np.float32)
    mask = np.zeros(space.candidates, dtype=bool)
    tokens, slice_ = batch_tokens(spec), moment.budget / moment.decisions
    parameters = moment.shape.parameters_count()
    seconds = spec.clock.step_seconds(moment.shape, tokens, split=moment.split)
    first_of_site = len(CANDIDATE) - len(SITE)
    for i, option in enumerate(found):
        values = {"present": 1.0, f"is_{option.candidate.operation}": 1.0, f"adds_{option.adds}": 1.0}
        if option.after is not None:
            split = moment.split or option.adds in SEGMENTS
            after_seconds = spec.clock.step_seconds(option.after, tokens, split=split)
            steps = slice_ / spec.clock.axis_per_step(spec.budget.axis, option.after, tokens, split=split)
            values |= {
                "parameters": math.log(option.after.parameters_count() / parameters),
                "seconds": math.log(after_seconds / seconds),
                "steps_per_decision": math.log10(1 + steps),
                "steps_measured": 1.0,
            }
            enough = steps >= spec.growth.min_optimizer_steps
            cooled = (option.candidate.site, option.candidate.blueprint) in moment.cooling
            fits = option.candidate.operation == "prune" or (enough and not cooled and within_caps(spec, option.after))
            mask[i] = i == 0 or (not moment.decaying and fits)
        table[i, :first_of_site] = [values.get(name, 0.0) for name in CANDIDATE[:first_of_site]]
        if option.site >= 0:
            table[i, first_of_site:] = sites[option.site]
    return table, mask
