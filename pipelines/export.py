"""Write a trained GPT as files that others can load.

    python pipelines/export.py runs/train-tamiyo-20260101-120000 --out gpt              # Esper's own format
    esper export runs/train-static-20260101-120000 --out gpt2 --format gpt2             # for transformers

Takes the newest checkpoint in the folder of `esper train`, whether the run has ended or goes on. Leaves `config.json`
and `model.safetensors` in the output folder, with the tokenizer of the run's text while that text is still there.
"""

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor

from esper.pipelines.common.arguments import Arguments, Positional, main_guard
from esper.pipelines.common.single_run import CHECKPOINTS, RUN
from esper.platform.checkpoint import CheckpointStore
from esper.platform.console import say
from esper.platform.errors import UserError
from esper.platform.storage import check_unused
from esper.workers.tolaria.data import TokenData, Tokenizer
from esper.workers.tolaria.export import export_gpt2, export_native, host_of

FORMATS = {
    "native": (
        export_native,
        """from esper.workers.tolaria.export import load_native, load_native_tokenizer
    host = load_native({0!r})""",
        "\n    tokenizer = load_native_tokenizer({0!r})",
    ),
    "gpt2": (
        export_gpt2,
        """from transformers import AutoTokenizer, GPT2LMHeadModel
    model = GPT2LMHeadModel.from_pretrained({0!r})""",
        "\n    tokenizer = AutoTokenizer.from_pretrained({0!r})",
    ),
}
"""How a host is written, and the lines of Python that load it, and its tokenizer, from a folder."""


class ExportArguments(Arguments):
    """Write a trained GPT as files that others can load."""

    run: Positional[Path] = Field(description="The output folder of `esper train`.")
    out: Annotated[Path, Field(title="DIR", description="A new or empty folder for the files; must be given.")]
    format: Annotated[
        Literal["native", "gpt2"],
        Field(description="native takes any shape; gpt2 is for transformers, and takes layers that are alike."),
    ] = "native"


def run(arguments: ExportArguments) -> None:
    """Read, rebuild, write, report."""
    check_unused(arguments.out)
    out = arguments.out.absolute()
    values, tensors = newest(arguments.run)
    host = host_of(values, tensors)
    write, load_host, load_tokenizer = FORMATS[arguments.format]
    say(f"run     {arguments.run}, at optimizer step {values['books']['ledger']['steps']:,}")
    say(f"host    {host.shape.parameters_count():,} parameters in {host.shape.depth()} layer(s)")
    tokenizer = tokenizer_of(values)
    write(host, out, tokenizer)
    with_tokenizer = f" with the tokenizer {tokenizer.name}" if tokenizer else ""
    say(f"wrote   {out}: the host in the {arguments.format} format{with_tokenizer}")
    say(f"load it with:\n    {load_host}{load_tokenizer if tokenizer else ''}".format(str(out)))


def newest(folder: Path) -> tuple[Any, dict[str, Tensor]]:
    """State and tensors of a run's newest checkpoint.

    Raises:
        UserError: the folder is no run's, or has no checkpoint, or a damaged one.
    """
    if not (folder / "spec.json").is_file():
        raise UserError(f"{folder} is no output folder of `esper train` (it has no spec.json): name one.")
    return CheckpointStore(folder / CHECKPOINTS).load(RUN)


def tokenizer_of(values: dict[str, Any]) -> Tokenizer | None:
    """The tokenizer of the text that a run was trained on; None, with a sentence, where it cannot be had."""
    folder = values.get("train", {}).get("plan", {}).get("data")
    try:
        if folder is None:
            raise UserError("the checkpoint does not say where its text is.")
        data = TokenData.open(Path(folder), verify=False)
        if data.manifest.fingerprint() != values["data"]:
            raise UserError(f"{folder} holds other text, or another tokenizer, than when the run was trained.")
        return data.tokenizer
    except UserError as error:
        say(f"the tokenizer is left out: {error}")
        return None


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    return main_guard(run, ExportArguments, "esper export", argv)


if __name__ == "__main__":
    sys.exit(main())
