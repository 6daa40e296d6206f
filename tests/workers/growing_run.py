"""What the tests of runs share: actions by name, and a run whose actions depend on its telemetry's own numbers."""

import numpy as np
import torch

from esper.platform.contracts import GraftAction
from esper.workers.run import GrowthRun

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
    return run.step(GraftAction(row(run, *which), run.telemetry.sequence))


def play(run, plan=()):
    """From where it stands to its end, grafting `plan[decision]` and otherwise waiting; returns every observation."""
    seen = [run.telemetry]
    while not run.ended:
        seen.append(act(run, dict(plan).get(run.sequence)).telemetry)
    return seen


def choose(telemetry):
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
    return plain(run.summary())


def plain(value):
    """A value without the wall times in it."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if key not in CLOCKS}
    return [plain(item) for item in value] if isinstance(value, list) else value


def weights(run):
    return {name: tensor.clone() for name, tensor in run.trainer.host.state_dict().items()}


def same_weights(run, before):
    """Whether the host's tensors are these, to the bit."""
    now = weights(run)
    return now.keys() == before.keys() and all(torch.equal(before[name], tensor) for name, tensor in now.items())


def same_telemetry(one, other):
    pairs = zip(one.arrays().values(), other.arrays().values(), strict=True)
    return one.actions == other.actions and all(np.array_equal(a, b) for a, b in pairs)


def odd(value, chance):
    """A copy of a JSON value in which one leaf or branch is something else."""
    if isinstance(value, dict | list) and value and chance.random() < 0.95:
        copy = value.copy()
        key = chance.choice(list(value) if isinstance(value, dict) else range(len(value)))
        if chance.random() < 0.1:
            del copy[key]
        else:
            copy[key] = odd(value[key], chance)
        return copy
    numbers = [value - 1, value + 1, value * 2] if isinstance(value, int) else []
    return chance.choice([None, -1, 0, 10**12, 0.5, "x", "h0.ffn", [], {}, True, [[]], {"a": 1}, *numbers])


def mutated(content, chance):
    """Bytes with one to four places overwritten, cut or lengthened."""
    changed = bytearray(content)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(changed))
        changed[at : at + chance.choice([0, 1, 1, 9])] = chance.randbytes(chance.choice([0, 1, 1, 5]))
    return bytes(changed)
