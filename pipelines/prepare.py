"""Turn text into a tokenizer and token shards, for `--data` of the other pipelines.

esper prepare --data stories.txt --tokenizer bpe:4096 --out data/stories
"""

import sys
from typing import Annotated

from pydantic import Field

from esper.pipelines.common.arguments import CommonArguments, main_guard
from esper.platform.console import say
from esper.platform.storage import write_json


class PrepareArguments(CommonArguments):
    """Turn text into a tokenizer and token shards."""

    tokenizer: Annotated[
        str | None, Field(title="NAME", description="char, bpe:N or gpt2 (default: the preset's).")
    ] = None


def run(arguments: PrepareArguments) -> None:
    """Settle, prepare, report."""
    from esper.pipelines.common.preset import resolve_spec
    from esper.pipelines.common.run_folder import output_folder
    from esper.workers.tolaria.data import prepare

    spec, out = resolve_spec(arguments), output_folder(arguments, "data")
    data = spec.data if arguments.tokenizer is None else spec.data.model_copy(update={"tokenizer": arguments.tokenizer})
    say(f"preset  {spec.preset}: {data.source}, {data.tokenizer}; out {out}")
    manifest = prepare(data, out)
    write_json(out / "summary.json", manifest.model_dump(mode="json"))
    say(f"results: {out}; use it with --data {out} --set data.tokenizer={manifest.tokenizer}")


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    return main_guard(run, PrepareArguments, "esper prepare", argv)


if __name__ == "__main__":
    sys.exit(main())
