"""Who takes part in a sweep: the rows of its comparison, read from `--arms` and `--sizes`.

An entrant's label is how tables call it: `static-2` is a static GPT with 2 layers, `random:tamiyo` grafts as often and
the same kinds as Tamiyo did on the same seed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from esper.pipelines.sweeps.arm_names import FOLLOWERS, MADE_HERE
from esper.platform.errors import UserError, unknown
from esper.platform.spec import RunSpec
from esper.policies.arms import ALIASES, ARMS

SWEEP_ARMS = (*ARMS, *MADE_HERE)
CHOSEN_FIRST = ("ppo", "tamiyo", "lag")  # whom a follower follows where it names nobody, if they take part


@dataclass(frozen=True)
class Entrant:
    """A row of the comparison.

    Attributes:
        arm: its kind.
        size: layers of a static one.
        of: label of the arm that it follows.
    """

    arm: str
    size: int | None = None
    of: str | None = None

    @property
    def label(self) -> str:
        """How tables call it."""
        if self.arm == "static":
            return f"static-{self.size}"
        return self.arm if self.of is None else f"{self.arm}:{self.of}"

    @property
    def follows(self) -> bool:
        """Whether its runs need another arm's runs first."""
        return self.of is not None


def parse_arms(text: str, sizes: Sequence[int]) -> list[Entrant]:
    """The entrants that `--arms` names, static ones first, followers last.

    Raises:
        UserError: no arm, an unknown one, or one that follows nobody who takes part.
    """
    named: dict[str, str] = {}  # arm, and whom it follows, as they were typed
    for part in filter(None, (part.strip() for part in text.split(","))):
        arm, _, of = part.partition(":")
        arm = ALIASES.get(arm, arm)
        if arm not in SWEEP_ARMS:
            raise unknown("arm", arm, [*SWEEP_ARMS, *ALIASES])
        if of and arm not in FOLLOWERS:
            raise UserError(
                f"arm {part!r}: {arm} follows no other arm; of those that do there are {', '.join(FOLLOWERS)}."
            )
        named[f"{arm}:{ALIASES.get(of, of)}" if of else arm] = arm
    if not named:
        raise UserError(f"--arms names no arm: give one or more of {', '.join([*SWEEP_ARMS, *ALIASES])}.")
    growing = [arm for arm in named.values() if arm not in ("static", *FOLLOWERS)]
    first = next((arm for arm in (*CHOSEN_FIRST, *growing) if arm in growing), None)
    static = [Entrant("static", size) for size in sizes] if "static" in named else []
    followers = [
        _follower(arm, typed.partition(":")[2], first, growing) for typed, arm in named.items() if arm in FOLLOWERS
    ]
    alone = [Entrant(arm) for arm in dict.fromkeys(growing)]
    return list(dict.fromkeys([*static, *alone, *followers]))


def _follower(arm: str, of: str, first: str | None, growing: Sequence[str]) -> Entrant:
    if of and of not in growing:
        raise UserError(
            f"arm '{arm}:{of}' follows {of}, which does not take part or does not grow: add it to --arms, or name one "
            f"that does ({', '.join(growing) or 'there is none'})."
        )
    if not of and first is None and arm != "random":
        raise UserError(f"arm {arm!r} follows an arm that grows, and --arms names none: add one, such as tamiyo.")
    return Entrant(arm, of=of or first)


def parse_sizes(text: str | None, spec: RunSpec) -> list[int]:
    """The static sizes that `--sizes` names, smallest first; the preset's own for None.

    Raises:
        UserError: one is no number of layers.
    """
    if text is None:
        return [spec.host.n_layer]
    sizes = [part.strip() for part in text.split(",") if part.strip()]
    if not sizes or not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise UserError(f"--sizes {text!r} is not a list of layers: write it as 1,2,4.")
    return sorted({int(size) for size in sizes})
