"""AdamW (1711.05101) without torch's wrappers for `torch._dynamo`, whose import costs a process a second."""

from inspect import unwrap

import torch
from torch.optim import AdamW, Optimizer

_step = unwrap(AdamW.step)


class EagerAdamW(AdamW):
    """torch's, with the same numbers; not to be compiled."""

    add_param_group = unwrap(Optimizer.add_param_group)
    zero_grad = unwrap(Optimizer.zero_grad)
    state_dict, load_state_dict = unwrap(Optimizer.state_dict), unwrap(Optimizer.load_state_dict)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        _step(self)
