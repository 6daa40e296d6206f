"""The spec that a command line asks for: a preset, chosen by task and device where none is named, with overrides."""

from typing import Literal

import torch

from esper.pipelines.common.arguments import CommonArguments
from esper.platform.console import counted
from esper.platform.errors import unknown
from esper.platform.memory import check_fits
from esper.platform.spec import RunSpec, load_spec
from esper.workers.candidates import telemetry_space
from esper.workers.tolaria.data.sources import SOURCES
from esper.workers.tolaria.device import pick_device
from esper.workers.tolaria.hosts import start_shape

TASKS = {"tinystories": {"cuda": "tinystories", "cpu": "tinystories-char"}}  # task → device → preset
LAWS = "tinystories-char"  # on loss laws
FLEET_ON_CPU = "demo"  # for GPTs by the hundred without a GPU: minutes instead of hours


def resolve_spec(arguments: CommonArguments, *, on: Literal["here", "fleet", "laws"] = "here") -> RunSpec:
    """The preset (by task and device where none is named) with overrides, checked; `on` is where GPTs are trained."""
    if arguments.task not in TASKS:
        raise unknown("task", arguments.task, TASKS)
    gpu = torch.cuda.is_available()
    by_device = FLEET_ON_CPU if on == "fleet" and not gpu else TASKS[arguments.task]["cuda" if gpu else "cpu"]
    preset = arguments.preset or (LAWS if on == "laws" else by_device)
    overrides = list(arguments.set)
    if arguments.data is not None:
        named = str(arguments.data) in [source.name for source in SOURCES]
        overrides.append(f"data.source={arguments.data if named else arguments.data.resolve()}")
    spec = load_spec(preset, overrides)
    if on != "laws" and spec.device != "cuda":
        check_fits(training_bytes(spec), "training")
    telemetry_space(spec)  # resolves the blueprints
    if on == "here":
        pick_device(spec)
    return spec


def training_bytes(spec: RunSpec) -> int:
    """About the least memory of training at the starting size, in bytes, without the vocabulary's part.

    Weights, gradients and AdamW's moments in float32; 12 activations of width C per token and layer.
    """
    shape, tokens = start_shape(spec, vocab_size=1), spec.data.batch_size * spec.host.block_size
    return 16 * shape.parameters_count() + 4 * 12 * tokens * spec.host.n_embd * shape.depth()


def describe(spec: RunSpec) -> str:
    """A spec in a line."""
    host, budget = spec.host, spec.budget
    return (
        f"GPT of {counted(host.n_layer, 'layer')}, {counted(host.n_head, 'head')}, C = {host.n_embd}, "
        f"T = {host.block_size}, up to {counted(spec.growth.max_layers, 'layer')}; budget {budget.amount:,.0f} "
        f"{budget.axis} ({spec.clock.kind} clock) in {counted(budget.decisions, 'decision')}"
    )
