"""Does a controller that learned on one kind of network carry over to another? Fine-tunes it there, and compares.

esper transfer --policy runs/ppo-digits --to tinystories-char --episodes 30 --budgets 0.5e6,1e6,2e6 --seeds 5

Arms, beside those of `--arms`: the policy as it is (`ppo:zero-shot`), after so many episodes there (`ppo:fine-tuned`),
one from scratch with as many (`ppo:scratch`) and, with `--laws`, one trained on loss laws (`ppo:laws`).
"""

import sys
from pathlib import Path
from typing import Any

from esper.pipelines import ppo
from esper.pipelines.common.arguments import command, flag
from esper.pipelines.ppo import PPOArguments
from esper.pipelines.sweeps.plan import SweepArguments, SweepPlan
from esper.platform.console import say
from esper.platform.errors import UserError
from esper.platform.provenance import PINS
from esper.platform.storage import read_json, write_json

BEGUN = "transfer.json"  # the arguments, in the output folder
AT_ONCE = 10  # episodes of an iteration


class TransferArguments(SweepArguments):
    """Compare a controller from elsewhere with controllers from here, as `esper sweep` compares."""

    to: str | None = flag(None, "The preset to carry it over to; must be given.", "NAME|FILE")
    policy: tuple[str, ...] = flag((), "The policy: an `esper ppo` run, or a checkpoint in it; must be given.", "PATH")
    episodes: int = flag(30, "Episodes of fine-tuning, and of training from scratch, at least.", ge=1, le=10_000)
    laws: Path | None = flag(None, "For planner, and to train ppo:laws on: fitted loss laws of that preset.", "FILE")
    arms: str = flag("static,tamiyo,random:tamiyo,twice,mixed,onejump", "The other arms.", "A,B,C")
    seeds: str = flag("5", "Test seeds of each arm; auto:N adds some.", "N|auto:N")


def run(arguments: TransferArguments) -> int:
    """Train what is missing, then compare; returns 1 if a trial failed."""
    from esper.pipelines.sweeps import comparison

    if arguments.resume is not None:
        out = arguments.resume.resolve()
        kept = read_json(out / BEGUN, f"--resume {out}", "a folder that `esper transfer` made")
        arguments = TransferArguments.checked(kept, str(out / BEGUN))
    else:
        out = _begin(arguments)
    [policy], laws = arguments.policy, arguments.laws
    starts: dict[str, dict[str, Any]] = {"fine-tuned": {"init_from": policy}, "scratch": {}}
    starts |= {} if laws is None else {"laws": {"laws": laws, "surrogate": True}}
    for name, start in starts.items():
        _train(out / name, arguments, start)
    if (out / "sweep" / PINS).exists():
        return comparison.resume(out / "sweep")
    policies = {"zero-shot": policy, **{name: out / name for name in starts}}
    return comparison.begin(_sweep(arguments, out / "sweep", policies), "transfer")


def _begin(arguments: TransferArguments) -> Path:
    """Refuse what cannot be, before anything is trained, and make the folder."""
    from esper.pipelines.common.preset import resolve_spec
    from esper.pipelines.common.run_folder import output_folder
    from esper.platform.spec import presets
    from esper.policies.simic.policy import policy_file

    if len(arguments.policy) != 1 or arguments.to is None:
        raise UserError("esper transfer: give --policy CHECKPOINT, once, and --to PRESET to carry it over to.")
    sweep = _sweep(arguments, Path(), {"zero-shot": arguments.policy[0]})
    SweepPlan.settled(sweep, spec := resolve_spec(sweep))
    out = output_folder(arguments, "transfer")
    given: dict[str, Any] = arguments.model_dump(mode="json", exclude_unset=True)
    preset = None if arguments.to in presets() else Path(arguments.to)
    files = {"schedule": arguments.schedule, "laws": arguments.laws, "to": preset}
    given |= {name: str(path.resolve()) for name, path in files.items() if path is not None}  # from wherever it goes on
    given |= {"policy": [str(policy_file(Path(arguments.policy[0])).resolve())]}
    given |= {} if arguments.data is None else {"data": spec.data.source}
    write_json(out / BEGUN, given)
    return out


def _train(out: Path, arguments: TransferArguments, start: dict[str, Any]) -> None:
    """Train a controller on the preset, or go on with its training."""
    from esper.pipelines.sweeps.stages import TRAINING_SEED
    from esper.platform.spec import load_spec

    if (out / "summary.json").exists():
        return
    say(f"train   {out.name}")
    if (out / PINS).exists():
        ppo.run(PPOArguments(resume=out))
        return
    changes: list[str] = []
    if not start.get("surrogate"):
        decisions = load_spec(str(arguments.to), arguments.set).budget.decisions
        iterations = -(-arguments.episodes // AT_ONCE)
        batch = max(8, arguments.episodes * decisions // iterations)
        changes = [f"ppo.iterations={iterations}", f"ppo.decisions={batch}", f"ppo.minibatch={max(8, batch // 4)}"]
        start = {**start, **({} if arguments.data is None else {"data": arguments.data})}
    seed, changed = TRAINING_SEED + arguments.seed, (*changes, *arguments.set)
    ppo.run(PPOArguments(preset=arguments.to, out=out, seed=seed, set=changed, **start))


def _sweep(arguments: TransferArguments, out: Path, policies: dict[str, Any]) -> SweepArguments:
    """The comparison that is asked for, of these policies by name."""
    arms = [arguments.arms, *(["planner"] if arguments.laws is not None else []), *(f"ppo:{name}" for name in policies)]
    own = {"preset": arguments.to, "out": out, "arms": ",".join(arms)}
    own["policy"] = tuple(f"{name}={path}" for name, path in policies.items())
    return SweepArguments.model_validate(arguments.model_dump(exclude={"to", "episodes"}) | own)


main = command(run, TransferArguments, "esper transfer")

if __name__ == "__main__":
    sys.exit(main())
