"""Train a controller: PPO (Simic) over a fleet of Ray workers, each growing a GPT on text; leaves `policy.safetensors`.

esper ppo --surrogate                               # on loss laws, in minutes; on text it takes hours
ray job submit -- python pipelines/ppo.py           # on a cluster
esper ppo --resume runs/ppo-20260101-120000         # with the episodes under way, in `episodes/` and `saves/`
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

from pydantic import model_validator

from esper.pipelines.common.arguments import ResumableArguments, command, flag
from esper.platform.console import counted, say
from esper.platform.errors import UserError
from esper.platform.law_file import FittedLaws
from esper.platform.storage import write_json

if TYPE_CHECKING:
    from esper.pipelines.common.run_folder import RunFolder

OTHERS = ("ppo", "fleet")  # groups of the spec that a resumed training may change


class PPOArguments(ResumableArguments):
    """Train a controller with PPO over a fleet of workers."""

    beside_resume: ClassVar[tuple[str, ...]] = ("set",)

    surrogate: bool = flag(False, "Train on loss laws, not on text: minutes, and no proof of anything on text.")
    laws: Path | None = flag(None, "Fitted loss laws: begin with a clone of the planner that plays by them.", "FILE")
    rounds: int | None = flag(None, "Fit --laws anew N times, to episodes on text too, and clone anew.", ge=2)
    also: tuple[str, ...] = flag((), "A preset to train on too, in turn; may be given again.", "PRESET[=DATA]")
    init_from: Path | None = flag(None, "A trained policy, of any preset: begin with it, and stay near to it.")

    @model_validator(mode="after")
    def _flags_go_together(self) -> Self:
        if self.rounds is not None and (self.laws is None or self.surrogate):
            lacks = "fits the laws of --laws FILE anew: give them" if self.laws is None else "needs episodes on text"
            raise ValueError(f"--rounds {lacks}, or leave it out.")
        if self.init_from is not None and self.laws is not None:
            raise ValueError("--laws begins with a clone of the planner, --init-from with a policy: give one of them.")
        if self.also and (self.surrogate or self.laws is not None):
            given = "--surrogate" if self.surrogate else "--laws"
            raise ValueError(f"--also trains on several presets' own data, and {given} is of one: leave one out.")
        return self

    resume: Path | None = flag(None, "Go on with the training in this folder; takes --set ppo.… and fleet.….", "DIR")


def run(arguments: PPOArguments) -> None:
    """Settle, connect, train, report."""
    from esper.pipelines.common.preset import resolve_spec
    from esper.pipelines.common.run_folder import RunFolder
    from esper.pipelines.controllers.rounds import BEFORE, runs_of
    from esper.pipelines.controllers.training import ON_LAWS
    from esper.pipelines.controllers.workers import planned_task
    from esper.policies.simic.policy import SimicPolicy, policy_file

    if arguments.resume is not None:
        resume(arguments, arguments.resume)
        return
    surrogate = arguments.surrogate
    if surrogate and arguments.data is not None:
        raise UserError(f"--surrogate trains on loss laws, which need no text: leave out --data {arguments.data}.")
    if surrogate:
        of_laws = [f"{key}={value}" for key, value in ON_LAWS.items()]
        arguments = arguments.model_copy(update={"set": (*of_laws, *arguments.set)})
    spec, laws, rounds = resolve_spec(arguments, on="laws" if surrogate else "fleet"), arguments.laws, arguments.rounds
    if laws is not None:
        FittedLaws.read(laws).check(spec)
    if rounds is not None and spec.ppo.iterations < rounds:
        raise UserError(f"--rounds is {rounds}, but ppo.iterations only {spec.ppo.iterations}: set it to as many.")
    policy = None if arguments.init_from is None else policy_file(arguments.init_from)
    if policy is not None:
        spec = spec.overridden({"ppo.hidden": SimicPolicy.load(policy).net.hidden})
    also = [planned_task(name) for name in arguments.also]
    folder = RunFolder.new(arguments, spec, "ppo", laws=surrogate)
    before = None if laws is None or rounds is None else runs_of(laws, folder.tokens.manifest.fingerprint())
    folder.tell_laws(None if surrogate else laws)
    if before is not None:
        write_json(folder.out / BEFORE, before)
    plan = {"rounds": rounds, "also": also}
    inputs = {"laws": laws, "runs": before and folder.out / BEFORE, "policy": policy}
    with folder.begin("ppo", plan, inputs) as kept:
        train(folder.model_copy(update={"plan": plan}), kept)


def resume(arguments: PPOArguments, out: Path) -> None:
    """Go on with the training in `out`, or send MLflow the rest of an ended one."""
    from esper.pipelines.common.run_folder import RunFolder
    from esper.pipelines.controllers.training import KEPT, Reached, track
    from esper.platform.spec import load_spec

    for override in arguments.set:
        if override.split(".")[0] not in OTHERS or override.startswith("ppo.hidden"):
            raise UserError(
                f"--set {override} would make another training of the one in {out}: with --resume only keys of "
                f"{' and '.join(OTHERS)} may change, such as ppo.iterations, and ppo.hidden, the network's own, not."
            )
    with RunFolder.reopen(out, "ppo") as folder:
        inputs, reached = folder.check(), Reached.of(folder)
        folder = folder.model_copy(update={"spec": load_spec(folder.out / "spec.json", arguments.set)})
        if folder.ended and reached.iterations >= folder.spec.ppo.iterations:
            if not arguments.set and folder.send(lambda: track(folder), KEPT):
                return
            what = f"--resume {out} has its {counted(reached.iterations, 'iteration')}"
            raise UserError(f"{what}: ask for more, such as --set ppo.iterations={2 * reached.iterations}.")
        if arguments.set:
            folder.pin(inputs)
        done = f"{counted(reached.iterations, 'iteration')}, {reached.decisions:.0f} decisions"
        say(f"resume  {folder.out}: {done}")
        train(folder, inputs)


def train(folder: "RunFolder", inputs: Mapping[str, Path]) -> None:
    """Connect, train, and say where everything is."""
    from esper.pipelines.common.stopping import stop_signals
    from esper.pipelines.controllers.training import train_controller
    from esper.pipelines.controllers.workers import session

    how = f"stopped, with nothing lost; go on with: esper ppo --resume {folder.out}"
    # Signals come second: `ray.init` puts in a handler of its own, in C.
    with session(folder.spec, surrogates=folder.data is None), stop_signals(how) as check:
        summary = train_controller(folder, laws=inputs.get("laws"), init_from=inputs.get("policy"), check=check)
    say(f"results: {folder.out / 'summary.json'}; curves: {folder.out / 'training.png'}")
    say(f"compare: {summary['where']}")


main = command(run, PPOArguments, "esper ppo")

if __name__ == "__main__":
    sys.exit(main())
