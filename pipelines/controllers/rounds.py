"""What a training begins with: a policy that was given, or a clone of the planner (`lessons.py`), and further rounds.

After each of R rounds the laws are fitted to the runs before and the episodes learned from since, and the planner on
these is cloned: the anchor of the next round. The policy goes on.
"""

from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

from esper.pipelines.common.run_folder import RunFolder
from esper.pipelines.controllers.law_fitting import Found, fitted, runs_in
from esper.pipelines.controllers.lessons import Cloned, Lessons
from esper.platform.console import counted, say
from esper.platform.errors import UserError
from esper.platform.journal import Journal, read_entries
from esper.platform.law_file import FIT, FittedLaws
from esper.platform.provenance import INPUTS
from esper.platform.seeding import derive
from esper.platform.spec import RunSpec
from esper.platform.storage import read_json, write_text
from esper.policies.simic.baseline import Baseline
from esper.policies.simic.episode import Played
from esper.policies.simic.net import ControllerNet
from esper.policies.simic.policy import FILE, SimicPolicy, trained_on
from esper.policies.simic.ppo import begin_from

ROUNDS, RUNS = "rounds", "runs.jsonl"  # in the output folder: laws and clones by iteration; episodes learned from
BEFORE = f"{INPUTS}/runs.json"  # the runs that the given laws were fitted to


class Rounds:
    """The laws and anchors of a training from fitted laws, by iteration; all lies in its folder, made once."""

    hosts: tuple[str, ...] = ()  # that the policy which it begins with has grown: a clone, none

    def __init__(self, folder: RunFolder, spec: RunSpec, laws: Path, rounds: int, check: Callable[[], None]) -> None:
        self._folder, self._spec, self._given, self._check = folder, spec, laws, check
        self._starts = [spec.ppo.iterations * number // rounds for number in range(rounds)]
        self._refits = rounds > 1

    def begin(self, first: Path, extra: dict[str, Any]) -> None:
        """Leave the clone of the planner on the given laws as a training's first checkpoint."""
        cloned = self._clone(0)
        begin_from(cloned.policy, cloned.baseline, first, extra)

    def anchor(self, iteration: int) -> ControllerNet:
        """The clone that an iteration's update is held near to."""
        start = max(start for start in self._starts if start <= iteration)
        path = self._folder.out / ROUNDS / f"{start:06d}" / FILE
        return SimicPolicy.load(path).net if path.exists() else self._clone(start).policy.net

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
            runs = [Found.of(**entry) for entry in read_json(out / BEFORE, "the runs before", "them")]
            text = self._folder.tokens.manifest.fingerprint()
            entries = [entry for entry in read_entries(out / RUNS) if entry["iteration"] <= iteration]
            runs += [Found.of(self._spec, text, entry["summary"]) for entry in entries]
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

    def _clone(self, iteration: int) -> Cloned:
        laws = FittedLaws.read(self.laws(iteration))
        seed, text = derive(self._folder.seed, "clone", iteration), self._folder.data is not None
        cloned = Lessons(self._spec, laws, seed, text, self._check).clone()
        extra = {"iterations": iteration, **cloned.told}
        cloned.policy.save(self._folder.out / ROUNDS / f"{iteration:06d}" / FILE, extra)
        return cloned


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


def runs_of(path: Path, text: str) -> list[dict[str, Any]]:
    """The runs that laws were fitted to, as `Rounds` keeps them; a UserError for none, or where the text is another."""
    laws = FittedLaws.read(path)
    folder = Path(laws.folder)
    if laws.text != text:
        what = f"--rounds fits --laws {path} anew to this text too, and they are of another"
        raise UserError(f"{what}: leave it out, or give laws of runs on this text.")
    if not folder.is_dir() or folder == Path():
        what = f"--rounds fits laws anew to the runs of --laws {path}, and these are not where they were ({folder})"
        raise UserError(f"{what}: fit it again, with `{FIT}`.")
    return [found.kept() for found in runs_in(folder)]
