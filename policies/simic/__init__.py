"""Simic, the learned controller: PPO on RLlib's new API stack, over a fleet of workers that never wait for it."""
