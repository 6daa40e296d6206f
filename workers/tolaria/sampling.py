"""Text from a host: token by token, from its softmax at a temperature, among the top_k likeliest (1805.04833)."""

import re
from typing import Any

import torch

from esper.platform.errors import UserError
from esper.workers.tolaria.data import Tokenizer


@torch.no_grad()
def sample(
    host: Any,  # a GPT
    tokenizer: Tokenizer,
    prompt: str = "",
    *,
    tokens: int = 200,
    temperature: float = 0.8,
    top_k: int = 40,
    seed: int = 0,
) -> str:
    """The prompt and at most `tokens` more, to the document's end; UserError for a character that the text had not."""
    if lacks := sorted({text for text in prompt if tokenizer.encode(text) == [tokenizer.unseen_id]}):
        raise UserError(f"the prompt has {' '.join(map(repr, lacks))}, and the run's text had not: leave it out.")
    training, ids = host.training, [tokenizer.end_id, *tokenizer.encode(prompt)]  # an end stands before each document
    generator = torch.Generator().manual_seed(seed)
    host.eval()
    for _ in range(tokens):
        context = torch.tensor([ids[-host.spec.block_size :]], device=host.wte.weight.device)
        logits = host(context)[0, -1].double().cpu()  # (V,)
        if tokenizer.unseen_id is not None:
            logits[tokenizer.unseen_id] = -torch.inf
        likeliest = logits.topk(1 if temperature == 0 else min(top_k, len(logits)))
        drawn = torch.multinomial((likeliest.values / (temperature or 1)).softmax(0), 1, generator=generator)
        chosen = int(likeliest.indices[drawn])
        if chosen == tokenizer.end_id:
            break
        ids.append(chosen)
    host.train(training)
    return tokenizer.decode(ids[1:])


def opening(text: str) -> str:
    """A line of a text's first two sentences, of 200 characters at most."""
    line = "".join(filter(str.isprintable, " ".join(text.split())))
    return " ".join(re.split(r"(?<=[.!?])\s+", line)[:2])[:200]
