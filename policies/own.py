"""An arm of the user's own: a class, an object or a function of a plug-in (docs/your-own-arm.md)."""

import inspect
import operator
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

from esper.platform.contracts import GraftAction, GrowthPolicy, Probe
from esper.platform.errors import UserError, clipped, in_a_sentence, reason
from esper.platform.plugins import imported
from esper.platform.telemetry import Telemetry


@dataclass(frozen=True)
class FunctionPolicy:
    """Plays the rows that a function of telemetry answers; one that is not legal is WAIT, as in the environments."""

    target: str  # its `module:object`, or what else it is called
    function: Callable[[Telemetry], Any]

    def act(self, telemetry: Telemetry, probe: Probe | None = None) -> GraftAction:
        """The answered row; UserError for an answer that is none."""
        answer = self.function(telemetry)
        try:
            row = operator.index(answer)  # of numpy and torch too
        except TypeError:
            told = f"{self.target} answered {clipped(answer)}"
            raise UserError(f"{told}: it must answer the number of a row of telemetry.actions.") from None
        if not (0 <= row < len(telemetry.mask) and telemetry.mask[row]):
            return GraftAction(0, telemetry.sequence, f"row {row} of {self.target} is not legal")
        return GraftAction(row, telemetry.sequence, f"row {row} of {self.target}")


def own_policy(target: str, inputs: Any) -> GrowthPolicy:
    """The controller that `module:object` means; a class is made, with the run's `ArmInputs` where it takes one."""
    module, _, name = target.partition(":")
    whole = imported(module)
    with in_a_sentence(f"arm {target!r} cannot be made", "mend its module"):
        found: Any = reduce(getattr, name.split("."), whole)
        if isinstance(found, type):
            found = found(inputs) if inspect.signature(found).parameters else found()
    return as_policy(found, target)


def as_policy(found: Any, target: str) -> GrowthPolicy:
    """An object with `act`, or a function of telemetry, as a controller; UserError where it is neither."""
    if hasattr(found, "act"):
        return found
    if callable(found):
        return FunctionPolicy(target, found)
    raise UserError(f"arm {target!r} has no act(telemetry, probe) and is no function of telemetry: give it one.")


@contextmanager
def blamed(policy: GrowthPolicy) -> Iterator[None]:
    """Turn what a controller of the user's own raises into a sentence that says where; Esper's own are let through."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        code = policy.function if isinstance(policy, FunctionPolicy) else policy
        module = str(getattr(code, "__module__", ""))
        if module.startswith("esper."):
            raise
        target = policy.target if isinstance(policy, FunctionPolicy) else type(policy).__name__
        file = Path(getattr(sys.modules.get(module), "__file__", None) or "").resolve()
        theirs = [each for each in traceback.extract_tb(error.__traceback__) if Path(each.filename).resolve() == file]
        place = f" at {theirs[-1].filename}, line {theirs[-1].lineno}" if theirs else ""
        raise UserError(f"arm {target!r} raised {type(error).__name__} ({reason(error)}){place}: mend it.") from error
