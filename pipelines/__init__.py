"""Pipelines: what a person runs."""
