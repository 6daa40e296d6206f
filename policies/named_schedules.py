"""The fixed growth plans to beat, in budget fractions, all before the rate falls on `tinystories-char`.

Depth: Du et al. 2024 (2405.15319), 2511.04981; several kinds in turn: MSG (Yao et al. 2023, 2305.02869).
"""

from esper.policies.schedule import Entry

LAYER, HEADS, WIDTH = "layer", "heads", "width"  # of `telemetry.GROWTH_KINDS`
BLUEPRINTS = {  # kind of host → kind of growth → blueprint
    "transformer": {LAYER: "block", HEADS: "attention", WIDTH: "ffn"},
    "resnet": {LAYER: "conv_block", HEADS: "channel_attention", WIDTH: "conv_width"},
}
THRICE = (0.04, 0.2, 0.29)

NAMED: dict[str, tuple[tuple[float, str], ...]] = {  # (budget fraction, kind of growth)
    "onejump": ((0.15, LAYER),),
    "gradual": ((0.08, LAYER), (0.3, LAYER)),
    "periodic": tuple(zip((0.05, 0.11, 0.17, 0.23, 0.29, 0.35), (WIDTH, HEADS, LAYER) * 2, strict=True)),
    "heads": tuple((at, HEADS) for at in THRICE),
    "width": tuple((at, WIDTH) for at in THRICE),
    "twice": ((0.12, WIDTH), (0.29, WIDTH)),
    "mixed": ((0.04, WIDTH), (0.12, WIDTH), (0.25, LAYER)),
    "layers": tuple((at, LAYER) for at in THRICE),
}


def named_schedule(name: str, host: str) -> list[Entry]:
    """One of `NAMED` for a kind of host."""
    return [Entry(at=at, blueprint=BLUEPRINTS[host][kind]) for at, kind in NAMED[name]]
