"""Esper: grow GPTs while they train, on Ray.

The folders of the repository appear here as subpackages through relative links:
`esper.platform`, `esper.workers`, `esper.policies`, `esper.pipelines`.
"""

__version__ = "0.1.0"
