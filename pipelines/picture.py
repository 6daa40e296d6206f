"""The picture of a sweep: validation loss against parameter-seconds, a line per run, grafts marked."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no screen needed

import matplotlib.pyplot as plt

STYLES = ("-", "--", ":", "-.")  # arms that never grew lie on one another: all of them should show
SHOWN_FROM = 0.04  # budget fraction: before it every run falls from chance level, and would flatten the rest


def draw_losses(summaries: list[dict[str, Any]], path: Path) -> None:
    """Write the picture as PNG."""
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    arms = list(dict.fromkeys(summary["arm"] for summary in summaries))
    for summary in summaries:
        color = f"C{arms.index(summary['arm'])}"
        curve = [point for point in summary["val_curve"] if point["budget_fraction"] >= SHOWN_FROM]
        first = summary is next(other for other in summaries if other["arm"] == summary["arm"])
        axes.plot(
            [point["parameter_seconds"] for point in curve],
            [point["val_loss"] for point in curve],
            color=color,
            linestyle=STYLES[arms.index(summary["arm"]) % len(STYLES)],
            linewidth=1.6,
            label=summary["arm"] if first else None,
        )
        whole = summary["val_curve"]
        grafts = [whole[graft["decision"]]["parameter_seconds"] for graft in summary["grafts"]]
        losses = [graft["val_loss_after"] for graft in summary["grafts"]]
        shown = [(x, y) for x, y in zip(grafts, losses, strict=True) if curve and x >= curve[0]["parameter_seconds"]]
        if shown:
            axes.scatter(*zip(*shown, strict=True), color=color, marker="^", s=36, zorder=3)
    axes.set_xlabel("parameter-seconds")
    axes.set_ylabel("validation loss (nats per token)")
    axes.set_title(f"{summaries[0]['preset']}: loss against cost (▲ graft)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
