"""What workers and policies promise each other; `platform/telemetry.py` lists the observation's fields."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, Self, runtime_checkable

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError, model_validator

from esper.platform.errors import UserError, clipped
from esper.platform.frozen import Frozen
from esper.platform.telemetry import CHECKED, Telemetry

if TYPE_CHECKING:
    from esper.platform.law_file import FittedLaws

Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
SiteKind = Literal["pre_attention", "post_ffn", "residual_stream", "conv", "conv_stream"]  # telemetry.SITE_COLUMN


@dataclass(frozen=True)
class InjectionSpec:
    """A site: a place where a host can grow."""

    id: str  # stable for the life of the site, whatever grows around it
    kind: SiteKind  # what lies there
    depth: float  # position in the network, 0 (input) to 1 (output)
    blueprints: tuple[str, ...]  # names of those that the site accepts
    units: int  # heads, neurons or channels at the site; 0 where nothing is counted (the residual stream)
    parameters: int  # at the site now


@runtime_checkable
class HostShape(Protocol):
    """A host without its tensors: its sites and its cost. Frozen and hashable."""

    def injection_specs(self) -> tuple[InjectionSpec, ...]: ...  # the sites, from input to output
    # Tied ones counted once; `non_embedding` leaves out embeddings (of an image: the stem) and output head.
    def parameters_count(self, *, non_embedding: bool = False) -> int: ...
    def attention_parameters(self) -> int: ...  # of them, those of heads: a loss law tells them from others
    # FLOPs of one training step (forward and backward) per token, an image being one.
    def flops_per_token(self) -> int: ...
    def depth(self) -> int: ...  # layers: what the reference clock charges a fixed time for
    def experts(self) -> int: ...  # gated parts inside layers: they cost a fixed time too
    def expert_parameters(self) -> int: ...  # of these; a law tells them apart too
    def totals(self) -> tuple[int, ...]: ...  # counts on which alone its sizes and costs depend
    def parts(self) -> list[str]: ...  # names of what may have been inserted: layers, and parts inside them
    def part_after(self, other: Any) -> str: ...  # the name of the one part that `other` lacks
    def layers_as_json(self) -> list[dict[str, Any]]: ...  # each layer's shape, as `host.layers` takes it
    def without(self, name: str) -> "HostShape": ...  # the shape without an inserted part
    def deepened(self, n_layer: int) -> "HostShape": ...  # with that many layers: the most sites of a run


@dataclass(frozen=True)
class Resized:
    """A parameter that takes another's place, in the model and in its optimizer."""

    new: Any  # `old` with more at the end of `axis`, or its leading part
    old: Any
    axis: int


class HostProtocol(Protocol):
    """What Kasmina asks of a model, of any domain: units (heads, neurons, channels) lie between a pair of linear maps.

    Parts are modules (layers, experts) that the host names.
    """

    @property
    def shape(self) -> HostShape: ...  # the shape now: frozen and hashable
    def parameters(self) -> Iterator[Any]: ...  # every parameter, once
    # Modules with `weight` (and `bias`): incoming, which grows along axis 0, and outgoing, the last, along axis 1.
    # Those between them act on each unit alone and grow along axis 0 (a norm; its running mean and variance too).
    def linears(self, site_id: str) -> tuple[Any, ...]: ...
    # Insert, uninitialised, the part that only `shape` has: (its name, [(parameter, sibling's parameter)]).
    def insert(self, site_id: str, shape: Any) -> tuple[str, list[tuple[Any, Any]]]: ...
    def part(self, name: str) -> Any: ...  # the module of an inserted part; None when it is gone
    def remove(self, name: str) -> list[Any]: ...  # take an inserted part out; returns every parameter that is gone
    def stream_sizes(self) -> dict[str, float]: ...  # stream site → root mean square there, told without data
    def written_by(self, site_id: str) -> Iterator[Any]: ...  # the parameters that a site's telemetry is about


def check_host(model: Any) -> None:
    """Raise UserError naming the first of HostProtocol, HostShape, or a site's linears that is missing or unfit."""
    what = f"{type(model).__name__} is no host that can grow"
    mend = "docs/your-own-model.md shows one that has all, and esper.from_gpt2 makes one of a GPT"
    for place, value, protocol in (("", model, HostProtocol), ("shape.", getattr(model, "shape", None), HostShape)):
        for name, asked in vars(protocol).items():
            if not name.startswith("_") and not hasattr(value, name):
                raise UserError(f"{what}: it lacks {place}{name}: {mend}.")
            if not name.startswith("_") and callable(asked) and not callable(has := getattr(value, name)):
                raise UserError(f"{what}: its {place}{name} must be a method, and is {clipped(has)}: {mend}.")
    for site in model.shape.injection_specs():
        pair = model.linears(site.id) if site.units else ()
        for axis, linear in zip((0, 1), (*pair[:1], *pair[-1:]), strict=False):
            size = getattr(getattr(linear, "weight", None), "shape", ())
            if len(size) < 2 or size[axis] % site.units:
                needed = f"a matrix `weight` of a multiple of {site.units} {('rows', 'columns')[axis]}"
                has = f"linears({site.id!r}) has {type(linear).__name__}, which lacks {needed}"
                raise UserError(f"{what}: {has}: {mend}.")


@dataclass(frozen=True)
class GraftAction:
    """The controller's reply: a row of `Telemetry.candidates`."""

    index: int  # the row; 0 is WAIT
    sequence: int  # the telemetry's sequence number; a reply to an older telemetry is refused
    reason: str = ""  # why, in a few words, for the record


@dataclass(frozen=True)
class Transition:
    """What one decision led to."""

    __pydantic_config__ = CHECKED

    telemetry: Telemetry  # the observation at the next decision
    reward: Annotated[float, Field(allow_inf_nan=False)]  # (L_before − L_after) − rent · ΔPS/PS_ref, nats per token
    terminated: bool  # the budget is spent (or the run diverged, and the rent it did not pay was charged)
    truncated: bool = False  # cut from outside; the value of the last state should be bootstrapped
    info: dict[str, Any] = field(default_factory=dict)  # the curve's point; `summary` when the run has ended


class Instance(Frozen):
    """What varies between the episodes of one spec; the default changes nothing."""

    budget: float = Field(default=1.0, gt=0, description="factor on the spec's budget")
    n_layer: int | None = Field(default=None, ge=1, description="layers to start with; none means the spec's")
    data: tuple[float, float] = Field(default=(0.0, 1.0), description="slice of the training tokens, as fractions")
    task: int = Field(default=0, ge=0, description="which of a training's specs it is an instance of")
    law: int | None = Field(default=None, ge=0, description="loss law of a surrogate; none means the episode's seed")

    @model_validator(mode="after")
    def _check(self) -> Self:
        low, high = self.data
        if not 0 <= low < high <= 1:
            raise ValueError(f"data is {self.data}, but a slice must be 0 <= from < to <= 1.")
        return self


class Run(Protocol):
    """An episode: one host's training run as a controller sees it. `GrowthRun` trains, `SurrogateRun` computes."""

    def reset(self, instance: Instance | None = None, seed: int = 0) -> Telemetry: ...  # the first observation
    def step(self, action: GraftAction) -> Transition: ...  # apply the action, train to the next decision, and report
    def summary(self) -> dict[str, Any]: ...  # what the run has reached and used, as plain JSON values
    def sample(self, tokens: int) -> str | None: ...  # so many that its host writes; None where it writes no text
    def expected_seconds(self) -> float: ...  # of the next decision at the size now, by the run's clock
    @property
    def telemetry(self) -> Telemetry: ...  # the last observation
    def state(self) -> tuple[dict[str, Any], dict[str, Any]]: ...  # JSON values, and tensors by name
    def load(self, values: dict[str, Any], tensors: Mapping[str, Any]) -> None: ...  # go on to equal numbers


@dataclass(frozen=True)
class Order:
    """Asks any worker for the answer to the last of `actions`; sent again, it gets the same answer."""

    episode: int
    seed: int
    instance: Instance | None
    actions: tuple[int, ...] = ()  # chosen so far, the last not answered yet; none ask for the first observation
    fresh: bool = False  # use no checkpoint: something was wrong with what it led to


@dataclass(frozen=True)
class Reply:
    """A worker's answer to an Order."""

    __pydantic_config__ = CHECKED

    episode: int
    answer: Telemetry | Transition
    expected: Seconds  # that the next decision should take, by the run's clock
    redone: Annotated[int, Field(ge=0)] = 0  # decisions that were trained again, after another worker's end
    waited: Seconds = 0.0  # that the worker waited for the order
    worked: Seconds = 0.0  # from the order to this answer
    unsaved: str | None = None  # why the worker's last checkpoint was not written, as a sentence

    @property
    def telemetry(self) -> Telemetry:
        return self.answer.telemetry if isinstance(self.answer, Transition) else self.answer

    @classmethod
    def checked(cls, value: Any) -> "Reply":
        """A worker's `value`, every field's type and finiteness checked; raises ValueError with a clause."""
        try:
            return _REPLY.validate_python(value)
        except ValidationError as error:
            first = max(error.errors(include_url=False, include_input=False), key=lambda each: len(each["loc"]))
            raise ValueError(f"{'.'.join(map(str, first['loc'])) or 'reply'}: {first['msg']}") from None


_REPLY = TypeAdapter(Reply)


class Worker(Protocol):
    """Carries out orders, in a Ray actor or in the dispatcher's process."""

    def advance(self, order: Order) -> Reply: ...  # equal orders get equal answers, whatever came before


class Probe(Protocol):
    """What a policy may ask of the run that it decides for."""

    # Tries actions on copies: training losses on equal batches, float64 (len(actions), optimizer_steps).
    def twins(self, actions: Sequence[GraftAction], optimizer_steps: int) -> np.ndarray: ...
    def forecast(self, laws: "FittedLaws") -> np.ndarray: ...  # expected final loss of each row, nats; ∞: none


@runtime_checkable
class Stateful(Protocol):
    """A policy whose memory a resumed run restores."""

    def state(self) -> Any: ...  # what it remembers, as a JSON value
    def resume(self, state: Any) -> None: ...  # remember what `state` gave


@runtime_checkable
class Planned(Protocol):
    """A policy with planned grafts; the planner is told which were not played."""

    def unplayed(self) -> list[str]: ...  # the grafts still to come, a few words each


class GrowthPolicy(Protocol):
    """Who decides. Every arm is one, on the same run, trainer and ledger.

    A class of your own is made with the run's `ArmInputs` (`seed`, `spec`, …) where it takes an argument; for
    `--resume` one that remembers something has `state()`, a JSON value, and `resume(state)`.
    """

    def act(self, telemetry: Telemetry, probe: Probe | None = None) -> GraftAction: ...  # a legal candidate
