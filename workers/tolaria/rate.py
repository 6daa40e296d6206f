"""The learning rate: warm-up, stable, decay, over the fraction of the budget spent, so every arm ends annealed.

WSD: Hu et al. 2024, 2404.06395. The stable rate follows the current size, along the curve tuned on static sizes.
"""

import numpy as np

from esper.platform.spec import OptimizerSpec


def stable_rate(spec: OptimizerSpec, parameters_non_embedding: float) -> float:
    """`rates` interpolated log-log, else `learning_rate · (N / rate_parameters)^−rate_exponent`, at most `rate_max`."""
    if spec.rates:
        # exp(log(rate)) may differ in a bit: a run that has not grown has exactly its static size's rate
        exact = dict(spec.rates).get(parameters_non_embedding)  # pyright: ignore[reportArgumentType]
        sizes, rates = np.log(np.array(spec.rates).T)
        return exact or float(np.exp(np.interp(np.log(parameters_non_embedding), sizes, rates)))
    relative = parameters_non_embedding / spec.rate_parameters
    return min(spec.rate_max, spec.learning_rate * relative**-spec.rate_exponent)


def rate(
    spec: OptimizerSpec, fraction: float, parameters_non_embedding: float, decay: tuple[float, float] | None = None
) -> float:
    """The host's learning rate at a budget `fraction` in [0, 1], positive at 0; falls between the fractions `decay`."""
    begin, end = decay or (spec.decay_from, 1.0)
    stable = stable_rate(spec, parameters_non_embedding)
    if spec.rate_path:
        fractions, rates = zip(*spec.rate_path, strict=True)
        stable = float(np.interp(fraction, fractions, rates))
    if fraction < spec.warmup:
        return stable * (0.01 + 0.99 * fraction / spec.warmup)
    if fraction <= begin:
        return stable
    left = max(0.0, end - fraction) / (end - begin)
    return stable * (spec.final_rate + (1 - spec.final_rate) * left)
