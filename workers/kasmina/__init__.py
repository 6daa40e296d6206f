"""Kasmina, growth mechanics: blueprints, grafting with optimizer surgery, probation."""

from esper.workers.kasmina import blueprints as blueprints  # registers them
from esper.workers.kasmina.grafting import Kasmina, Seed

__all__ = ["Kasmina", "Seed"]
