"""Pipelines: what a person runs."""

from esper.platform import cluster

cluster.prepare()  # before anything imports Ray
