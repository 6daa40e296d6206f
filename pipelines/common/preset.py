"""The spec that a command line asks for: a preset, chosen by task and device where none is named, with overrides."""

from typing import Literal

import psutil
import torch

from esper.pipelines.common.arguments import CommonArguments
from esper.platform.console import counted
from esper.platform.errors import UserError, unknown
from esper.platform.spec import RunSpec, load_spec
from esper.workers.observe import telemetry_space
from esper.workers.tolaria import compiled
from esper.workers.tolaria.data.sources import SOURCES
from esper.workers.tolaria.hosts import start_shape
from esper.workers.tolaria.trainer import pick_device

TASKS = {"tinystories": {"cuda": "tinystories", "cpu": "tinystories-char"}}  # task → device → preset
LAWS = "tinystories-char"  # on loss laws
FLEET_ON_CPU = "demo"  # for GPTs by the hundred without a GPU: minutes instead of hours


def resolve_spec(arguments: CommonArguments, *, on: Literal["here", "fleet", "laws"] = "here") -> RunSpec:
    """The preset (by task and device where none is named) with overrides, checked; `on` is where GPTs are trained."""
    if arguments.task not in TASKS:
        raise unknown("task", arguments.task, TASKS)
    gpu = torch.cuda.is_available()
    by_device = FLEET_ON_CPU if on == "fleet" and not gpu else TASKS[arguments.task]["cuda" if gpu else "cpu"]
    overrides = list(arguments.set)
    if arguments.data is not None:
        named = str(arguments.data) in [source.name for source in SOURCES]
        overrides.append(f"data.source={arguments.data if named else arguments.data.resolve()}")
    spec = load_spec(arguments.preset or (LAWS if on == "laws" else by_device), overrides)
    if on != "laws" and spec.device != "cuda":
        check_fits(spec)
    telemetry_space(spec)  # resolves the blueprints
    if on != "laws":
        compiled.check(spec)
    if on == "here":
        pick_device(spec)
    return spec


def check_fits(spec: RunSpec) -> None:
    """Raise UserError where training at the starting size needs more than the machine's memory.

    Weights, gradients and AdamW's moments in float32, and what the backward pass needs of each layer; the
    vocabulary's part is left out.
    """
    shape, each = start_shape(spec, vocab_size=1), spec.data.batch_size * spec.host.activations
    needed = 16 * shape.parameters_count() + 4 * each * shape.depth()  # bytes
    there = psutil.virtual_memory().total
    if needed > there:
        raise UserError(
            f"training needs about {needed / 2**30:,.0f} GiB of memory and this machine has {there / 2**30:,.0f}: "
            "choose a smaller host, context or batch."
        )


def describe(spec: RunSpec) -> str:
    """A spec in a line."""
    budget = spec.budget
    return (
        f"{spec.host}, up to {counted(spec.growth.max_layers, 'layer')}; budget {budget.amount:,.0f} "
        f"{budget.axis} ({spec.clock.kind} clock) in {counted(budget.decisions, 'decision')}"
    )
