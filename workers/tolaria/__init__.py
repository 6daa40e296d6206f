"""Tolaria, the training engine: host models, data, trainer."""
