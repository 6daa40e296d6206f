"""Turn text into a tokenizer and token shards, or images into files of pixels, for `--data` of the other pipelines.

esper prepare --data stories.txt --tokenizer bpe:4096 --out data/stories
"""

import sys

from esper.pipelines.common.arguments import CommonArguments, command, flag
from esper.platform.console import say
from esper.platform.storage import write_json


class PrepareArguments(CommonArguments):
    """Turn text into a tokenizer and token shards, or images into files of pixels."""

    tokenizer: str | None = flag(None, "char, bpe:N or gpt2 (default: the preset's).", "NAME")


def run(arguments: PrepareArguments) -> None:
    """Settle, prepare, report."""
    from esper.pipelines.common.preset import resolve_spec
    from esper.pipelines.common.run_folder import output_folder
    from esper.workers.tolaria.data import prepare

    override = () if arguments.tokenizer is None else (f"data.tokenizer={arguments.tokenizer}",)
    arguments = arguments.model_copy(update={"set": arguments.set + override})
    spec, out = resolve_spec(arguments), output_folder(arguments, "data")
    say(f"preset  {spec.preset}: {spec.data.source}, {spec.data.encoding}; out {out}")
    manifest = prepare(spec.data, out)
    write_json(out / "summary.json", manifest.model_dump(mode="json"))
    say(f"results: {out}; use it with --data {out} --set {manifest.made_with}")


main = command(run, PrepareArguments, "esper prepare")

if __name__ == "__main__":
    sys.exit(main())
