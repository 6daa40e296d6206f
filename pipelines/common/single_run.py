"""One run under one arm: begun or taken up again, saved at every decision, tracked, and told of."""

import math
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from esper.pipelines.common.arguments import CommonArguments
from esper.pipelines.common.play import barren, metrics, play, save, take_up, unplayed
from esper.pipelines.common.preset import check_fits, resolve_spec
from esper.pipelines.common.run_folder import RunFolder
from esper.pipelines.common.stopping import Stopped, stop_signals
from esper.platform import checkpoint
from esper.platform.checkpoint import CheckpointStore
from esper.platform.console import Eta, counted, duration, say
from esper.platform.contracts import GraftAction
from esper.platform.errors import UserError
from esper.platform.recording import SEEN_FILE
from esper.platform.spec import RunSpec
from esper.platform.storage import write_bytes, write_json
from esper.platform.telemetry import Telemetry
from esper.policies.arms import ArmInputs, make_policy
from esper.policies.recorder import Recorder
from esper.policies.simic.policy import policy_file
from esper.workers.run import GrowthRun
from esper.workers.tolaria.data import TokenData, ensure, open_data
from esper.workers.tolaria.export import check_tokenizer
from esper.workers.tolaria.gpt2 import from_gpt2

KEPT = ("summary.json", "spec.json")  # in MLflow
REFRESH_SECONDS = 0.5  # of the line that a terminal shows between decisions; elsewhere it is said once, at the start
OF_NO_SHAPE = {"host.dropout", "host.attention"}  # what `--set` may change of a host that is given
CHECKPOINTS, RUN = "checkpoints", "run"  # in the output folder: `checkpoints/run.safetensors`


def begin(arguments: CommonArguments, arm: str, files: Mapping[str, Path | None]) -> int:
    """Settle, and train from the start; `files`: the arm's inputs by their names in `ArmInputs`, and a GPT-2's."""
    spec, policy = resolve_spec(arguments), files["policy"]
    files = {**files, "policy": policy and policy_file(policy)}
    if (weights := files.get("model")) is not None:
        spec = _growing(weights.parent, spec, arguments.set)
    _policy(arm, spec, arguments.seed, files)  # a file that is no good is refused before anything is written
    folder = RunFolder.new(arguments, spec, f"train-{arm.replace(':', '.')}")
    folder.tell_laws(files["laws"])
    with folder.begin("train", {"arm": arm}, files, [arm]) as inputs:
        growth = GrowthRun(spec, folder.tokens, weights=inputs.get("model"))
        growth.reset(seed=folder.seed)
        return train(folder, growth, _policy(arm, spec, folder.seed, inputs), arm)


def resume(out: Path) -> int:
    """Go on with the run in `out` from its checkpoint, or send MLflow the rest of an ended one."""
    with RunFolder.reopen(out, "train") as folder:
        arm = str(folder.plan.get("arm"))
        if folder.ended:
            if folder.send(lambda: folder.track({"arm": arm}), KEPT):
                return 0
            raise UserError(f"the run in {out} has ended: its results are in {folder.out / 'summary.json'}.")
        policy = _policy(arm, folder.spec, folder.seed, inputs := folder.check())
        growth = GrowthRun(folder.spec, folder.tokens, weights=inputs.get("model"))
        saved = folder.out / CHECKPOINTS / f"{RUN}.safetensors"
        kept = checkpoint.read(saved) if saved.exists() else None  # it may have been killed before its first decision
        take_up(growth, policy, kept, folder.seed)
        where = f"at optimizer step {growth.ledger.steps:,} ({growth.fraction():.0%} of the budget)"
        say(f"resume  {folder.out}, {arm}, {where}")
        return train(folder, growth, policy, arm)


def saved_run(out: Path) -> Path:
    """The newest checkpoint of the run in a folder; raises UserError where there is none."""
    saved = out / CHECKPOINTS / f"{RUN}.safetensors"
    if not saved.exists():
        raise UserError(f"{out} holds no run that has come to a decision: name an output folder of `esper train`.")
    return saved


def train(folder: RunFolder, growth: GrowthRun, policy: Recorder, arm: str) -> int:
    """Play the run to its end, saving at every decision, and report; returns 1 if it was given up."""
    out, eta = folder.out, Eta(growth.fraction())
    if arm != "static" and not growth.grafts and (told := barren(growth)):
        say(told)
    with (
        stop_signals(f"stopped; go on with: esper train --resume {out}") as check,
        CheckpointStore(out / CHECKPOINTS) as checkpoints,
        folder.track({"arm": arm}) as tracker,
    ):

        def on_decision(growth: GrowthRun, telemetry: Telemetry, action: GraftAction) -> None:
            _say_decision(growth, telemetry, action, eta)
            tracker.log(metrics(growth.curve[-1]), growth.ledger.steps)
            save(growth, policy, checkpoints, RUN)

        next_line, terminal = time.monotonic() + REFRESH_SECONDS, sys.stderr.isatty()

        def on_step(growth: GrowthRun) -> None:
            nonlocal next_line
            check()
            if time.monotonic() > next_line:
                next_line = time.monotonic() + REFRESH_SECONDS if terminal else math.inf
                if terminal:
                    print(f"\r\033[K{_standing(growth, eta)}", end="", file=sys.stderr, flush=True)
                else:
                    say(_standing(growth, eta))

        growth.on_step = on_step
        try:
            summary = play(growth, policy, arm=arm, on_decision=on_decision)
        except Stopped:
            save(growth, policy, checkpoints, RUN)
            checkpoints.close()
            if not checkpoints.failed:  # that has been said
                say(f"saved at optimizer step {growth.ledger.steps:,}")
            raise
        checkpoints.flush()
        for point in growth.curve[1:]:  # a full disk may have kept one from the journal
            tracker.log(metrics(point), int(point["steps"]))
        summary["mlflow"] = tracker.run_id
        write_bytes(out / SEEN_FILE, policy.record(growth.telemetry))
        write_json(out / "summary.json", summary)
        for name in KEPT:
            tracker.artifact(out / name)
    _report(summary, growth.fraction(), growth.spec.data.unit)
    say(f"results: {out / 'summary.json'}")
    say(f"compare: {tracker.where}")
    return 1 if summary["failure"] else 0


def _say_decision(run: GrowthRun, telemetry: Telemetry, action: GraftAction, eta: Eta) -> None:
    """What was decided, and where the run stands now."""
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    chosen = telemetry.actions[action.index]
    if chosen.operation != "wait":
        say(f"  {chosen}: {action.reason}")
    for rollback in run.rollbacks:
        if rollback.decision == telemetry.sequence:
            removed = f", {rollback.removed} removed" if rollback.removed else ""
            say(f"  rolled back at step {rollback.optimizer_step:,}: {rollback.fault}{removed}")
    accuracy = "" if run.accuracy is None else f", accuracy {run.accuracy:.1%}"
    say(f"{_standing(run, eta)}, val loss {run.loss:.4f}{accuracy}")


def _standing(run: GrowthRun, eta: Eta) -> str:
    fraction, ledger = run.fraction(), run.ledger
    return (
        f"{fraction:4.0%} of budget, step {ledger.steps:,}, {run.layout.parameters:,} parameters, "
        f"{ledger.tokens / max(ledger.wall_seconds, 1e-9):,.0f} {run.spec.data.unit}s/s, {eta.left(fraction)} left"
    )


def _report(summary: Mapping[str, Any], fraction: float, unit: str) -> None:
    """Say what a run came to; its losses are means over `unit`s."""
    if summary["failure"]:
        say(
            f"given up at {fraction:.0%} of the budget: {summary['failure']}; the last sound state is in "
            f"{CHECKPOINTS}/: lower the learning rate."
        )
    accuracy = summary.get("accuracy")
    beside = f"perplexity {summary['perplexity']:.2f}" if accuracy is None else f"accuracy {accuracy:.1%}"
    say(
        f"{summary['arm']}: val loss {summary['val_loss']:.4f} nats per {unit} ({beside}), "
        f"{counted(summary['parameters'], 'parameter')}, {counted(len(summary['grafts']), 'graft')}, "
        f"{counted(summary['steps'], 'step')}, {summary['parameter_seconds']:,.0f} parameter-seconds, "
        f"{duration(summary['wall_seconds'])} of training"
    )
    for point in summary["annealed"]:
        loss = "not finite" if point["val_loss"] is None else f"{point['val_loss']:.4f}"
        say(f"annealed at {point['budget_fraction']:.0%} of the budget: val loss {loss}")
    if told := unplayed(summary):
        say(told)


def _growing(folder: Path, spec: RunSpec, changes: Iterable[str]) -> RunSpec:
    """The spec with the host in a folder of GPT-2's format; UserError where text or `changes` ask for another."""
    host, keys = from_gpt2(folder), {change.partition("=")[0] for change in changes}
    if shaping := sorted(key for key in keys - OF_NO_SHAPE if key.partition(".")[0] == "host"):
        raise UserError(f"--set {shaping[0]} is not for --from, whose folder says what the host is: leave it out.")
    own = spec.host.model_dump(include={key.partition(".")[2] for key in keys & OF_NO_SHAPE})
    spec = spec.overridden({"host": {**host.spec.model_dump(mode="json"), **own}})
    check_fits(spec)
    data, own = open_data(ensure(spec.data), verify=False), host.shape.vocab_size
    if data.manifest.vocab_size != own:
        what = f"{folder} has {own:,} token ids, and the text {data.manifest.vocab_size:,} ({data.manifest.made_with})"
        raise UserError(f"{what}: give text prepared with the model's tokenizer.")
    if isinstance(data, TokenData):
        check_tokenizer(folder, data)
    return spec


def _policy(arm: str, spec: RunSpec, seed: int, files: Mapping[str, Path | None]) -> Recorder:
    """The arm's controller, from the files that the user named or their copies."""
    given = {name: files.get(name) for name in ("policy", "schedule", "match", "laws")}
    return Recorder(make_policy(arm, ArmInputs(seed=seed, spec=spec, **given)))
