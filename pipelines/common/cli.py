"""The `esper` command: `esper train …` is `python pipelines/train.py …`. Only the pipeline asked for is imported."""

import sys
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType

from esper import __version__
from esper.pipelines.common.arguments import choose

COMMANDS = {
    "prepare": "turn text into a tokenizer and token shards",
    "train": "train one GPT under one policy",
    "ppo": "train a controller with PPO over a fleet of workers",
    "policy": "look at a trained controller, hold it against other arms, distill it to a schedule",
    "sweep": "compare arms at an equal budget with Ray Tune",
    "transfer": "fine-tune a controller on another preset, and compare it with controllers from there",
    "report": "write the report on a sweep: the verdict, figures and tables, from MLflow",
    "watch": "draw a run, under way or ended: its loss, and its network as it grew",
    "record": "gather ended runs as a benchmark that replays them, for controllers to be compared without training",
    "settings": "list the keys of --set, with what they allow and mean",
    "export": "write a trained GPT as files for transformers, or for Esper itself",
    "sample": "write text with a trained GPT",
    "demo": "the whole story in minutes on a laptop",
    "calibrate": "fit the reference clock to this machine",
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code, or 2 where there is no such command."""
    line = sys.argv[1:] if argv is None else argv
    if line[:1] in (["-V"], ["--version"]):
        print(f"esper {__version__}")
        return 0
    commands = {name: (summary, partial(_run, name)) for name, summary in COMMANDS.items()}
    return choose("esper", "command", commands, line)


def module_of(name: str) -> ModuleType:
    """Where a command lies: in `pipelines/`, or in `pipelines/tools/`."""
    tools = "" if (Path(__file__).parents[1] / f"{name}.py").exists() else "tools."
    return import_module(f"esper.pipelines.{tools}{name}")


def _run(name: str, argv: list[str] | None) -> int:
    return module_of(name).main(argv)
