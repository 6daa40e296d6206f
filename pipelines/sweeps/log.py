"""What is kept of a sweep's trials, and told of them: a folder each, a run each in MLflow, and lines of progress.

A trial's folder has `spec.json`, `tracking.jsonl` (the journal of what goes to MLflow, so that a server's outage loses
nothing), and at its end `summary.json`, which makes it done.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from statistics import fmean
from typing import Any

from ray import tune

from esper.pipelines.common.play import metrics, unplayed
from esper.pipelines.sweeps.trial import Trial
from esper.platform.checkpoint import CheckpointStore
from esper.platform.console import Eta, say
from esper.platform.errors import UserError
from esper.platform.provenance import commit
from esper.platform.storage import read_json, write_json, write_text
from esper.platform.tracking import Status, Tracker, synced
from esper.workers.observe import batch_tokens
from esper.workers.tolaria.data import Manifest
from esper.workers.tolaria.hosts import start_shape

SUMMARY, SPEC = "summary.json", "spec.json"
ANNEALED = ("val_loss", "budget_fraction", "parameter_seconds", "tokens", "flops", "seconds")
SHOWN = 0.1  # of the work under way, between two lines of progress
CLOSING_SECONDS = 60  # that MLflow has to take the last of a trial
AWAY_SECONDS = 2  # likewise, once it has not taken the last of another; and to wait without a word


class SweepLog(tune.Callback):
    """The driver's side of all trials.

    Args:
        out: the sweep's folder.
        experiment: of the runs in MLflow.
        parent: the sweep's own run there.
        key: of that run.
        manifest: of the text.
        storage: place of the trials' saves.
        check: called often; what it raises ends the sweep.
    """

    def __init__(
        self,
        out: Path,
        *,
        experiment: str,
        parent: Tracker,
        key: str,
        manifest: Manifest,
        storage: str,
        check: Callable[[], None],
    ) -> None:
        self.out = out
        self.failures: dict[str, str] = {}
        self._experiment, self._parent, self._key, self._manifest = experiment, parent, key, manifest
        self._saves, self._check = CheckpointStore(storage), check
        self._trials: dict[str, Trial] = {}
        self._weights: dict[str, float] = {}
        self._fractions: dict[str, float] = {}
        self._open: dict[str, _TrialLog] = {}
        self._closing: list[Future[None]] = []
        self._closers = ThreadPoolExecutor(4, thread_name_prefix="tracking-close")
        self._away = False  # MLflow has not taken the last of the trial that was closed last
        self._ended: dict[str, list[float]] = {}
        self._stage, self._shown, self._eta = "", 0.0, Eta()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune keeps a copy beside its own files, for a restore that nobody asks for

    # -- What has been done ------------------------------------------------------------------------------------

    def folder(self, trial: Trial) -> Path:
        """A trial's."""
        return self.out / "trials" / trial.name

    def summary(self, trial: Trial) -> dict[str, Any] | None:
        """What a trial ended with; none where it has not.

        Raises:
            UserError: its folder is of another spec.
        """
        folder = self.folder(trial)
        if (folder / SPEC).is_file() and (folder / SPEC).read_text() != _spec_text(trial):
            raise UserError(
                f"{folder} holds a run of another spec than this sweep would do: it was begun by another version of "
                "Esper, or changed by hand; start another sweep."
            )
        if not (folder / SUMMARY).is_file():
            return None
        return read_json(folder / SUMMARY, str(folder / SUMMARY), "the summary of a trial")

    def missing(self, trials: Sequence[Trial]) -> list[Trial]:
        """Those that are to be run; what MLflow has not had of the others is sent to it."""
        missing = []
        for trial in trials:
            self._trials[trial.name] = trial
            summary = self.summary(trial)
            if summary is None:
                missing.append(trial)
                continue
            self._note_end(trial, summary)
            if not self._tracked(trial):
                self._finish(trial, self._log_of(trial), summary)
        return missing

    def begin(self, stage: str, trials: Sequence[Trial]) -> None:
        """Say what comes now."""
        self._stage, self._shown, self._eta = stage, 0.0, Eta()
        self._fractions = {trial.name: 0.0 for trial in trials}
        self._weights = {trial.name: _expected_seconds(trial, self._manifest.vocab_size) for trial in trials}
        for trial in trials:
            self.failures.pop(trial.name, None)
        labels = dict.fromkeys(trial.entrant.label for trial in trials)
        say(f"{stage:<7} {len(trials)} trial(s): {', '.join(labels)}")

    def next_stage(self) -> str:
        """A name for Tune's own files, which nobody needs afterwards."""
        number = len(list((self.out / "tune").glob("*"))) if (self.out / "tune").exists() else 0
        return f"{number:02d}-{self._stage}"

    def close(self) -> bool:
        """Close what is still open (the sweep was interrupted), and wait for MLflow; whether it has had everything."""
        for log in self._open.values():
            self._close(log.close, "KILLED")
        self._open.clear()
        self._wait()
        for trial, summary in self._untracked():  # a server that was away may be back
            self._finish(trial, self._log_of(trial), summary)
        self._wait()
        self._closers.shutdown()
        return not self._untracked()

    # -- Tune's callbacks --------------------------------------------------------------------------------------

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Stop here where that was asked for."""
        self._check()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Open the trial's folder and its run."""
        planned = self._trials[trial.config["trial"]]
        if planned.name not in self._open:  # another start after its process died goes on with the same
            self._open[planned.name] = self._log_of(planned)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Keep the points; at the end, the summary."""
        planned = self._trials[trial.config["trial"]]
        name = planned.name
        if "error" in result:
            self.failures[name] = result["error"]
            return
        log = self._open[name]
        for point in result["points"]:
            log.point(point)
            self._fractions[name] = point["budget_fraction"]
        if "summary" in result:
            summary = result["summary"]
            write_json(self.folder(planned) / SUMMARY, summary)
            self._saves.drop(name)
            self._finish(planned, self._open.pop(name), summary)
            self._note_end(planned, summary)
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

    def _log_of(self, trial: Trial) -> "_TrialLog":
        folder = self.folder(trial)
        write_text(folder / SPEC, _spec_text(trial))
        tracker = Tracker.start(
            folder,
            self._experiment,
            trial.name,
            tags=trial.tags() | {"commit": commit() or "unknown"},
            params=trial.spec.model_dump(mode="json"),
            parent=self._parent,
            key=f"{self._key}/{trial.name}",
        )
        manifest = self._manifest
        tracker.log_input(
            manifest.source,
            source=manifest.source,
            digest=manifest.fingerprint(),
            profile={"tokens": {name: split.tokens for name, split in manifest.splits.items()}},
        )
        return _TrialLog(tracker, folder, trial.spec.budget.axis, trial.spec.budget.amount, trial.spec.budget.decisions)

    def _finish(self, trial: Trial, log: "_TrialLog", summary: dict[str, Any]) -> None:
        self._fractions[trial.name] = 1.0
        self._close(log.finish, summary)

    def _close(self, end: Callable[[Any, float], bool], argument: object) -> None:
        """End a trial's run in the background."""

        def work() -> None:
            self._away = not end(argument, AWAY_SECONDS if self._away else CLOSING_SECONDS)

        self._closing.append(self._closers.submit(work))

    def _wait(self) -> None:
        if wait(self._closing, AWAY_SECONDS).not_done:
            say(f"waiting for MLflow to take the last of the trials, {CLOSING_SECONDS:g} s for each at most")
        for future in self._closing:
            future.result()
        self._closing.clear()

    def _tracked(self, trial: Trial) -> bool:
        """Whether the store that is used now has had everything."""
        return synced(self.folder(trial), self._parent.uri)

    def _untracked(self) -> list[tuple[Trial, dict[str, Any]]]:
        """Trials that are done, of which MLflow has not had everything."""
        untracked = [trial for trial in self._trials.values() if not self._tracked(trial)]
        return [(trial, summary) for trial in untracked if (summary := self.summary(trial)) is not None]

    def _fail(self, trial: Trial, why: str) -> None:
        self._fractions[trial.name] = 1.0
        if (self.folder(trial) / SUMMARY).is_file():
            return
        self.failures.setdefault(trial.name, why)
        say(f"  {trial.name} failed: {self.failures[trial.name]}")
        log = self._open.pop(trial.name, None)  # none, if its process never came up
        if log is not None:
            self._close(log.close, "FAILED")

    def _note_end(self, trial: Trial, summary: dict[str, Any]) -> None:
        if trial.purpose == "test" and not summary["diverged"]:
            self._ended.setdefault(trial.row, []).append(summary["val_loss"])

    def _show(self, trial: Trial, result: dict[str, Any]) -> None:
        action = result.get("action", "wait")
        if action != "wait":
            point = result["points"][-1]
            say(f"  {trial.name}: {action} at {result['at']:.0%}, {point['parameters']:,} parameters")
        if result.get("unsaved"):
            say(f"  {trial.name}: {result['unsaved']}")
        done = sum(self._weights[name] * fraction for name, fraction in self._fractions.items())
        done /= sum(self._weights.values())
        ended = sum(fraction >= 1 for fraction in self._fractions.values())
        left = f"{ended} of {len(self._fractions)} done, {len(self._open)} running, {self._eta.left(done)} left"
        summary = result.get("summary")
        if summary is not None:
            loss = "given up" if summary["diverged"] else f"val loss {summary['val_loss']:.4f}"
            say(f"  {trial.name}: {loss}, {summary['parameters']:,} parameters ({self._stage}: {left})")
            if told := unplayed(summary):
                say(f"  {trial.name}: {told}")
        if done - self._shown >= SHOWN:
            self._shown = done
            means = ", ".join(f"{label} {fmean(losses):.4f}" for label, losses in self._ended.items())
            say(f"  {done:.0%} of {self._stage}: {left}" + (f"; mean loss so far: {means}" if means else ""))


class _TrialLog:
    """One trial's run in MLflow."""

    def __init__(self, tracker: Tracker, folder: Path, axis: str, amount: float, decisions: int) -> None:
        self._tracker, self._folder = tracker, folder
        self._axis, self._slice, self._decisions = axis, amount / decisions, decisions
        self._before: dict[str, float] | None = None
        self._k = 0

    def point(self, point: dict[str, float]) -> None:
        """A point of the curve, and those of the common grid that it passes; one that was logged is logged no more."""
        if self._before is not None and point["steps"] <= self._before["steps"]:
            return
        self._tracker.log(metrics(point), int(point["steps"]))
        while self._k <= self._decisions and self._k * self._slice <= point[self._axis] * (1 + 1e-9):
            at = {f"grid/{self._axis}": self._k * self._slice, "grid/val_loss": self._at(self._k * self._slice, point)}
            self._tracker.log(at, self._k)
            self._k += 1
        self._before = point

    def _at(self, reading: float, point: dict[str, float]) -> float:
        """Validation loss at a reading of the budget, on the line between two decisions."""
        before = self._before
        if before is None or point[self._axis] <= before[self._axis]:
            return point["val_loss"]
        share = (reading - before[self._axis]) / (point[self._axis] - before[self._axis])
        return before["val_loss"] + share * (point["val_loss"] - before["val_loss"])

    def finish(self, summary: dict[str, Any], seconds: float) -> bool:
        """Send what is known only now, and close; whether MLflow has had everything."""
        for point in summary["val_curve"]:  # of a trial that ended before its driver's death
            self.point(point)
        for point in summary["annealed"]:
            if point["val_loss"] is not None:
                self._tracker.log({f"annealed/{key}": point[key] for key in ANNEALED}, int(point["steps"]))
        self._tracker.tag("diverged", str(summary["diverged"]).lower())
        self._tracker.artifact(self._folder / SUMMARY)
        self._tracker.artifact(self._folder / SPEC)
        return self._tracker.close("FINISHED", seconds)

    def close(self, status: Status, seconds: float) -> bool:
        """End the run for now; whether MLflow has had everything."""
        return self._tracker.close(status, seconds)


def _spec_text(trial: Trial) -> str:
    return trial.spec.model_dump_json(indent=2) + "\n"


def _expected_seconds(trial: Trial, vocab_size: int) -> float:
    """Of a run at the size it starts with, by its clock's formula."""
    spec = trial.spec
    shape, tokens = start_shape(spec, vocab_size), batch_tokens(spec)
    steps = spec.budget.amount / spec.clock.axis_per_step(spec.budget.axis, shape, tokens)
    forks = sum((1 - spec.optimizer.decay_from) * at for at in spec.budget.cooldowns)
    return steps * spec.clock.step_seconds(shape, tokens) * (1 + forks)
