"""The `esper` command: `esper train …` is `python pipelines/train.py …`.

Only the pipeline that was asked for is imported, so that `esper --help` answers at once.
"""

import sys
from importlib import import_module

from esper import __version__
from esper.platform.console import say
from esper.platform.errors import unknown

COMMANDS = {
    "prepare": "turn text into a tokenizer and token shards",
    "train": "train one GPT under one policy",
    "ppo": "train a controller with PPO over a fleet of workers",
    "policy": "look at a trained controller, hold it against other arms, distill it to a schedule",
    "sweep": "compare arms at an equal budget with Ray Tune",
    "report": "write the report on a sweep: the verdict, figures and tables, from MLflow",
    "export": "write a trained GPT as files for transformers, or for Esper itself",
    "demo": "the whole story in minutes on a laptop",
    "calibrate": "fit the reference clock to this machine",
}


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Command and its arguments; None for the process's own.

    Returns:
        The exit code: the pipeline's own, or 2 where no such command exists.
    """
    arguments = sys.argv[1:] if argv is None else argv
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        print(_help())
        return 0
    if command in ("-V", "--version"):
        print(f"esper {__version__}")
        return 0
    if command not in COMMANDS:
        say(f"error: {unknown('command', command, COMMANDS)}")
        return 2
    return import_module(f"esper.pipelines.{command}").main(arguments[1:])


def _help() -> str:
    """The list of commands."""
    lines = [f"  {name:<10} {summary}" for name, summary in COMMANDS.items()]
    return "\n".join(
        [
            "usage: esper COMMAND [ARGUMENTS]",
            "",
            "Grow GPTs while they train, on Ray.",
            "",
            *lines,
            "",
            "`esper COMMAND --help` lists a command's arguments; `esper --version` prints the version.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
