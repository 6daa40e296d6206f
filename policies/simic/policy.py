"""SimicPolicy: a trained ControllerNet as a GrowthPolicy, and its files. Pure torch; loads in a process without Ray.

A saved policy is a folder of two files: `policy.json` (what it is) and the safetensors it names by their hash. The
weights are written first and the JSON, whole or absent, last: a reader finds the old policy or the new one.
"""

import hashlib
import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError

from esper.platform.contracts import GraftAction, Probe
from esper.platform.errors import UserError
from esper.platform.storage import write_json
from esper.platform.telemetry import VERSION, Telemetry
from esper.policies.simic.net import ControllerNet

CARD = "policy.json"
CHECKPOINTS = "checkpoints"  # inside a `ppo` run's folder, each named by its iteration
FOLDER = "policy"  # inside a run's or a checkpoint's folder
FORMAT = "simic-2"  # of the files and the network


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints that a `ppo` run left in its folder, oldest first."""
    return sorted(path for path in (run / CHECKPOINTS).glob("*") if path.name.isdigit())


def policy_folder(path: Path) -> Path:
    """The policy's own folder, whether that, its checkpoint's or a `ppo` run's is named; a run's newest is taken.

    Raises:
        UserError: there is none.
    """
    newest = [checkpoint / FOLDER for checkpoint in checkpoints(path)[::-1]]
    folder = next((f for f in (path, path / FOLDER, *newest) if (f / CARD).is_file()), None)
    if folder is None:
        what = "holds no trained policy" if path.exists() else "does not exist"
        raise UserError(f"policy {path} {what}: name a folder that `esper ppo` left.")
    return folder


def batch(telemetries: list[Telemetry]) -> dict[str, torch.Tensor]:
    """Arrays of several telemetries as the network's inputs, float32 with the batch first."""
    rows = [telemetry.arrays() for telemetry in telemetries]
    return {name: torch.from_numpy(np.stack([row[name] for row in rows]).astype(np.float32)) for name in rows[0]}


def draw(logits: np.ndarray, mask: np.ndarray, uniform: float) -> int:
    """The legal row that a number in [0, 1) picks, by inverse distribution, from logits (A,)."""
    legal = np.flatnonzero(mask)
    weights = np.exp(logits[legal].astype(np.float64) - logits[legal].max())
    bounds = np.cumsum(weights)
    return int(legal[min(np.searchsorted(bounds, uniform * bounds[-1], side="right"), len(legal) - 1)])


def likeliest(chances: np.ndarray) -> int:
    """Acting or waiting, whichever is likelier; if acting, the likeliest row (probabilities (A,), WAIT first).

    Not the likeliest of all rows: where 0.6 of the probability is spread over a dozen grafts that differ little, WAIT
    with 0.4 would win, and a policy that mostly acts would never act.
    """
    return 0 if chances[0] >= 0.5 else 1 + int(chances[1:].argmax())


class SimicPolicy:
    """Chooses the likeliest legal candidate (`likeliest`), or draws one.

    Args:
        net: the network.
        sample: draw from the policy's probabilities instead.
        rng: where the draws come from; needed with `sample`.
        card: what `policy.json` said, if it was loaded.
    """

    def __init__(
        self,
        net: ControllerNet,
        *,
        sample: bool = False,
        rng: np.random.Generator | None = None,
        card: Mapping[str, Any] | None = None,
    ) -> None:
        if sample and rng is None:
            raise ValueError("SimicPolicy(sample=True) needs rng, a numpy Generator.")
        self.net = net.eval()
        self.card = dict(card or {})
        self._rng = rng if sample else None

    def act(self, telemetry: Telemetry, probe: Probe | None = None) -> GraftAction:
        """One legal candidate, with its probability as the reason."""
        with torch.no_grad():
            logits = self.net.logits(batch([telemetry]))[0]
        chances = logits.softmax(dim=-1).numpy()
        rng = self._rng
        index = draw(logits.numpy(), telemetry.mask, rng.random()) if rng is not None else likeliest(chances)
        return GraftAction(index, telemetry.sequence, f"p {chances[index]:.2f}, wait {chances[0]:.2f}")

    def save(self, folder: Path, extra: Mapping[str, Any] | None = None) -> None:
        """Write the policy to `folder`, over an earlier one if there is one.

        Args:
            folder: made if need be.
            extra: plain JSON values to keep beside it, such as the preset's name.
        """
        folder.mkdir(parents=True, exist_ok=True)
        weights = safetensors.torch.save(self.net.state_dict())
        digest = hashlib.sha256(weights).hexdigest()
        path = folder / f"weights-{digest[:12]}.safetensors"
        _write_bytes(path, weights)
        card = {
            "format": FORMAT,
            "telemetry_version": VERSION,
            "hidden": self.net.hidden,
            "weights": path.name,
            "sha256": digest,
            "extra": dict(extra or {}),
        }
        write_json(folder / CARD, card)
        for old in folder.glob("weights-*.safetensors"):
            if old != path:
                old.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path, *, sample: bool = False, rng: np.random.Generator | None = None) -> "SimicPolicy":
        """Read a policy: its own folder, a checkpoint's, or a `ppo` run's, whose newest checkpoint is taken.

        Raises:
            UserError: there is none, it is damaged, or it was made for another telemetry or network.
        """
        folder = policy_folder(path)
        card = _read_card(folder)
        state = _read_weights(folder, card)
        net = ControllerNet(card["hidden"])
        own = net.state_dict()
        if {name: t.shape for name, t in state.items()} != {name: t.shape for name, t in own.items()}:
            raise UserError(f"policy {folder} holds another network than this version's: train it again.")
        net.load_state_dict(state)
        return cls(net, sample=sample, rng=rng, card=card)


def _read_card(folder: Path) -> dict[str, Any]:
    try:
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
        made_for, kind = card["telemetry_version"], card["format"]
        whole = isinstance(card["hidden"], int) and card["hidden"] > 0 and isinstance(card["sha256"], str)
        whole = whole and isinstance(card["extra"], dict)
        whole = whole and Path(card["weights"]).name == card["weights"]  # never a path out of the folder
    except (OSError, ValueError, KeyError, TypeError):
        whole, made_for, kind = False, None, None
    if not whole:
        raise UserError(f"policy {folder} is damaged ({CARD} cannot be read): train it again, or name another.")
    if kind != FORMAT:
        raise UserError(f"policy {folder} has format {kind!r}, but this version reads {FORMAT!r}: train it again.")
    if made_for != VERSION:
        raise UserError(
            f"policy {folder} was trained on telemetry version {made_for}, but this code has {VERSION}: train it again."
        )
    return card


def _read_weights(folder: Path, card: dict[str, Any]) -> dict[str, torch.Tensor]:
    try:
        data = (folder / card["weights"]).read_bytes()
        if hashlib.sha256(data).hexdigest() != card["sha256"]:
            raise ValueError("its hash differs")
        return safetensors.torch.load(data)
    except (OSError, ValueError, SafetensorError):
        raise UserError(f"policy {folder} is damaged ({card['weights']}): train it again, or name another.") from None


def _write_bytes(path: Path, data: bytes) -> None:
    """Whole or absent, as in `platform.storage`."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    partial.write_bytes(data)
    partial.replace(path)
