"""The device of a run."""

import torch

from esper.platform.errors import UserError
from esper.platform.spec import RunSpec


def pick_device(spec: RunSpec) -> torch.device:
    """The spec's device; `auto` prefers a GPU. UserError where CUDA is asked for but absent."""
    if spec.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device is 'cuda', but this machine shows no CUDA GPU: use --set device=cpu or device=auto.")
    if spec.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(spec.device)


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work, before reading a clock."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
