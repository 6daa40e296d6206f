"""What every pipeline does first: choose the spec, find the data, name the output folder, and say so."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from esper.pipelines.common.arguments import CommonArguments
from esper.platform.console import say
from esper.platform.errors import UserError, unknown
from esper.platform.spec import RunSpec, load_spec
from esper.platform.storage import check_unused, write_text
from esper.workers.candidates import telemetry_space
from esper.workers.laws.scaling_law import budget_tokens
from esper.workers.tolaria.data import TokenData, ensure
from esper.workers.tolaria.data.sources import SOURCES
from esper.workers.tolaria.device import pick_device
from esper.workers.tolaria.hosts import start_shape

TASKS = {"tinystories": {"cuda": "tinystories", "cpu": "tinystories-char"}}
"""Task → device → preset."""
LAWS = "tinystories-char"
"""The preset of what runs on loss laws, where none is named."""
FLEET_ON_CPU = "demo"
"""The preset of pipelines that train GPTs by the hundred, where there is no GPU: minutes instead of hours."""


@dataclass(frozen=True)
class Job:
    """A pipeline's work, settled; nothing has been written yet.

    Attributes:
        spec: resolved; `spec.data.source` is what was asked for.
        data: folder of the prepared shards.
        out: where results go.
    """

    spec: RunSpec
    data: Path
    out: Path

    def open_data(self) -> TokenData:
        """The shards, checksums verified."""
        return TokenData.open(self.data)

    def begin(self) -> None:
        """Make the output folder, with the resolved spec in it: everything is known to be good."""
        write_text(self.out / "spec.json", self.spec.model_dump_json(indent=2) + "\n")


def open_job(arguments: CommonArguments, spec: RunSpec, what: str) -> Job:
    """Settle data and output folder, and say what was chosen.

    Args:
        arguments: the command line.
        spec: what `resolve_spec` made of it.
        what: the pipeline's name, for the output folder's.

    Raises:
        UserError: either is not good, or the text is too short for the spec's context.
    """
    out = output_folder(arguments, what)
    data = ensure(spec.data)
    job = Job(spec, data, out)
    manifest = job.open_data().manifest
    for name, split in manifest.splits.items():
        if split.tokens <= spec.host.block_size + 1:
            raise UserError(
                f"the {name} text has {split.tokens:,} tokens, too few for a context of {spec.host.block_size}: "
                "give more text, or set a smaller host.block_size."
            )
    unseen = sum(split.unseen for split in manifest.splits.values())
    say(f"preset  {spec.preset}: {describe(spec)}")
    train = manifest.splits["train"].tokens
    say(f"data    {manifest.source}, {manifest.tokenizer}: {train:,} training tokens in {data}")
    epochs = budget_tokens(spec, start_shape(spec, manifest.vocab_size)) / train
    if epochs > 1:
        say(f"        of which a run that stays at its starting size sees each {epochs:.1f} times (epochs)")
    if unseen:
        say(f"        {unseen:,} characters of the validation text are not in the training text: one reserved id")
    say(f"out     {out}")
    return job


def law_job(arguments: CommonArguments, spec: RunSpec, what: str) -> Job:
    """`open_job` of what runs on loss laws: there is no data.

    Raises:
        UserError: the output folder is not good.
    """
    job = Job(spec, Path(), output_folder(arguments, what))
    say(f"preset  {spec.preset}: {describe(spec)}")
    say(f"out     {job.out}")
    return job


def resolve_spec(arguments: CommonArguments, *, on: Literal["here", "fleet", "laws"] = "here") -> RunSpec:
    """The preset (by task and device where none is named) with overrides; blueprints and device are checked too.

    Args:
        arguments: the command line.
        on: what GPTs are trained on: this process's device; a fleet's, by the hundred; or loss laws, which need none.

    Raises:
        UserError: an unknown task, preset, key or blueprint, a value that is not allowed, a GPU that is not there.
    """
    if arguments.task not in TASKS:
        raise unknown("task", arguments.task, TASKS)
    gpu = torch.cuda.is_available()
    by_device = FLEET_ON_CPU if on == "fleet" and not gpu else TASKS[arguments.task]["cuda" if gpu else "cpu"]
    preset = arguments.preset or (LAWS if on == "laws" else by_device)
    overrides = list(arguments.set)
    if arguments.data is not None:
        named = str(arguments.data) in [source.name for source in SOURCES]
        overrides.append(f"data.source={arguments.data if named else arguments.data.absolute()}")
    spec = load_spec(preset, overrides)
    telemetry_space(spec)  # resolves the blueprints
    if on == "here":
        pick_device(spec)
    return spec


def output_folder(arguments: CommonArguments, what: str) -> Path:
    """`--out`, or `runs/<what>-<time>`; not yet made."""
    out = arguments.out or Path("runs") / f"{what}-{time.strftime('%Y%m%d-%H%M%S')}"
    check_unused(out)
    return out.absolute()


def describe(spec: RunSpec) -> str:
    """A spec in a line."""
    host, budget = spec.host, spec.budget
    return (
        f"GPT of {host.n_layer} layer(s), {host.n_head} heads, C = {host.n_embd}, T = {host.block_size}, "
        f"up to {spec.growth.max_layers} layers; budget {budget.amount:,.0f} {budget.axis} "
        f"({spec.clock.kind} clock) in {budget.decisions} decisions"
    )
