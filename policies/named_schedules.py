"""Named schedules: the fixed growth plans that any controller has to beat, in budget fractions.

Sources: Du et al. 2024 (2405.15319), 2511.04981; MSG (Yao et al. 2023, 2305.02869). Chosen on `tinystories-char`
before any sweep's test seeds.
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
