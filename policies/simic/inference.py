"""Inference in double precision, so that a row's numbers do not depend on who shares its batch.

The rounding of a matrix product depends on its shape and on a row's place in it: in float32 the same row gets logits
that differ in the last bit or two from batch to batch (measured on 64 rows in 40 orders, also with batches of one
size). In float64 that difference is some 1e-16 of a value and is gone once the result is rounded to float32, but for
one value in 10^8 that lies at the edge between two. Then an action depends on its own telemetry, seed and weights,
whatever the fleet's timing: that lets an episode be repeated to the bit.
"""

import numpy as np
import torch

from esper.platform.telemetry import Telemetry
from esper.policies.simic.net import ControllerNet
from esper.policies.simic.policy import batch


def infer(net: ControllerNet, telemetries: list[Telemetry]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits (B, A), log-probabilities (B, A) and values (B,), all float32, of a network in float64."""
    with torch.no_grad():
        logits, values = net({name: array.double() for name, array in batch(telemetries).items()})
        outputs = (logits, logits.log_softmax(dim=-1), values)
    logits, log_p, values = (output.float().numpy() for output in outputs)
    return logits, log_p, values
