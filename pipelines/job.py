"""What every pipeline does first: choose the spec, find the data, name the output folder, and say so."""

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from esper.pipelines.arguments import CommonArguments
from esper.platform.console import say
from esper.platform.errors import unknown
from esper.platform.spec import RunSpec, load_spec
from esper.platform.storage import check_unused, write_text
from esper.workers.candidates import telemetry_space
from esper.workers.tolaria.data import TokenData, ensure
from esper.workers.tolaria.data.sources import SOURCES
from esper.workers.tolaria.device import pick_device

TASKS = {"tinystories": {"cuda": "tinystories", "cpu": "tinystories-char"}}
"""Task → device → preset."""
FLEET_ON_CPU = "demo"
"""The preset of pipelines that train GPTs by the hundred, where there is no GPU: minutes instead of hours."""


@dataclass(frozen=True)
class Job:
    """A pipeline's work, settled.

    Attributes:
        spec: resolved; `spec.data.source` is what was asked for.
        data: folder of the prepared shards.
        out: where results go; it holds `spec.json`.
    """

    spec: RunSpec
    data: Path
    out: Path

    def open_data(self) -> TokenData:
        """The shards, checksums verified."""
        return TokenData.open(self.data)


def open_job(arguments: CommonArguments, what: str, *, fleet: bool = False) -> Job:
    """Settle spec, data and output folder; nothing is written before all of them are known to be good.

    Args:
        arguments: the command line.
        what: the pipeline's name, for the output folder's.
        fleet: whether it trains GPTs by the hundred, for the choice of the preset.

    Raises:
        UserError: any of them is not.
    """
    spec = resolve_spec(arguments, fleet=fleet)
    out = output_folder(arguments, what)
    data = ensure(
        spec.data.source,
        spec.data.tokenizer,
        valid_fraction=spec.data.valid_fraction,
        max_bytes=spec.data.max_bytes,
    )
    job = Job(spec, data, out)
    manifest = job.open_data().manifest
    tokens = {name: split.tokens for name, split in manifest.splits.items()}
    unseen = sum(split.unseen for split in manifest.splits.values())
    say(f"preset  {spec.preset}: {describe(spec)}")
    say(f"data    {manifest.source}, {spec.data.tokenizer}: {tokens['train']:,} training tokens in {data}")
    if unseen:
        say(f"        {unseen:,} characters of the validation text are not in the training text: one reserved id")
    say(f"out     {out}")
    write_text(out / "spec.json", spec.model_dump_json(indent=2) + "\n")
    return job


def resolve_spec(arguments: CommonArguments, *, fleet: bool = False) -> RunSpec:
    """The preset (by task and device where none is named) with overrides; blueprints and device are checked too."""
    if arguments.task not in TASKS:
        raise unknown("task", arguments.task, TASKS)
    gpu = torch.cuda.is_available()
    chosen = FLEET_ON_CPU if fleet and not gpu else TASKS[arguments.task]["cuda" if gpu else "cpu"]
    preset = arguments.preset or chosen
    overrides = list(arguments.set)
    if arguments.data is not None:
        named = str(arguments.data) in [source.name for source in SOURCES]
        overrides.append(f"data.source={arguments.data if named else arguments.data.absolute()}")
    spec = load_spec(preset, overrides)
    telemetry_space(spec)  # resolves the blueprints
    if spec.fleet.gpus == 0:
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
