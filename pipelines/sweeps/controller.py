"""The controller of a sweep that is given none, trained on seeds or laws that no arm is compared on.

On text, or in minutes on loss laws fitted to the static tuning runs: zero-shot on text then.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from esper.pipelines.common.run_folder import PLAN, RunFolder
from esper.pipelines.sweeps.plan import Point, SweepPlan
from esper.platform.console import say
from esper.platform.frozen import Frozen
from esper.platform.spec import LawSpec, RunSpec
from esper.platform.storage import read_json
from esper.platform.tracking import Tracker, new_key
from esper.workers.laws.fit import fit_laws, points_of

TRAINING_SEED = 1_000_000  # controllers are trained on seeds that no arm is compared on


def folder_of(sweep: RunFolder, point: Point) -> Path:
    """Where the controller of a grid point is trained."""
    return sweep.out / (f"ppo-{point.index}" if point.several else "ppo")


def trained(
    sweep: RunFolder,
    plan: SweepPlan,
    parent: Tracker,
    check: Callable[[], None],
    point: Point,
    spec: RunSpec,
    tuning: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """Train a controller, resume it or take the one there; returns `checkpoint`, `trained_on` and `spent`.

    `tuning` are the summaries of static runs; raises UserError where no loss laws can be fitted to them.
    """
    from esper.pipelines.controllers.training import ON_LAWS, train_controller  # RLlib takes seconds to import

    out, laws = folder_of(sweep, point), plan.train_on == "laws"
    if (out / PLAN).exists():
        with RunFolder.reopen(out, "ppo", Frozen) as (own, _):
            own.check()
            if not own.ended:
                train_controller(own, parent=parent, check=check)
    else:
        if laws:
            spec = spec.overridden({key: value for key, value in ON_LAWS.items() if key not in plan.own})
            spec = spec.model_copy(update={"laws": _fitted(spec, tuning)})
        values = {"out": out, "spec": spec, "data": None if laws else sweep.data, "key": new_key()}
        own = sweep.model_copy(update={**values, "seed": TRAINING_SEED + sweep.seed})
        with own.begin("ppo", Frozen()):
            train_controller(own, parent=parent, check=check)
    path = out / "summary.json"
    summary = read_json(path, str(path), "the summary of a controller's training")
    return {"checkpoint": summary["checkpoint"], "trained_on": plan.train_on, "spent": summary["spent"]}


def _fitted(spec: RunSpec, tuning: Sequence[dict[str, Any]]) -> LawSpec:
    fit = fit_laws(spec, [point for run in tuning for point in points_of(run)])
    law = fit.law
    size, data = f"{law.size:.3f}·n^-{law.size_exponent:.2f}", f"{law.data:.3f}·d^-{law.data_exponent:.2f}"
    say(f"laws    {law.floor:.3f} + {size} + {data} nats at n layers, d of what one layer sees in the budget")
    say(f"        off by {fit.residual:.4f} nats (rms) from the static runs on tuning seeds")
    return fit.laws
