"""Figure of the online page: the error of every feed, seed by seed, with its numbers as CSV."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from simlab.pipeline.pictures import new_axes, styled

__all__ = ["draw"]

_MEASURES = {
    ("e1", "rmse_K"): ("E1: heat, MLP", "RMSE, K"),
    ("e2", "one_step"): ("E2: Lorenz, MLP: one step", "relative L2"),
    ("e3", "one_step"): ("E3: Burgers, FNO: one step", "relative L2"),
    ("e3", "rollout"): ("E3: Burgers, FNO: 40 steps", "relative L2"),
}
_DPI = 150


@styled
def draw(folder: str | Path, rows: Sequence[Mapping[str, Any]]) -> list[Path]:
    """Draw every error that is in the rows, seeds ``confirm``; returns the PNG files."""
    kept = [row for row in rows if row["seeds"] == "confirm"]
    found = {
        (study, name): [row for row in kept if row["study"] == study and f"{name}_values" in row]
        for study, name in _MEASURES
    }
    shown = [key for key, mine in found.items() if mine]
    if not shown:
        return []
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    axes = new_axes(1, len(shown), (4.4, 3.8))[0]
    numbers = []
    for axis, (study, name) in zip(axes, shown, strict=True):
        mine = found[study, name]
        labels = [f"{row['feed']}, {row['runs']}" for row in mine]
        for place, row in enumerate(mine):
            color = "0.5" if row["feed"].startswith("offline") else "C0"
            values = row[f"{name}_values"]
            axis.plot(values, [place] * len(values), "o", color=color, alpha=0.45, markersize=4)
            axis.plot([row[name]], [place], "|", color=color, markersize=14, markeredgewidth=2)
            numbers += [(study, name, row["feed"], row["runs"], value) for value in values]
        axis.set_yticks(range(len(mine)), labels)
        axis.invert_yaxis()
        axis.set_xscale("log")
        title, unit = _MEASURES[study, name]
        axis.set(title=title, xlabel=unit)
    picture = folder / "online_feeds.png"
    with picture.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("study", "error", "feed", "runs", "value"))
        writer.writerows(numbers)
    axes[0].figure.savefig(picture, dpi=_DPI, facecolor="white", bbox_inches="tight")
    return [picture]
