"""What is kept of a sweep's trials, and told of them: a folder each, a run each in MLflow, and lines of progress.

A trial's folder has `spec.json`, `tracking.jsonl` (all that MLflow gets, so that a server's outage loses nothing), and
at its end `summary.json`, which makes it done.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from ray import tune

from esper.pipelines.common.play import metrics, unplayed
from esper.pipelines.common.run_folder import RunFolder
from esper.pipelines.sweeps.chart_view import CURVE, curve_names
from esper.pipelines.sweeps.plan import Trial
from esper.platform.checkpoint import CheckpointStore, below
from esper.platform.console import Eta, counted, say
from esper.platform.ledger import AXES
from esper.platform.provenance import SPEC
from esper.platform.recording import SEEN_FILE
from esper.platform.storage import read_json, write_bytes, write_json, write_text
from esper.platform.tracking import Tracker, sync, synced

SUMMARY = "summary.json"
TRIAL_SECONDS = 2.0  # that MLflow has to take the last of a trial while others run, which wait meanwhile


class SweepLog(tune.Callback):
    """The driver's side of all trials: children of the sweep's run; what `check` raises, called often, ends it."""

    def __init__(self, folder: RunFolder, parent: Tracker, check: Callable[[], None]) -> None:
        self.out, place = folder.out, folder.spec.fleet.storage
        self.saves = str(folder.out / "saves") if place is None else below(place, folder.key)  # of trials under way
        self.trials: dict[str, Trial] = {}  # all that were planned, by name
        self.failures: dict[str, str] = {}
        self.parent, self.check = parent, check
        self._folder = folder
        self._curves: dict[str, str] = {}  # the chart's names, by row of a table of test trials
        self._store = CheckpointStore(self.saves)
        self._summaries: dict[str, dict[str, Any]] = {}  # as read: one is never written twice
        self._fractions: dict[str, float] = {}
        self._open: dict[str, Tracker] = {}
        self._stage, self._shown, self._eta = "", 0, Eta()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune keeps a copy beside its own files, for a restore that nobody asks for

    def folder(self, trial: Trial) -> Path:
        return self.out / "trials" / trial.name

    def summary(self, trial: Trial) -> dict[str, Any] | None:
        path = self.folder(trial) / SUMMARY
        if trial.name not in self._summaries and path.is_file():
            self._summaries[trial.name] = read_json(path, str(path), "the summary of a trial")
        return self._summaries.get(trial.name)

    def begin(self, stage: str, trials: Mapping[Trial, bool]) -> list[Trial]:
        """Note trials, and whether they are wanted; says and returns which can be run and have not been."""
        self.trials |= {trial.name: trial for trial in trials}
        rows = [trial.point.row(trial.arm) for trial in trials if trial.purpose == "test"]
        self._curves = curve_names(dict.fromkeys([*self._curves, *rows]))
        self.failures |= {trial.name: trial.impossible for trial in trials if trial.impossible}
        missing = [t for t, wanted in trials.items() if wanted and not t.impossible and self.summary(t) is None]
        if missing:
            self._stage, self._shown, self._eta = stage, 0, Eta()
            self._fractions = {trial.name: 0.0 for trial in missing}
            labels = ", ".join(dict.fromkeys(trial.arm.label for trial in missing))
            say(f"{stage:<7} {counted(len(missing), 'trial')}: {labels}")
        return missing

    def close(self, others: Iterable[Path], seconds: float) -> bool:
        """End what is open; send MLflow what it and the folders `others` lack, in `seconds`; whether it has all."""
        uri, deadline = self.parent.uri, time.monotonic() + seconds

        def left() -> float:
            return max(0.0, deadline - time.monotonic())

        self._store.close()
        for tracker in self._open.values():
            tracker.close("KILLED", left())
        done = [(trial, summary) for trial in self.trials.values() if (summary := self.summary(trial)) is not None]
        late = [(trial, summary) for trial, summary in done if not synced(self.folder(trial), uri)]
        if late:
            say(f"MLflow gets what it lacks of {counted(len(late), 'trial')}: this takes {seconds:g} s at most")
        taken = [self._finish(trial, summary, left()) for trial, summary in late]
        return all(taken + [sync(folder, uri, left()) for folder in others if (folder / SUMMARY).exists()])

    def on_step_begin(self, **info: Any) -> None:
        self.check()

    def on_trial_start(self, *, trial: Any, **info: Any) -> None:
        """Open the trial's folder and its run; another start after its process died goes on with the same."""
        planned = self.trials[trial.config["trial"]]
        if planned.name not in self._open:
            write_text(self.folder(planned) / SPEC, planned.spec.model_dump_json(indent=2) + "\n")
            self._open[planned.name] = self._track(planned)

    def on_trial_result(self, *, trial: Any, result: dict[str, Any], **info: Any) -> None:
        """Keep the points; at the end, the summary."""
        planned, summary = self.trials[trial.config["trial"]], result.get("summary")
        if "error" in result:
            self._fail(planned, result["error"])
            return
        self._fractions[planned.name] = 1.0 if summary else min(0.999, result["curve"][-1]["budget_fraction"])
        if summary:
            write_bytes(self.folder(planned) / SEEN_FILE, result["seen"])
            write_json(self.folder(planned) / SUMMARY, summary)
            self._store.drop(planned.name)
            self._finish(planned, summary, TRIAL_SECONDS)
        else:
            _log_curve(self._open[planned.name], planned, result["curve"])
        for told in self._news(planned, result):
            say(f"  {told}")

    def on_trial_recover(self, *, trial: Any, **info: Any) -> None:
        """Its process has died, and Tune is going to start it again."""
        say(f"  {trial.config['trial']}: it failed, or its process died; it is started again, from its last save")

    def on_trial_error(self, *, trial: Any, **info: Any) -> None:
        text = (trial.error_file and Path(trial.error_file).read_text().strip()) or "its process died"
        self._fail(self.trials[trial.config["trial"]], f"{text.splitlines()[-1]} (log in {trial.local_path})")

    def _track(self, trial: Trial) -> Tracker:
        manifest, key = self._folder.tokens.manifest, f"{self._folder.key}/{trial.name}"
        own = self._folder.model_copy(update={"out": self.folder(trial), "spec": trial.spec, "key": key})
        tags = {**trial.tags(), "kind": "trial", CURVE: self._curves.get(trial.point.row(trial.arm), "")}
        tracker = own.track(tags, run_name=trial.name, parent=self.parent)
        profile = {f"{trial.spec.data.unit}s": manifest.counts}
        tracker.log_input(Path(manifest.source).stem, manifest.source, manifest.fingerprint(), profile)
        return tracker

    def _finish(self, trial: Trial, summary: dict[str, Any], seconds: float) -> bool:
        """Track all of a trial that is done, and close; whether MLflow has had everything."""
        tracker = self._open.pop(trial.name, None) or self._track(trial)
        _log_curve(tracker, trial, summary["val_curve"])  # it may have ended before its driver's death
        for fork in summary["annealed"]:
            if fork["val_loss"] is not None:
                at = {f"annealed/{key}": fork[key] for key in ("val_loss", "budget_fraction", *AXES)}
                tracker.log(at, int(fork["steps"]))
        tracker.tag("diverged", str(summary["diverged"]).lower())
        for name in (SUMMARY, SPEC):
            tracker.artifact(self.folder(trial) / name)
        return tracker.close("FINISHED", seconds)

    def _fail(self, trial: Trial, why: str) -> None:
        self._fractions[trial.name] = 1.0
        self.failures[trial.name] = why
        say(f"  {trial.name} failed: {why}")
        if trial.name in self._open:  # its process may never have come up
            self._open.pop(trial.name).close("FAILED", TRIAL_SECONDS)

    def _news(self, trial: Trial, result: dict[str, Any]) -> Iterable[str]:
        if result.get("action", "wait") != "wait":
            size = result["curve"][-1]["parameters"]
            yield f"{trial.name}: {result['action']} at {result['at']:.0%}, {size:,} parameters"
        if result.get("unsaved"):
            yield f"{trial.name}: {result['unsaved']}"
        done, ended = fmean(self._fractions.values()), sum(fraction >= 1 for fraction in self._fractions.values())
        left = f", {self._eta.left(done)} left" if done < 1 else ""
        progress = f"{self._stage}: {done:.0%}, {ended} of {len(self._fractions)} done{left}"
        if (summary := result.get("summary")) is not None:
            loss = "given up" if summary["diverged"] else f"val loss {summary['val_loss']:.4f}"
            grafts = counted(len(summary["grafts"]), "graft") if summary["grafts"] else "it did not grow"
            grown = f", {grafts}" if trial.arm.kind.grows else ""
            yield f"{trial.name}: {loss}, {summary['parameters']:,} parameters{grown} ({progress})"
            if told := unplayed(summary):
                yield f"{trial.name}: {told}"
        elif int(10 * done) > self._shown:
            self._shown = int(10 * done)
            yield progress


def _log_curve(tracker: Tracker, trial: Trial, curve: Sequence[dict[str, float]]) -> None:
    """Track a curve, and the loss at the equal parts of the budget; what was tracked before is so once."""
    budget = trial.spec.budget
    for point in curve:
        tracker.log(metrics(point), int(point["steps"]))
    readings, losses = ([point[key] for point in curve] for key in (budget.axis, "val_loss"))
    part = budget.amount / budget.decisions
    costs = part * np.arange(int(readings[-1] / part * (1 + 1e-9)) + 1)
    for k, (cost, loss) in enumerate(zip(costs, np.interp(costs, readings, losses), strict=True)):
        tracker.log({f"grid/{budget.axis}": cost, "grid/val_loss": loss}, k)
