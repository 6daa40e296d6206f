"""Text from a trained GPT, on the CPU: of a run's folder, an export in the native format, or a checkpoint."""

import sys
from pathlib import Path
from typing import Any

from esper.pipelines.common.arguments import command, flag
from esper.platform.errors import UserError
from esper.platform.frozen import Frozen


class SampleArguments(Frozen):
    """Write text with a trained GPT."""

    run: Path = flag(..., "A folder of `esper train` or `esper export`, or a run's checkpoint.", positional=True)
    prompt: str = flag("", "How the text begins (default: as a document may).", "TEXT")
    tokens: int = flag(200, "Tokens to add, at most.", ge=1, le=100_000)
    temperature: float = flag(0.8, "Below 1 likelier tokens, at 0 the likeliest.", ge=0, le=100, allow_inf_nan=False)
    top_k: int = flag(40, "How many of the likeliest tokens there are to draw from.", ge=1)
    seed: int = flag(0, "Equal seeds give equal texts; 0 or more.", ge=0, lt=2**63)


def run(arguments: SampleArguments) -> None:
    """Load, write."""
    from esper.workers.tolaria.sampling import sample

    host, tokenizer = load(arguments.run)
    print(sample(host, tokenizer, **arguments.model_dump(exclude={"run"})))


def load(path: Path) -> tuple[Any, Any]:
    """The host and its tokenizer. Raises UserError where there is none, or the host takes no text."""
    from esper.pipelines.common.single_run import saved_run
    from esper.pipelines.tools.export import tokenizer_of
    from esper.platform import checkpoint
    from esper.workers.tolaria.export import MODEL, host_of, load_native, load_native_tokenizer

    if (path / MODEL).exists():
        if (path / "config.json").exists():
            raise UserError(f"{path} is a GPT-2 for transformers: load it there, or export in the native format.")
        return _of_text(load_native(path), path), load_native_tokenizer(path)
    file = path if path.is_file() else saved_run(path)
    values, tensors = checkpoint.read(file)
    host = _of_text(host_of(values, tensors), path)
    return host, tokenizer_of(file.absolute().parents[1], values["data"])


def _of_text(host: Any, path: Path) -> Any:
    if host.spec.takes != "text":
        what = f"{path} holds a {host.spec.kind}, which takes {host.spec.takes}"
        raise UserError(f"{what} and writes no text: name a run on text.")
    return host


main = command(run, SampleArguments, "esper sample")

if __name__ == "__main__":
    sys.exit(main())
