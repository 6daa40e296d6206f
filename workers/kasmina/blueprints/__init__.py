"""The blueprints; importing this package registers them."""

from esper.workers.kasmina.blueprints import parts as parts
from esper.workers.kasmina.blueprints import units as units
