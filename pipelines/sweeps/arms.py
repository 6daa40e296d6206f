"""The arms of a sweep: the kinds that there are (all else derives from `KINDS`), and those of `--arms`. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from esper.pipelines.sweeps.sizes import Size
from esper.platform.errors import UserError, unknown
from esper.platform.frozen import Frozen
from esper.platform.plugins import arm_target
from esper.policies.arms import ALIASES, ARMS, NEEDS
from esper.policies.schedule import NAMED

CHOSEN_FIRST = ("ppo", "tamiyo", "lag")  # whom a follower follows where it names nobody, if they take part


@dataclass(frozen=True)
class Kind:
    """What a sweep has to know of a kind of arm."""

    plays: str  # the policy of its runs (`policies/arms.py`)
    grows: bool = True  # its runs may graft
    anneals: bool = False  # its loss is also taken annealed on the way: it is a baseline on every axis
    needs: str | None = None  # a file (`NEEDS`) that has to be given; a policy may be trained first
    follows: Literal["may", "must"] | None = None  # it takes after another arm's run on the same seed


STATIC, RANDOM, PPO, OPENLOOP, FINAL, LRPATH = "static", "random", "ppo", "openloop", "static_final", "static_lrpath"
SCHEDULES = ("schedule", *NAMED)
KINDS: dict[str, Kind] = {
    **{name: Kind(name, anneals=name in SCHEDULES, needs=NEEDS.get(name, (None,))[0]) for name in ARMS},
    STATIC: Kind("static", grows=False, anneals=True),
    RANDOM: Kind("random", follows="may"),  # grafts as often and the same kinds
    OPENLOOP: Kind("schedule", needs="policy"),  # the median schedule of the trained policy's own tuning runs
    FINAL: Kind("static", grows=False, anneals=True, follows="must"),  # the shape it ended with, from scratch
    LRPATH: Kind("static", grows=False, follows="must"),  # the best static size, under its learning rate
}
NOT_GROWN = tuple(name for name, kind in KINDS.items() if not kind.grows)
FOLLOWERS = tuple(name for name, kind in KINDS.items() if kind.follows)
NAMES = (*KINDS, *ALIASES)


class Arm(Frozen):
    """A row of the comparison."""

    name: str  # of KINDS, or a plug-in's
    size: Size | None = None  # of a static arm
    of: str | None = None  # label of the arm that it follows
    policy: str = ""  # of a ppo arm: which of the given policies, where they have names

    @property
    def kind(self) -> Kind:
        return KINDS.get(self.name) or Kind(self.name)  # a plug-in's

    @property
    def label(self) -> str:
        """How tables call it: `static-2`, `random:tamiyo`, `ppo:fine-tuned`."""
        name = f"static-{self.size}" if self.name == STATIC else self.name
        return ":".join(filter(None, (name, self.policy, self.of)))


def policy_input(name: str = "") -> str:
    """Under which name the policy of arm ppo, or ppo:NAME, is kept among a sweep's inputs."""
    return f"policy-{name}" if name else "policy"


def parse_arms(text: str, sizes: Sequence[Size]) -> list[Arm]:
    """The arms that `--arms` names, static ones first, followers last."""
    named = [_named(part.strip()) for part in text.split(",") if part.strip()]
    if not named:
        raise UserError(f"--arms names no arm: give one or more of {', '.join(NAMES)}.")
    policies = [Arm(name=PPO, policy=of) for name, of in named if name == PPO and of]
    named = [pair for pair in named if pair[0] != PPO or not pair[1]]
    leaders = [name for name, _ in named if name not in (STATIC, *FOLLOWERS)]
    first = next((name for name in (*CHOSEN_FIRST, *leaders) if name in leaders), None)
    for name, of in named:
        if name not in KINDS and arm_target(name) is None:
            raise unknown("arm", name, [*NAMES, "module:object"])
        kind = Arm(name=name).kind
        if (of and (name not in FOLLOWERS or of not in leaders)) or (kind.follows == "must" and not first):
            raise UserError(
                f"arm '{name}{of and ':' + of}' cannot be: {', '.join(FOLLOWERS)} follow an arm that grows and takes "
                f"part, and the others none; --arms names {', '.join(leaders) or 'none such'}: add one, such as tamiyo."
            )
    static = [Arm(name=STATIC, size=size) for size in sizes if (STATIC, "") in named]
    followers = [Arm(name=name, of=of or first) for name, of in named if name in FOLLOWERS]
    return list(dict.fromkeys([*static, *(Arm(name=name) for name in leaders), *policies, *followers]))


def _named(text: str) -> tuple[str, str]:
    """An arm, and what is behind its colon: whom it follows, or its policy. A plug-in's name has a colon of its own."""
    name, _, of = text.partition(":")
    if name not in NAMES:
        return text, ""
    return ALIASES.get(name, name), of if name == PPO else ALIASES.get(of, of)
