"""What the tests of runs share: actions by name, and a run whose actions depend on its telemetry's own numbers.

As a program, `python growing_run.py SPEC SHARDS FOLDER`: train from the checkpoint in FOLDER, or from the start, save
at every decision, and write the outcome beside it. For tests that kill it.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

from esper.platform.checkpoint import CheckpointStore
from esper.platform.contracts import GraftAction
from esper.platform.spec import load_spec
from esper.workers.run import GrowthRun
from esper.workers.tolaria.data import TokenData

CLOCKS = ("wall_seconds", "validation_seconds")  # measured, and so never equal


def changed(spec, **parts):
    """The spec with fields of its parts changed: `changed(spec, budget={"amount": 40})`."""
    return spec.model_copy(update={name: getattr(spec, name).model_copy(update=v) for name, v in parts.items()})


def begun(spec, tokens, *blueprints, seed=0, instance=None):
    """A run after a decision for each blueprint, None for a wait."""
    run = GrowthRun(spec, tokens)
    run.reset(instance, seed=seed)
    for blueprint in blueprints:
        act(run, blueprint)
    return run


def row(run, blueprint=None, site=None, operation="graft"):
    """The row that grafts (or prunes) a blueprint, at a site or at the first that has it; without one, that waits."""
    wanted = (operation, blueprint) if blueprint else ("wait", None)
    actions = enumerate(run.telemetry.actions)
    return next(i for i, a in actions if (a.operation, a.blueprint) == wanted and site in (None, a.site))


def act(run, *which):
    """Take that row."""
    return run.step(GraftAction(row(run, *which), run.telemetry.sequence))


def play(run, plan=()):
    """From where it stands to its end, grafting `plan[decision]` and otherwise waiting; returns every observation."""
    seen = [run.telemetry]
    while not run.ended:
        seen.append(act(run, dict(plan).get(run.sequence)).telemetry)
    return seen


def choose(telemetry):
    """Some legal action."""
    legal = telemetry.legal()
    return GraftAction(int(legal[int(1e6 * abs(telemetry.globals).sum()) % len(legal)]), telemetry.sequence)


def finish(run):
    """Play `choose` to the end, from the middle of a slice too."""
    if run.unfinished:
        run.finish()
    while not run.ended:
        run.step(choose(run.telemetry))
    return outcome(run)


def outcome(run):
    """The summary without wall times."""
    return plain(run.summary())


def plain(value):
    """A value without the wall times in it."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if key not in CLOCKS}
    return [plain(item) for item in value] if isinstance(value, list) else value


def weights(run):
    """Copies of the host's tensors by name."""
    return {name: tensor.clone() for name, tensor in run.trainer.host.state_dict().items()}


def same_weights(run, before):
    """Whether the host's tensors are these, to the bit."""
    now = run.trainer.host.state_dict()
    return now.keys() == before.keys() and all(torch.equal(before[name], tensor) for name, tensor in now.items())


def same_telemetry(one, other):
    """Whether two observations are equal to the bit."""
    pairs = zip(one.arrays().values(), other.arrays().values(), strict=True)
    return one.actions == other.actions and all(np.array_equal(a, b) for a, b in pairs)


def main(spec: Path, shards: Path, folder: Path) -> None:
    """See above."""
    run = GrowthRun(load_spec(spec), TokenData.open(shards))
    with CheckpointStore(folder) as checkpoints:
        if folder.is_dir() and any(folder.glob("[!.]*")):
            run.load(*checkpoints.find("run"))
        else:
            run.reset(seed=5)
        while not run.ended:
            run.step(choose(run.telemetry))
            checkpoints.save("run", *run.state())
    (folder.parent / "outcome.json").write_text(json.dumps(outcome(run)))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
