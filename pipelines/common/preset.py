"""The spec that a command line asks for: a preset, chosen by task and device where none is named, with overrides."""

from typing import Literal

import psutil
import torch

from esper.pipelines.common.arguments import CommonArguments
from esper.platform.console import counted
from esper.platform.errors import UserError, like_a_path, unknown
from esper.platform.spec import RunSpec, load_spec
from esper.workers.observe import telemetry_space
from esper.workers.tolaria import compiled
from esper.workers.tolaria.data import image_sources, sources
from esper.workers.tolaria.hosts import start_shape
from esper.workers.tolaria.trainer import pick_device

TASKS = {  # task → where it is trained → preset; "cpu" is for where none is named
    "tinystories": {"cuda": "tinystories", "cpu": "tinystories-char", "fleet": "demo"},  # GPTs by the hundred: minutes
    "digits": {"cpu": "digits"},
    "cifar10": {"cuda": "cifar10", "cpu": "cifar10-cpu"},
}


def resolve_spec(arguments: CommonArguments, *, on: Literal["here", "fleet", "laws"] = "here") -> RunSpec:
    """The preset (by task and device where none is named) with overrides, checked; `on` is where GPTs are trained."""
    if arguments.task not in TASKS:
        raise unknown("task", arguments.task, TASKS)
    by_place, gpu = TASKS[arguments.task], torch.cuda.is_available()
    place = "cpu" if on == "laws" else "cuda" if gpu else on
    overrides = list(arguments.set)
    if arguments.data is not None:
        named = str(arguments.data) in [source.name for source in (*sources.SOURCES, *image_sources.SOURCES)]
        named |= not (arguments.data.exists() or like_a_path(str(arguments.data)))  # or meant to be
        overrides.append(f"data.source={arguments.data if named else arguments.data.resolve()}")
    spec = load_spec(arguments.preset or by_place.get(place, by_place["cpu"]), overrides)
    if on != "laws" and spec.device != "cuda":
        check_fits(spec)
    telemetry_space(spec)  # resolves the blueprints
    if on != "laws":
        compiled.check(spec)
    if on == "here":
        pick_device(spec)
    return spec


def check_fits(spec: RunSpec) -> None:
    """Raise UserError where weights, gradients, AdamW's moments and activations at the start exceed the memory."""
    shape, each = start_shape(spec, vocab_size=1), spec.data.batch_size * spec.host.activations
    needed = 16 * shape.parameters_count() + 4 * each * shape.depth()  # bytes
    there = psutil.virtual_memory().total
    if needed > there:
        what = f"training needs about {needed / 2**30:,.0f} GiB of memory and this machine has {there / 2**30:,.0f}"
        raise UserError(f"{what}: choose a smaller host, context or batch.")


def describe(spec: RunSpec) -> str:
    """A spec in a line."""
    budget = spec.budget
    return (
        f"{spec.host}, up to {counted(spec.growth.max_layers, 'layer')}; budget {budget.amount:,.0f} "
        f"{budget.axis} ({spec.clock.kind} clock) in {counted(budget.decisions, 'decision')}"
    )
