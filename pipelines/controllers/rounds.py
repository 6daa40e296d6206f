"""What a training begins with: a policy that was given, or a clone of the planner, taught on surrogates; then rounds.

Lessons: surrogates follow fitted laws. The planner labels their decisions. It plays the first lesson, and the clone so
far the others, so that the clone knows the states its own mistakes lead to (DAgger, Ross et al. 2011, 1011.0686).

Rounds: after each of R the laws are fitted to the runs before and the episodes learned from since, and the planner on
these is cloned: the anchor of the next round. The policy goes on.
"""

from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from esper.pipelines.common.ended_runs import ended_runs
from esper.pipelines.common.play import play
from esper.pipelines.common.run_folder import RunFolder
from esper.platform.console import counted, say
from esper.platform.contracts import GraftAction, Instance
from esper.platform.errors import UserError
from esper.platform.journal import Journal, read_entries
from esper.platform.law_file import FIT, FittedLaws
from esper.platform.provenance import INPUTS
from esper.platform.seeding import derive, stream
from esper.platform.spaces import observation
from esper.platform.spec import RunSpec
from esper.platform.storage import read_json, write_text
from esper.policies.planner import PlannerPolicy
from esper.policies.simic.baseline import Baseline
from esper.policies.simic.clone import agreement, choice, teach, untaught
from esper.policies.simic.episode import Played
from esper.policies.simic.net import ControllerNet
from esper.policies.simic.policy import FILE, SimicPolicy, trained_on
from esper.policies.simic.ppo import begin_from
from esper.workers.instances import instance_set
from esper.workers.laws.fit import annealed_losses, fitted
from esper.workers.laws.surrogate import SurrogateRun

ROUNDS, RUNS = "rounds", "runs.jsonl"  # in the output folder: laws and clones by iteration; episodes learned from
BEFORE = f"{INPUTS}/runs.json"  # the runs that the given laws were fitted to
LESSONS, EPISODES = 3, 32  # lessons, and episodes of each
HELD_OUT, EVERY = 12, 8  # episodes by which a clone is judged, on every eighth law of the ensemble


class Rounds:
    """The laws and anchors of a training from fitted laws, by iteration; all lies in its folder, made once."""

    hosts: tuple[str, ...] = ()  # that the policy which it begins with has grown: a clone, none

    def __init__(self, folder: RunFolder, spec: RunSpec, laws: Path, rounds: int, check: Callable[[], None]) -> None:
        self._folder, self._spec, self._given, self._check = folder, spec, laws, check
        self._starts = [spec.ppo.iterations * number // rounds for number in range(rounds)]
        self._refits = rounds > 1

    def begin(self, first: Path, extra: dict[str, Any]) -> None:
        """Leave the clone of the planner on the given laws as a training's first checkpoint."""
        begin_from(*self._clone(0), first, extra)

    def anchor(self, iteration: int) -> ControllerNet:
        """The clone that an iteration's update is held near to."""
        start = max(start for start in self._starts if start <= iteration)
        path = self._folder.out / ROUNDS / f"{start:06d}" / FILE
        return SimicPolicy.load(path).net if path.exists() else self._clone(start)[0].net

    def note(self, iteration: int, episodes: Iterable[Played]) -> None:
        if self._refits:
            with closing(Journal(self._folder.out / RUNS, lambda entry: entry["episode"])) as journal:
                for each in episodes:
                    journal.add({"episode": each.number, "iteration": iteration, "summary": each.summary})

    def laws(self, iteration: int) -> Path:
        """The laws after an iteration: fitted to the runs before and to all that was learned from until then."""
        out = self._folder.out
        path = out / ROUNDS / f"{iteration:06d}" / "laws.json" if iteration else self._given
        if not path.exists():
            before = read_json(out / BEFORE, "the runs before", "them")
            runs = [(RunSpec.model_validate(spec), text, summary) for spec, text, summary in before]
            text = self._folder.tokens.manifest.fingerprint()
            entries = [entry for entry in read_entries(out / RUNS) if entry["iteration"] <= iteration]
            runs += [(self._spec, text, entry["summary"]) for entry in entries]
            laws, _ = fitted(Path(FittedLaws.read(self._given).folder), runs)
            write_text(path, laws.model_dump_json(indent=2) + "\n")
            told = f"{laws.runs} runs, {counted(len(entries), 'episode')} of this training among them"
            say(f"laws    fitted anew to {told}; they miss {laws.residual:.4f} nats (rms)")
        return path

    def told(self) -> list[dict[str, Any]]:
        """How each clone did; the last laws are fitted to all that was learned from."""
        if self._refits:
            self.laws(self._spec.ppo.iterations)
        clones = sorted((self._folder.out / ROUNDS).glob(f"*/{FILE}"))
        return [SimicPolicy.load(path).card["extra"] for path in clones]

    def _clone(self, iteration: int) -> tuple[SimicPolicy, Baseline]:
        laws = FittedLaws.read(self.laws(iteration))
        seed, text = derive(self._folder.seed, "clone", iteration), self._folder.data is not None
        policy, baseline, told = Lessons(self._spec, laws, seed, text, self._check).clone()
        policy.save(self._folder.out / ROUNDS / f"{iteration:06d}" / FILE, {"iterations": iteration, **told})
        return policy, baseline


class Given:
    """Stands where `Rounds` does: the given policy is the first checkpoint, and the anchor of every iteration."""

    def __init__(self, path: Path) -> None:
        self._policy = SimicPolicy.load(path)
        self.hosts = trained_on(self._policy)["hosts"]

    def begin(self, first: Path, extra: dict[str, Any]) -> None:
        begin_from(self._policy, Baseline(), first, extra)

    def anchor(self, iteration: int) -> ControllerNet:
        return self._policy.net

    def note(self, iteration: int, episodes: Iterable[Played]) -> None: ...  # nothing is fitted to them

    def told(self) -> list[dict[str, Any]]:
        return []


def runs_of(path: Path, text: str) -> list[Any]:
    """Spec, text and summary of the runs that laws were fitted to; a UserError for none, or another text."""
    laws = FittedLaws.read(path)
    folder = Path(laws.folder)
    if laws.text != text:
        what = f"--rounds fits --laws {path} anew to this text too, and they are of another"
        raise UserError(f"{what}: leave it out, or give laws of runs on this text.")
    if not folder.is_dir() or folder == Path():
        what = f"--rounds fits laws anew to the runs of --laws {path}, and these are not where they were ({folder})"
        raise UserError(f"{what}: fit it again, with `{FIT}`.")
    found = [run for run in ended_runs(folder) if annealed_losses(run.summary)]
    if len(found) != laws.runs:
        what = f"--rounds fits laws anew to the {laws.runs} runs of --laws {path}, and {folder} has {len(found)} now"
        raise UserError(f"{what}: fit it again, with `{FIT}`.")
    return [(run.spec.model_dump(mode="json"), run.text, run.summary) for run in found]


@dataclass(frozen=True)
class Lessons:
    """Lessons by the planner on fitted laws; `check` is called at every decision, and may raise."""

    spec: RunSpec
    laws: FittedLaws  # that the planner plans with
    seed: int
    text: bool  # whether instances are those of text
    check: Callable[[], None]

    def clone(self) -> tuple[SimicPolicy, Baseline, dict[str, float]]:
        """The clone, a baseline of the lessons' returns, and how it does beside the planner on laws not shown, nats."""
        say(f"clone   the planner by {LESSONS} lessons of {EPISODES} surrogate episodes")
        torch.set_num_threads(1)  # fixes the rounding
        taught, unseen = parted(self.laws)
        net, baseline, episodes = untaught(self.spec.ppo.hidden, self.seed), Baseline(), []
        for lesson in range(LESSONS):
            numbers = range(lesson * EPISODES, (lesson + 1) * EPISODES)
            new = [self._played(taught, "train", number, net if lesson else None) for number in numbers]
            episodes += new
            baseline.update(new)
            teach(net, episodes, baseline, derive(self.seed, "lesson", lesson), self.check)
        told = self._judged(net, unseen)
        say(
            f"        it agrees in {told['agreement']:.0%} of its decisions on laws held out, and ends at "
            f"{told['clone_loss']:.4f} there, the planner at {told['planner_loss']:.4f}"
        )
        return SimicPolicy(net), baseline, told

    def _judged(self, net: ControllerNet, laws: FittedLaws) -> dict[str, float]:
        labelled = [self._played(laws, "tuning", number, net) for number in range(HELD_OUT)]
        told, run = {"agreement": agreement(net, labelled)}, SurrogateRun(self.spec, laws)
        for arm, policy in (("clone", SimicPolicy(net)), ("planner", PlannerPolicy(self.laws))):
            ends = []
            for number in range(HELD_OUT):
                self.check()
                run.reset(self._instance("tuning", number), derive(self.seed, "evaluate", number))
                ends.append(play(run, policy, arm=arm)["val_loss"])
            told[f"{arm}_loss"] = fmean(ends)
        return told

    def _instance(self, name: str, number: int) -> Instance:
        instances = list(instance_set(name, self.spec, text=self.text).values())
        return instances[number % len(instances)].model_copy(update={"law": number})

    def _played(self, laws: FittedLaws, name: str, number: int, net: ControllerNet | None) -> Played:
        """An episode that the planner labels, and that it plays, or a network."""
        run, seed = SurrogateRun(self.spec, laws), derive(self.seed, name, number)
        telemetry, random = run.reset(self._instance(name, number), seed), stream(seed, "played")
        seen, labels, actions, rewards = [observation(telemetry)], [], [], []
        while not run.ended:
            self.check()
            foretold = run.forecast(self.laws) if telemetry.mask.sum() > 1 else np.zeros(1)
            labels.append(choice(foretold, run.space.candidates))
            logits = torch.from_numpy(labels[-1])
            if net is not None:
                with torch.no_grad():
                    logits = net.logits({key: torch.from_numpy(array)[None] for key, array in seen[-1].items()})[0]
            # A prune, which the planner cannot foretell, leads where it could say nothing.
            chances = logits[: len(foretold)][np.isfinite(foretold)].double().softmax(dim=-1).numpy()
            actions.append(int(random.choice(np.flatnonzero(np.isfinite(foretold)), p=chances)))
            outcome = run.step(GraftAction(actions[-1], telemetry.sequence))
            telemetry = outcome.telemetry
            seen.append(observation(telemetry))
            rewards.append(outcome.reward)
        unused = np.zeros(len(actions), np.float32)
        return Played(
            number=number,
            instance=None,
            observations={key: np.stack([each[key] for each in seen]) for key in seen[0]},
            actions=np.array(actions),
            logits=np.array(labels),
            **dict.fromkeys(("log_p", "values", "weights", "worked", "waited"), unused),
            rewards=np.array(rewards),
            terminated=True,
        )


def parted(laws: FittedLaws) -> tuple[FittedLaws, FittedLaws]:
    """The ensemble without every `EVERY`th member, and these alone; of too few, both are all."""
    every = laws.ensemble.items()
    unseen = {name: values[EVERY - 1 :: EVERY] for name, values in every}
    taught = {name: tuple(value for i, value in enumerate(values, 1) if i % EVERY) for name, values in every}
    if not all(unseen.values()):
        return laws, laws
    return laws.model_copy(update={"ensemble": taught}), laws.model_copy(update={"ensemble": unseen})
