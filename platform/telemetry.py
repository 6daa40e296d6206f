"""Telemetry: what a worker tells the controller at each decision. Fixed shapes, versioned, always finite.

Fields are read and written by the names below. A quantity with a `…_measured` flag means nothing while the flag is 0.
Rows beyond the present ones are zero (`present` = 0), up to the preset's maxima.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import ConfigDict

VERSION = 3  # 2 let learned policies see what HIDDEN names

GLOBALS = (
    "budget_used",  # fraction of the budget spent
    "decisions_left",  # fraction of the decisions still to come
    "growth_left",  # fraction of the budget left before the rate decays, when growing ends
    "growth_decisions_left",  # log10(1 + decisions still to come before that, this one included)
    "decaying",  # 1 once the learning rate decays: no more grafts
    "rate",  # learning rate at this moment and size over the highest the spec allows
    "loss",  # validation loss over ln(vocabulary)
    "train_gap",  # (validation − mean training loss of the last slice) / validation loss
    "train_gap_measured",
    "slope_fast",  # −d ln(validation loss) / d(budget fraction) over the last decision, clipped to ±10
    "slope_slow",  # the same over the last four decisions
    "slopes_measured",
    "since_graft",  # decisions since the last graft over all decisions; 1 if there was none
    "grafts",  # ln(1 + grafts so far)
    "size_vs_start",  # ln(parameters / parameters at the start)
    "size_vs_cap",  # parameters over the most the spec allows
    "tokens_per_parameter",  # log10(1 + tokens seen / non-embedding parameters)
    "steps_left",  # log10(1 + optimizer steps that the rest of the budget holds at this size)
    "rent_rate",  # rent, in nats, that a whole budget at this size would cost
    "gradient_noise",  # standard deviation of the gradient's norm over its mean, in the last slice
    "gradient_noise_measured",
    "last_graft_outcome",  # the last graft: 1 kept, −1 rolled back
    "last_graft_outcome_measured",
)

SITE = (
    "present",
    "depth",  # 0 input, 1 output
    "is_pre_attention",
    "is_post_ffn",
    "is_residual_stream",
    "relative_size",  # parameters at the site over all
    "units",  # ln(1 + heads, neurons or channels)
    "gradient_norm",  # ln(gradient norm / weight norm) at the last step, over 10
    "update_norm",  # ln(norm of the last update / weight norm), over 10
    "norms_measured",
    "on_probation",  # a seed at the site is on probation
    "established",  # a seed at the site has left probation
    "grafts",  # ln(1 + grafts at the site)
    "since_graft",  # decisions since the last graft here over all decisions; 1 if there was none
    "lockout",  # grafts here are blocked for a while after a rollback
    "contribution",  # loss with the newest seed masked minus loss with it, in nats
    "contribution_measured",
)

# Kind of site → its column, which says what may be added there, not to what network: a pair of convolutions takes width
# and gated parts as an MLP does.
SITE_COLUMN = {
    "pre_attention": "is_pre_attention",
    "post_ffn": "is_post_ffn",
    "residual_stream": "is_residual_stream",
    "conv": "is_post_ffn",
    "conv_stream": "is_residual_stream",
}

# Learned policies do not see these: scaling laws cannot show them as runs do, and a policy that learned from what is
# shown there would be misled on text (there a site's gradient norm, for one, does not tell what a graft is worth).
HIDDEN = frozenset(
    f"{name}{flag}" for name in ("train_gap", "gradient_noise", "contribution") for flag in ("", "_measured")
) | {"gradient_norm", "update_norm", "norms_measured"}

OPERATIONS = ("wait", "graft", "prune")
GROWTH_KINDS = ("heads", "width", "expert", "layer")  # expert: a gated part inside a layer

CANDIDATE = (
    "present",
    *(f"is_{operation}" for operation in OPERATIONS),
    *(f"adds_{kind}" for kind in GROWTH_KINDS),
    "parameters",  # ln(parameters after / now)
    "seconds",  # ln(seconds per step after / now), by the clock's formula
    "steps_per_decision",  # log10(1 + optimizer steps that a decision would hold after)
    "steps_measured",
    *(f"site_{name}" for name in SITE),  # the row of its site; zero for WAIT
)


CHECKED = ConfigDict(arbitrary_types_allowed=True, revalidate_instances="always")  # for what another process sent


@dataclass(frozen=True)
class Candidate:
    """A row of `candidates`."""

    __pydantic_config__ = CHECKED

    operation: Literal["wait", "graft", "prune"]
    site: str | None = None
    blueprint: str | None = None

    def __str__(self) -> str:
        if self.operation == "wait":
            return "wait"
        return " ".join(part for part in (self.operation, self.blueprint, "at", self.site) if part)


WAIT = Candidate("wait")


@dataclass(frozen=True)
class TelemetrySpace:
    """The most sites and candidates of a preset: they fix the arrays' sizes."""

    sites: int
    candidates: int

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            "globals": (len(GLOBALS),),
            "sites": (self.sites, len(SITE)),
            "candidates": (self.candidates, len(CANDIDATE)),
            "mask": (self.candidates,),
        }


@dataclass(frozen=True)
class Telemetry:
    """One observation."""

    __pydantic_config__ = CHECKED

    sequence: int  # number of this observation in its episode
    globals: np.ndarray  # float32 (len(GLOBALS),)
    sites: np.ndarray  # float32 (S, len(SITE)), a row per site, then zero rows
    candidates: np.ndarray  # float32 (A, len(CANDIDATE)), a row per possible action, WAIT first, then zero rows
    mask: np.ndarray  # bool (A,), which candidates are legal
    site_ids: tuple[str, ...]  # id of each present row of `sites`
    actions: tuple[Candidate, ...]  # meaning of each present row of `candidates`
    version: int = VERSION  # of this schema

    def get(self, name: str) -> float:
        return float(self.globals[GLOBALS.index(name)])

    def site_column(self, name: str) -> np.ndarray:
        """A site field by name, float32 (present sites,)."""
        return self.sites[: len(self.site_ids), SITE.index(name)]

    def candidate_column(self, name: str) -> np.ndarray:
        """A candidate field by name, float32 (present candidates,)."""
        return self.candidates[: len(self.actions), CANDIDATE.index(name)]

    def legal(self) -> np.ndarray:
        """Indices of the legal candidates, int64, WAIT first."""
        return np.flatnonzero(self.mask)

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays a learned policy sees, by name."""
        return {"globals": self.globals, "sites": self.sites, "candidates": self.candidates, "mask": self.mask}

    def problems(self, space: TelemetrySpace) -> str | None:
        """Why this observation cannot be used (version, shape, not finite), or None."""
        if self.version != VERSION:
            return f"telemetry of version {self.version}, but this code reads version {VERSION}"
        for name, shape in space.shapes.items():
            array, kind = self.arrays()[name], "bool" if name == "mask" else "float32"
            if array.shape != shape or array.dtype != kind or not np.isfinite(array).all():
                return f"{name} is {array.dtype} of shape {array.shape}, but must be finite {kind} of shape {shape}"
        for name, ids in (("sites", self.site_ids), ("candidates", self.actions)):
            if len(ids) != (present := int(self.arrays()[name][:, 0].sum())):
                return f"it names {len(ids)} {name}, but {present} are present"
        if self.mask[len(self.actions) :].any():
            return "a row that stands for no action is legal"
        return None if self.mask[0] else "WAIT is not legal"
