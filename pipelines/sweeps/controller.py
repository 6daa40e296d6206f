"""The controller of a sweep that is given none: trained on what no arm is compared on, and gone on with if interrupted.

Either on text, with seeds of its own, or on loss laws fitted to the static runs of the tuning seeds (`workers/
law_fit.py`): minutes instead of days, and zero-shot on text.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, Literal

from esper.pipelines.common.run_folder import Job, RunFolder
from esper.pipelines.controllers.training import ON_LAWS, train_controller
from esper.platform.console import say
from esper.platform.frozen import Frozen
from esper.platform.pins import PINS
from esper.platform.spec import RunSpec, saved_spec
from esper.platform.storage import read_json
from esper.platform.tracking import Tracker, new_key
from esper.platform.tracking_store import tracking_uri
from esper.workers.laws.fit import fit_laws, points_of

TrainedOn = Literal["text", "laws"]
TRAINING_SEED = 1_000_000  # controllers are trained on seeds that no arm is compared on


def trained_policy(
    job: Job,
    spec: RunSpec,
    out: Path,
    *,
    on: TrainedOn,
    seed: int,
    own: Sequence[str],
    tuning: Sequence[dict[str, Any]],
    parent: Tracker,
    check: Callable[[], None],
) -> dict[str, Any]:
    """Train a controller in `out`, or go on with it, or take the one that is there.

    Args:
        job: the sweep's text.
        spec: what it is trained for.
        out: its own folder.
        on: text, or loss laws.
        seed: the sweep's.
        own: keys that the user has set: they stay.
        tuning: summaries of the static runs that laws are fitted to.
        parent: the sweep's run in MLflow.
        check: called often; what it raises ends the training, from where it can be resumed.

    Returns:
        `checkpoint`, `trained_on`, and what it cost: `parameter_seconds` of text (None on another budget's axis) and
        `wall_seconds`.

    Raises:
        UserError: the laws cannot be fitted.
    """
    surrogate = on == "laws"
    done = out / "summary.json"
    if (out / "spec.json").exists():
        spec = saved_spec(out / "spec.json")
    elif surrogate:
        spec = spec.overridden({key: value for key, value in ON_LAWS.items() if key not in own})
        fit = fit_laws(spec, [point for run in tuning for point in points_of(run)])
        spec = spec.model_copy(update={"laws": fit.laws})
        law = fit.law
        size = f"{law.size:.3f}·n^-{law.size_exponent:.2f}"
        data = f"{law.data:.3f}·d^-{law.data_exponent:.2f}"
        say(f"laws    {law.floor:.3f} + {size} + {data} nats at n layers, d of what one layer sees in the budget")
        say(f"        off by {fit.residual:.4f} nats (rms) from the static runs on tuning seeds")
    if not done.exists():
        if (out / PINS).exists():
            with RunFolder.reopen(out, "ppo", Frozen) as (own_folder, _):
                own_folder.check()
                train_controller(own_folder, parent=parent, check=check)
        else:
            named = {"task": "tinystories", "key": new_key(), "store": tracking_uri()}
            data = None if surrogate else job.data
            own_folder = RunFolder(out=out, spec=spec, data=data, seed=TRAINING_SEED + seed, **named)
            with own_folder.begin("ppo", Frozen()):
                train_controller(own_folder, parent=parent, check=check)
    summary = read_json(done, str(done), "the summary of a controller's training")
    times = [line["time"] / 1000 for line in summary["history"]]
    each = median(after - before for before, after in pairwise(times)) if len(times) > 1 else 0.0
    axis, amount = spec.budget.axis, spec.budget.amount
    text = sum(run["parameter_seconds"] for run in tuning) if surrogate else summary["episodes"] * amount
    return {
        "checkpoint": summary["checkpoint"],
        "trained_on": on,
        "parameter_seconds": text if surrogate or axis == "parameter_seconds" else None,
        "wall_seconds": each * len(times),
    }
