"""The fixed growth plans to beat, in budget fractions; chosen on `tinystories-char`, before any sweep's test seeds.

Depth: Du et al. 2024 (2405.15319), 2511.04981; several kinds in turn: MSG (Yao et al. 2023, 2305.02869).
"""

from esper.policies.schedule import Entry

LAYER, HEAD, WIDTH = "block", "attention", "ffn"  # blueprints
OFTEN = (0.1, 0.25, 0.4)

NAMED: dict[str, tuple[Entry, ...]] = {
    "onejump": (Entry(at=0.15, blueprint=LAYER),),
    "gradual": (Entry(at=0.08, blueprint=LAYER), Entry(at=0.4, blueprint=LAYER)),
    "periodic": tuple(
        Entry(at=at, blueprint=blueprint)
        for at, blueprint in zip((0.1, 0.2, 0.3, 0.4, 0.5, 0.6), (WIDTH, HEAD, LAYER) * 2, strict=True)
    ),
    "heads": tuple(Entry(at=at, blueprint=HEAD) for at in OFTEN),
    "width": tuple(Entry(at=at, blueprint=WIDTH) for at in OFTEN),
    "layers": tuple(Entry(at=at, blueprint=LAYER) for at in OFTEN),
}
