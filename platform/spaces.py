"""Telemetry as Gymnasium spaces."""

import gymnasium as gym
import numpy as np

from esper.platform.telemetry import Telemetry, TelemetrySpace


def observation_space(space: TelemetrySpace) -> gym.spaces.Dict:
    """The telemetry's arrays as float32 boxes, all finite; the mask too, as 0 and 1."""
    most = np.finfo(np.float32).max
    return gym.spaces.Dict(
        {
            name: gym.spaces.Box(0.0 if name == "mask" else -most, 1.0 if name == "mask" else most, shape)
            for name, shape in space.shapes.items()
        }
    )


def action_space(space: TelemetrySpace) -> gym.spaces.Discrete:
    """A row of the candidates."""
    return gym.spaces.Discrete(space.candidates)


def observation(telemetry: Telemetry) -> dict[str, np.ndarray]:
    """Telemetry as an environment's observation, an element of `observation_space`; its action mask is its `mask`."""
    return {name: np.asarray(array, np.float32) for name, array in telemetry.arrays().items()}
