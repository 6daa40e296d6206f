"""SimicPolicy: a trained ControllerNet as a GrowthPolicy, and its file. Loads without Ray."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field

from esper.platform import checkpoint
from esper.platform.contracts import GraftAction, Probe
from esper.platform.errors import UserError, clipped
from esper.platform.frozen import Frozen
from esper.platform.spaces import observation
from esper.platform.telemetry import VERSION, Telemetry
from esper.policies.simic.net import ControllerNet

FILE = "policy.safetensors"
CHECKPOINTS = "checkpoints"  # inside a `ppo` run's folder, each named by its iteration
FORMAT = "simic-3"  # of the file and the network
WIDEST = 4096  # network that is read


class Card(Frozen):
    """A policy file's metadata."""

    format: str  # of the file and the network
    telemetry_version: int  # that it was trained on
    hidden: Annotated[int, Field(strict=True, ge=1, le=WIDEST)]  # width of the network
    extra: dict[str, Any]  # what its maker wanted kept, such as the preset's name


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints in the folder of a `ppo` run, oldest first."""
    return sorted(path.parent for path in (run / CHECKPOINTS).glob(f"*/{FILE}") if path.parent.name.isdigit())


def policy_file(path: Path) -> Path:
    """The policy's file, given that, its folder or a `ppo` run (its newest); a UserError where there is none."""
    newest = [folder / FILE for folder in checkpoints(path)[::-1]]
    file = next((each for each in (path, path / FILE, *newest) if each.is_file()), None)
    if file is None:
        what = "holds no trained policy" if path.exists() else "does not exist"
        raise UserError(f"policy {path} {what}: name a folder that `esper ppo` left.")
    return file


def trained_on(policy: "SimicPolicy") -> dict[str, Any]:
    """What a policy has learned from: preset, the kinds of hosts that it has grown, on loss laws or not."""
    extra = policy.card["extra"]
    hosts = extra.get("hosts") or ["transformer"]
    if not isinstance(hosts, list) or not all(isinstance(host, str) for host in hosts):
        raise UserError(f"the policy's card names {clipped(hosts)} as the hosts that it has grown: train it again.")
    return {"preset": extra.get("preset"), "hosts": hosts, "surrogate": bool(extra.get("surrogate"))}


def likeliest(chances: np.ndarray) -> int:
    """First whether to act, then the likeliest row: else WAIT with 0.4 would beat similar grafts that share 0.6."""
    return 0 if chances[0] >= 0.5 else 1 + int(chances[1:].argmax())


class SimicPolicy:
    """Chooses the `likeliest` legal candidate."""

    def __init__(self, net: ControllerNet, *, card: Card | None = None) -> None:
        self.net = net.eval()
        card = card or Card(format=FORMAT, telemetry_version=VERSION, hidden=net.hidden, extra={})
        self.card = card.model_dump(mode="json")

    def act(self, telemetry: Telemetry, probe: Probe | None = None) -> GraftAction:
        """One legal candidate, with its probability as the reason."""
        inputs = {name: torch.from_numpy(array)[None] for name, array in observation(telemetry).items()}
        with torch.no_grad():
            chances = self.net.logits(inputs)[0].softmax(dim=-1).numpy()
        index = likeliest(chances)
        return GraftAction(index, telemetry.sequence, f"p {chances[index]:.2f}, wait {chances[0]:.2f}")

    def save(self, path: Path, extra: Mapping[str, Any] | None = None) -> None:
        """Write the policy as one file, over an earlier one; `extra` are plain JSON values for its card."""
        checkpoint.write(path, self.card | {"extra": dict(extra or {})}, self.net.state_dict())

    @classmethod
    def load(cls, path: Path) -> "SimicPolicy":
        """Read a policy (see `policy_file`); a UserError where it is missing, damaged or of another telemetry."""
        file = policy_file(path)
        values, tensors = checkpoint.read(file)
        card = Card.checked(values, f"the card of policy {file}")
        for what, ours in (("format", FORMAT), ("telemetry_version", VERSION)):
            if (found := getattr(card, what)) != ours:
                what = what.replace("_", " ")
                raise UserError(f"policy {file} has {what} {found!r}, but this code reads {ours!r}: train it again.")
        usable = all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in tensors.values())
        try:
            if not usable or tensors["score.2.weight"].numel() != card.hidden:  # before the network is allocated
                raise KeyError
            net = ControllerNet(card.hidden)
            net.load_state_dict(tensors)
        except (KeyError, RuntimeError):
            what = f"policy {file} holds another network than one of width {card.hidden}, all float32 and finite"
            raise UserError(f"{what}: train it again.") from None
        return cls(net, card=card)
