"""Cloning (behavioural cloning): a ControllerNet learns a teacher's choices by cross-entropy, its value their returns.

The labels are the teacher's probabilities of all rows: they tell by how much it prefers one, as a choice does not.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.nn import functional

from esper.platform.seeding import derive, torch_stream
from esper.policies.simic.baseline import Baseline
from esper.policies.simic.episode import Played
from esper.policies.simic.metrics import decided_on, stacked
from esper.policies.simic.net import ILLEGAL, ControllerNet
from esper.policies.simic.policy import likeliest

TEMPERATURE = 1e-3  # nats of expected final loss by which a choice is e times as likely as another
BATCH, STEPS, RATE = 128, 600, 3e-3
VALUE = 0.5  # weight of the value's squared error


def untaught(hidden: int, seed: int) -> ControllerNet:
    """A fresh network from a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "clone"))
        return ControllerNet(hidden)


def choice(finals: np.ndarray, size: int) -> np.ndarray:
    """A teacher's logits, float32 (size,), by its rows' expected final losses, nats (A',), ∞ where it would not.

    Whether to act is decided first, by the best row: of many alike, each would take a part of WAIT's probability. Of
    equal rows the last has it all, as the planner would play it.
    """
    logits = np.full(size, ILLEGAL, np.float32)
    best = finals[1:].min(initial=np.inf)
    if not np.isfinite(best):
        logits[0] = 0.0
        return logits
    worth, last = np.unique(finals[:0:-1], return_index=True)  # of rows from the last to the second
    rows, worth = len(finals) - 1 - last[np.isfinite(worth)], worth[np.isfinite(worth)]
    scores = (best - worth) / TEMPERATURE
    logits[0] = (best - finals[0]) / TEMPERATURE
    logits[rows] = scores - np.log(np.exp(scores).sum())
    return logits


def teach(
    net: ControllerNet, episodes: Sequence[Played], baseline: Baseline, seed: int, check: Callable[[], None]
) -> None:
    """Fit the network, in place, to episodes whose `logits` are the teacher's; the baseline must have seen them."""
    seen, labels = decided_on(episodes), torch.from_numpy(stacked(episodes, "logits")).softmax(dim=-1)
    shaped = baseline.shaped(episodes, baseline.potentials(episodes))
    returns = torch.from_numpy(np.concatenate([np.cumsum(each[::-1])[::-1] for each in shaped]))
    generator = torch_stream(seed, "lessons")
    optimizer = torch.optim.AdamW(net.parameters(), lr=RATE, weight_decay=1e-3)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS, pct_start=0.1)
    for _ in range(STEPS):
        check()
        rows = torch.randint(len(labels), (BATCH,), generator=generator)
        logits, values = net({name: array[rows] for name, array in seen.items()})
        loss = functional.cross_entropy(logits, labels[rows])
        optimizer.zero_grad()
        (loss + VALUE * functional.mse_loss(values, returns[rows])).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        rate.step()


def agreement(net: ControllerNet, episodes: Sequence[Played]) -> float:
    """Fraction of the decisions, of those with a choice, at which network and teacher would play the same row."""
    with torch.no_grad():
        own = net.logits(decided_on(episodes)).softmax(dim=-1).numpy()
    taught = stacked(episodes, "logits")
    its, free = torch.from_numpy(taught).softmax(dim=-1).numpy(), (taught[:, 1:] > ILLEGAL).any(axis=1)
    same = [likeliest(a) == likeliest(b) for a, b in zip(own[free], its[free], strict=True)]
    return float(np.mean(same)) if same else 1.0
