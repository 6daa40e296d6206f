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
from esper.pipelines.sweeps.chart_view import CURVE
from esper.pipelines.sweeps.trials import Trial
from esper.platform.checkpoint import CheckpointStore
from esper.platform.console import Eta, counted, say
from esper.platform.ledger import AXES
from esper.platform.pins import SPEC
from esper.platform.storage import read_json, write_json, write_text
from esper.platform.tracking import Tracker
from esper.platform.tracking_sync import sync, synced

SUMMARY = "summary.json"
SHOWN = 0.1  # of the work under way, between two lines of progress
TRIAL_SECONDS = 2.0  # that MLflow has to take the last of a trial while others run, which wait meanwhile


class SweepLog(tune.Callback):
    """The driver's side of all trials: children of the sweep's run, whose checkpoints lie in `store`.

    `curves` names the chart's curves by row; what `check` raises, which is called often, ends the sweep.
    """

    def __init__(
        self,
        folder: RunFolder,
        parent: Tracker,
        store: CheckpointStore,
        curves: Mapping[str, str],
        check: Callable[[], None],
    ) -> None:
        self.out = folder.out
        self.failures: dict[str, str] = {}
        self._folder, self._parent, self._store, self._check = folder, parent, store, check
        self._curve_names = curves
        self._trials: dict[str, Trial] = {}
        self._summaries: dict[str, dict[str, Any]] = {}  # as read: one is never written twice
        self._fractions: dict[str, float] = {}
        self._open: dict[str, Tracker] = {}
        self._curves: dict[str, list[dict[str, float]]] = {}  # of those that are open
        self._close_seconds = TRIAL_SECONDS
        self._stage, self._shown, self._eta = "", 0.0, Eta()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune keeps a copy beside its own files, for a restore that nobody asks for

    # -- What has been done ------------------------------------------------------------------------------------

    def folder(self, trial: Trial) -> Path:
        """A trial's."""
        return self.out / "trials" / trial.name

    def summary(self, trial: Trial) -> dict[str, Any] | None:
        """What a trial ended with; None where it has not."""
        path = self.folder(trial) / SUMMARY
        if trial.name not in self._summaries and path.is_file():
            self._summaries[trial.name] = read_json(path, str(path), "the summary of a trial")
        return self._summaries.get(trial.name)

    def missing(self, trials: Iterable[Trial]) -> list[Trial]:
        """Those that are to be run."""
        missing = []
        for trial in trials:
            self._trials[trial.name] = trial
            if self.summary(trial) is not None:
                continue
            if trial.impossible:
                self.failures[trial.name] = trial.impossible
            else:
                missing.append(trial)
        return missing

    def begin(self, stage: str, trials: Sequence[Trial]) -> None:
        """Say what comes now."""
        self._stage, self._shown, self._eta = stage, 0.0, Eta()
        self._fractions = {trial.name: 0.0 for trial in trials}
        for trial in trials:
            self.failures.pop(trial.name, None)
        labels = ", ".join(dict.fromkeys(trial.arm.label for trial in trials))
        say(f"{stage:<7} {counted(len(trials), 'trial')}: {labels}")

    def close(self, others: Iterable[Path], seconds: float) -> bool:
        """End what is still open (the sweep was stopped), and send MLflow what it lacks of what is done.

        Args:
            others: folders of other tracked runs, which may not be there.
            seconds: the longest to take.

        Returns:
            whether MLflow has had everything.
        """
        self._store.close()
        for tracker in self._open.values():
            if not tracker.close("KILLED", self._close_seconds):
                self._close_seconds = 0.0  # nor would it take the others
        uri, deadline = self._parent.uri, time.monotonic() + seconds

        def left() -> float:
            return max(0.0, deadline - time.monotonic())

        done = [(trial, summary) for trial in self._trials.values() if (summary := self.summary(trial)) is not None]
        late = [(trial, summary) for trial, summary in done if not synced(self.folder(trial), uri)]
        if late:
            say(f"MLflow gets what it lacks of {counted(len(late), 'trial')}: this takes {seconds:g} s at most")
        taken = [self._finish(trial, summary, left()) for trial, summary in late]
        taken += [sync(folder, uri, left()) for folder in others if (folder / SUMMARY).exists()]
        return all(taken)

    # -- Tune's callbacks --------------------------------------------------------------------------------------

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Stop here where that was asked for."""
        self._check()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Open the trial's folder and its run; another start after its process died goes on with the same."""
        planned = self._trials[trial.config["trial"]]
        if planned.name not in self._open:
            write_text(self.folder(planned) / SPEC, planned.spec.model_dump_json(indent=2) + "\n")
            self._open[planned.name], self._curves[planned.name] = self._track(planned), []

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Keep the points; at the end, the summary."""
        planned = self._trials[trial.config["trial"]]
        name = planned.name
        if "error" in result:
            self.failures[name] = result["error"]
            return
        curve = self._curves[name]
        known = curve[-1]["steps"] if curve else -1  # a process that was started again tells all that it knows
        if new := [point for point in result["points"] if point["steps"] > known]:
            curve += new
            self._fractions[name] = min(0.999, curve[-1]["budget_fraction"])
            _log_curve(self._open[name], planned, curve, len(curve) - len(new))
        if "summary" in result:
            self._fractions[name] = 1.0
            write_json(self.folder(planned) / SUMMARY, result["summary"])
            self._store.drop(name)
            if not self._finish(planned, result["summary"], self._close_seconds):
                self._close_seconds = 0.0  # it is away: all that it lacks is sent at the end
        self._show(planned, result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Its process has ended: without a summary it has failed."""
        self._fail(self._trials[trial.config["trial"]], "it ended without a summary")

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Its process has died, and Tune is going to start it again."""
        say(f"  {trial.config['trial']}: it failed, or its process died; it is started again, from its last save")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """It has died once too often."""
        text = (trial.error_file and Path(trial.error_file).read_text().strip()) or "its process died"
        self._fail(self._trials[trial.config["trial"]], f"{text.splitlines()[-1]} (log in {trial.local_path})")

    # -- Helpers -----------------------------------------------------------------------------------------------

    def _track(self, trial: Trial) -> Tracker:
        tracker = Tracker(
            self.folder(trial),
            self._folder.experiment,
            trial.name,
            tags=trial.tags() | {CURVE: self._curve_names.get(trial.point.row(trial.arm), "")},
            params=trial.spec.model_dump(mode="json"),
            parent=self._parent,
            key=f"{self._folder.key}/{trial.name}",
        )
        manifest = self._folder.tokens.manifest
        sizes = {name: split.tokens for name, split in manifest.splits.items()}
        tracker.log_input(Path(manifest.source).stem, manifest.source, manifest.fingerprint(), {"tokens": sizes})
        return tracker

    def _finish(self, trial: Trial, summary: dict[str, Any], seconds: float) -> bool:
        """Track all of a trial that is done, and close; whether MLflow has had everything."""
        tracker = self._open.pop(trial.name, None) or self._track(trial)
        _log_curve(tracker, trial, summary["val_curve"], 0)  # it may have ended before its driver's death
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
        if self.summary(trial) is None:
            self.failures.setdefault(trial.name, why)
            say(f"  {trial.name} failed: {self.failures[trial.name]}")
            if (tracker := self._open.pop(trial.name, None)) is not None:  # its process may never have come up
                tracker.close("FAILED", self._close_seconds)

    def _show(self, trial: Trial, result: dict[str, Any]) -> None:
        if result.get("action", "wait") != "wait":
            size = result["points"][-1]["parameters"]
            say(f"  {trial.name}: {result['action']} at {result['at']:.0%}, {size:,} parameters")
        if result.get("unsaved"):
            say(f"  {trial.name}: {result['unsaved']}")
        done = fmean(self._fractions.values())
        ended, running = sum(fraction >= 1 for fraction in self._fractions.values()), len(self._open)
        left = f"{ended} of {len(self._fractions)} done" + (f", {running} running" if running else "")
        left += f", {self._eta.left(done)} left" if done < 1 else ""
        if (summary := result.get("summary")) is not None:
            loss = "given up" if summary["diverged"] else f"val loss {summary['val_loss']:.4f}"
            grafts = counted(len(summary["grafts"]), "graft") if summary["grafts"] else "it did not grow"
            grown = f", {grafts}" if trial.arm.kind.grows else ""
            say(f"  {trial.name}: {loss}, {summary['parameters']:,} parameters{grown} ({self._stage}: {left})")
            if told := unplayed(summary):
                say(f"  {trial.name}: {told}")
        if done - self._shown >= SHOWN:
            self._shown = done
            say(f"  {done:.0%} of {self._stage}: {left}")


def _log_curve(tracker: Tracker, trial: Trial, curve: Sequence[dict[str, float]], first: int) -> None:
    """Track the points of a curve from number `first` on, and the loss at the equal parts of the budget they pass."""
    budget = trial.spec.budget
    part, readings = budget.amount / budget.decisions, [point[budget.axis] for point in curve]
    for point in curve[first:]:
        tracker.log(metrics(point), int(point["steps"]))
    for k in range(int(readings[max(0, first - 1)] / part), int(readings[-1] / part * (1 + 1e-9)) + 1):
        loss = float(np.interp(k * part, readings, [point["val_loss"] for point in curve]))
        tracker.log({f"grid/{budget.axis}": k * part, "grid/val_loss": loss}, k)  # once, however often it is passed
