"""Write a trained GPT, with its tokenizer, as files that others can load: the newest checkpoint of `esper train`.

esper export runs/train-static-20260101-120000 --out gpt2 --format gpt2     # for transformers; default: native
"""

import sys
from pathlib import Path
from typing import Any, Literal

from esper.pipelines.common.arguments import command, flag
from esper.platform.console import counted, say
from esper.platform.errors import UserError
from esper.platform.frozen import Frozen
from esper.platform.storage import check_unused

LOADING = {  # format → code that loads a host and, in its last line, the tokenizer
    "native": """
    from esper.workers.tolaria.export import load_native, load_native_tokenizer
    host = load_native({0!r})
    tokenizer = load_native_tokenizer({0!r})""",
    "gpt2": """
    from transformers import AutoTokenizer, GPT2LMHeadModel
    model = GPT2LMHeadModel.from_pretrained({0!r})
    tokenizer = AutoTokenizer.from_pretrained({0!r})""",
}


class ExportArguments(Frozen):
    """Write a trained GPT as files that others can load."""

    run: Path = flag(..., "The output folder of `esper train`.", positional=True)
    out: Path = flag(..., "A new or empty folder for the files; must be given.", "DIR")
    format: Literal["native", "gpt2"] = flag("native", "native: any shape; gpt2: for transformers, without experts.")


def run(arguments: ExportArguments) -> None:
    """Read, rebuild, write, report."""
    from esper.pipelines.common.single_run import saved_run
    from esper.platform import checkpoint
    from esper.workers.tolaria.export import export, host_of

    check_unused(arguments.out)
    out = arguments.out.resolve()
    values, tensors = checkpoint.read(saved_run(arguments.run))
    host = host_of(values, tensors)
    say(f"run     {arguments.run}, at optimizer step {values['ledger']['steps']:,}")
    say(f"host    {host.shape.parameters_count():,} parameters in {counted(host.shape.depth(), 'layer')}")
    try:
        tokenizer = tokenizer_of(arguments.run, values["data"])
    except UserError as error:
        say(f"the tokenizer is left out: {error}")
        tokenizer = None
    export(host, out, tokenizer, to=arguments.format)
    say(f"wrote   {out}: the host in the {arguments.format} format, {tokenizer.name if tokenizer else 'no'} tokenizer")
    loading = LOADING[arguments.format].format(str(out))
    say(f"load it with:{loading if tokenizer else loading.rpartition(chr(10))[0]}")


def tokenizer_of(run: Path, fingerprint: str) -> Any:
    """The tokenizer of a run's text; None for images. Raises UserError where it is not there, or another."""
    from esper.pipelines.common.run_folder import RunFolder
    from esper.workers.tolaria.data import TokenData, open_data

    data = open_data(RunFolder.read(run, "train").data or run, verify=False)
    if data.manifest.fingerprint() != fingerprint:
        raise UserError("its text, or the tokenizer, is another than when the run was trained.")
    return data.tokenizer if isinstance(data, TokenData) else None


main = command(run, ExportArguments, "esper export")

if __name__ == "__main__":
    sys.exit(main())
