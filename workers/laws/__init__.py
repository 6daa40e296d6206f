"""Scaling laws of the loss: computed runs, their fit to real runs, and the best reachable."""
