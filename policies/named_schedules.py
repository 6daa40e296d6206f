"""The fixed growth plans to beat, in budget fractions, all before the rate falls on `tinystories-char`.

Depth: Du et al. 2024 (2405.15319), 2511.04981; several kinds in turn: MSG (Yao et al. 2023, 2305.02869).
"""

from esper.policies.schedule import Entry

LAYER, HEAD, WIDTH = "block", "attention", "ffn"  # blueprints
THRICE = (0.04, 0.2, 0.29)


def _grafts(blueprint: str, *fractions: float) -> tuple[Entry, ...]:
    return tuple(Entry(at=at, blueprint=blueprint) for at in fractions)


NAMED: dict[str, tuple[Entry, ...]] = {
    "onejump": _grafts(LAYER, 0.15),
    "gradual": _grafts(LAYER, 0.08, 0.3),
    "periodic": tuple(
        Entry(at=at, blueprint=blueprint)
        for at, blueprint in zip((0.05, 0.11, 0.17, 0.23, 0.29, 0.35), (WIDTH, HEAD, LAYER) * 2, strict=True)
    ),
    "heads": _grafts(HEAD, *THRICE),
    "width": _grafts(WIDTH, *THRICE),
    "twice": _grafts(WIDTH, 0.12, 0.29),
    "mixed": (*_grafts(WIDTH, 0.04, 0.12), *_grafts(LAYER, 0.25)),
    "layers": _grafts(LAYER, *THRICE),
}
