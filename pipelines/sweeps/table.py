"""The arms of a sweep side by side, as text."""

import statistics
from typing import Any

COLUMNS = ("arm", "seeds", "val loss ± sd", "perplexity", "parameters", "parameter-seconds", "tokens", "grafts")


def arm_table(summaries: list[dict[str, Any]]) -> str:
    """A row per arm: means over its seeds, the loss with its sample standard deviation where there are several."""
    rows: list[tuple[str, ...]] = [COLUMNS]
    for arm in dict.fromkeys(summary["arm"] for summary in summaries):
        runs = [summary for summary in summaries if summary["arm"] == arm]

        def mean(key: str, runs: list[dict[str, Any]] = runs) -> float:
            return statistics.fmean(run[key] for run in runs)

        losses = [run["val_loss"] for run in runs]
        spread = f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
        rows.append(
            (
                arm,
                str(len(runs)),
                f"{mean('val_loss'):.4f}{spread}" + (" (diverged)" if any(run["diverged"] for run in runs) else ""),
                f"{mean('perplexity'):.2f}",
                f"{mean('parameters'):,.0f}",
                f"{mean('parameter_seconds'):,.0f}",
                f"{mean('tokens'):,.0f}",
                f"{statistics.fmean(len(run['grafts']) for run in runs):.1f}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
