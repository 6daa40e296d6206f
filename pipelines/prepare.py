"""Turn text into a tokenizer and token shards, for `--data` of the other pipelines.

esper prepare --data stories.txt --tokenizer bpe:4096 --out data/stories
"""

import sys

from esper.pipelines.common.arguments import CommonArguments, command, flag
from esper.platform.console import say
from esper.platform.storage import write_json


class PrepareArguments(CommonArguments):
    """Turn text into a tokenizer and token shards."""

    tokenizer: str | None = flag(None, "char, bpe:N or gpt2 (default: the preset's).", "NAME")


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


main = command(run, PrepareArguments, "esper prepare")

if __name__ == "__main__":
    sys.exit(main())
