"""Esper: grow GPTs while they train, on Ray. The repository's folders appear here as subpackages, through links."""

from importlib import import_module
from typing import Any

__version__ = "0.2.0.dev0"

# Public name → its module, imported at first use: a command's `--help` needs no torch.
_PUBLIC = {
    "Budget": "esper.pipelines.common.grow",
    "Grower": "esper.pipelines.common.grow",
    "from_gpt2": "esper.workers.tolaria.gpt2",
    "to_gpt2": "esper.workers.tolaria.gpt2",
}


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'esper' has no attribute {name!r}")
