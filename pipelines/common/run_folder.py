"""A command's results in a folder: one process at a time, what they rest on, and what it takes to go on.

Text, spec, code and the `inputs` (copied into the folder) are pinned by `begin` and checked by `check` after
`reopen`; `track` starts the MLflow tracker, whose journal lies in the folder too.
"""

import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Self
from uuid import uuid4

from pydantic import Field

from esper.pipelines.common.arguments import CommonArguments
from esper.pipelines.common.preset import describe
from esper.platform.console import say
from esper.platform.errors import UserError
from esper.platform.frozen import Frozen
from esper.platform.law_file import FittedLaws
from esper.platform.provenance import INPUTS, PINS, SPEC, check_pins, pin
from esper.platform.spec import RunSpec, load_spec
from esper.platform.storage import alone, check_unused, read_json, write_json
from esper.platform.tracking import Tracker, synced
from esper.platform.tracking_store import tracking_uri
from esper.workers.laws.scaling_law import budget_tokens
from esper.workers.tolaria.data import Data, ensure, open_data
from esper.workers.tolaria.hosts import start_shape

PLAN = f"{INPUTS}/plan.json"  # the fields of RunFolder but for `out` and `spec`


class RunFolder(Frozen):
    """A folder of results, and what its work is."""

    out: Path = Field(exclude=True)
    spec: RunSpec = Field(exclude=True)  # `spec.data.source` is the text that was asked for
    data: Path | None  # the prepared shards; None on loss laws
    seed: int  # of the run, or the first of several
    task: str
    key: str  # of its run in MLflow
    store: str  # MLflow's, that resumed work goes on with unless MLFLOW_TRACKING_URI is set
    command: str = ""  # `esper COMMAND`, once it has begun
    plan: dict[str, Any] = Field(default={})  # what the command goes on with, beside its spec

    @classmethod
    def new(cls, arguments: CommonArguments, spec: RunSpec, name: str, *, laws: bool = False) -> Self:
        """Settle data (none on laws), say what is to be done, and make the folder (default: `runs/NAME-TIME`)."""
        out, data = output_folder(arguments, name), None if laws else ensure(spec.data)
        common = {"seed": arguments.seed, "task": arguments.task, "key": uuid4().hex, "store": tracking_uri()}
        folder = cls(out=out, spec=spec, data=data, **common)
        say(f"preset  {spec.preset}: {describe(spec)}")
        if not laws:
            manifest = folder.tokens.manifest
            folder.tokens.check(spec)
            say(f"data    {manifest} in {data}")
            budget = budget_tokens(spec, start_shape(spec, manifest.vocab_size))
            if (epochs := budget / manifest.counts["train"]) > 1:
                often = f"sees each {spec.data.unit} {epochs:.1f} times (epochs)"
                say(f"        of which a run that stays at its starting size {often}")
            if manifest.notice:
                say(f"        {manifest.notice}")
        say(f"out     {out}")
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {out} cannot be made ({error.strerror}): name one where you may write.") from None
        return folder

    @contextmanager
    def begin(
        self,
        command: str,
        plan: Mapping[str, Any] | None = None,
        inputs: Mapping[str, Path | None] | None = None,
        arms: Iterable[str] = (),
    ) -> Iterator[dict[str, Path]]:
        """Lock the folder for `esper COMMAND` by `arms`; yields copies of `inputs`, which the results rest on."""
        with alone(self.out):
            kept = self.model_copy(update={"command": command, "plan": dict(plan or {})})
            write_json(self.out / PLAN, kept.model_dump(mode="json"))
            given = {name: path for name, path in (inputs or {}).items() if path is not None}
            yield self.pin({**given, "plan": self.out / PLAN}, arms)

    @classmethod
    def read(cls, out: Path, command: str) -> Self:
        """The folder of earlier work. Raises UserError where `out` is not a folder of this command."""
        out, path = out.resolve(), out.resolve() / PLAN
        if not (out / PINS).exists():
            raise UserError(f"{out} holds no work of `esper {command}`: name the output folder of one.")
        kept = read_json(path, str(path), "a folder that `esper` made")
        whole = {**kept, "out": out, "spec": load_spec(out / SPEC)} if isinstance(kept, dict) else kept
        folder = cls.checked(whole, str(path))
        if folder.command != command:
            raise UserError(f"{out} holds the work of `esper {folder.command}`, and not of `esper {command}`.")
        return folder

    @classmethod
    @contextmanager
    def reopen(cls, out: Path, command: str) -> Iterator[Self]:
        """Lock the folder of earlier work to go on with it; raises as `read`, or where another process works there."""
        folder = cls.read(out, command)
        with alone(folder.out):
            os.environ.setdefault("MLFLOW_TRACKING_URI", folder.store)
            yield folder

    def check(self) -> dict[str, Path]:
        """The inputs' copies. Raises UserError where text, spec, code or inputs have changed since the work began."""
        return check_pins(self.out, data=self._fingerprint)

    def pin(self, inputs: Mapping[str, Path], arms: Iterable[str] = ()) -> dict[str, Path]:
        """Write `spec.json` and the pins: when work begins, or goes on under a changed spec."""
        return pin(self.out, self.spec, data=self._fingerprint, inputs=inputs, arms=arms)

    @cached_property
    def tokens(self) -> Data:
        """The shards, checksums verified."""
        assert self.data is not None
        return open_data(self.data)

    @property
    def _fingerprint(self) -> str | None:
        return None if self.data is None else self.tokens.manifest.fingerprint()

    @property
    def ended(self) -> bool:
        return (self.out / "summary.json").exists()

    def track(self, tags: Mapping[str, Any], **options: Any) -> Tracker:
        """The tracker of its MLflow run, in `experiment` with the options of `Tracker`."""
        named = {"experiment": self.experiment, "run_name": self.out.name, **options}
        tags = {"seed": self.seed, "preset": self.spec.preset, **tags}
        return Tracker(self.out, key=self.key, tags=tags, params=self.spec.model_dump(mode="json"), **named)

    @property
    def experiment(self) -> str:
        """MLflow's experiment, named after the text: `esper-tinystories`."""
        text = self.task if self.data is None else Path(self.tokens.manifest.source).stem
        return "esper-" + re.sub(r"[^\w.-]+", "-", text)

    def send(self, track: Callable[[], Tracker], files: Iterable[str]) -> bool:
        """Send MLflow what it lacks of ended work, or raise UserError; False where it lacks nothing."""
        if synced(self.out, tracking_uri()):
            return False
        tracker = track()
        for name in files:
            tracker.artifact(self.out / name)
        if not tracker.close(ended=int((self.out / "summary.json").stat().st_mtime * 1000)):
            raise UserError(f"MLflow did not take everything of {self.out}: try again once it is there.")
        say(f"MLflow has had everything of {self.out} now.")
        return True

    def tell_laws(self, path: Path | None) -> None:
        """Say what differs between these runs and those that laws were fitted to, if anything."""
        unlike = [] if path is None else FittedLaws.read(path).unlike(self.spec, self._fingerprint or "")
        if unlike:
            say(f"notice  {path} was fitted to runs that differ from these in {', '.join(unlike)}")


def output_folder(arguments: CommonArguments, name: str) -> Path:
    """`--out`, or `runs/<name>-<time>`; not yet made."""
    out = arguments.out or Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    if not out.is_dir() or not {path.name for path in out.iterdir()} <= {".lock", SPEC, INPUTS}:
        check_unused(out)  # what a process left that was killed while it began is nothing
    return out.resolve()
