"""What the recycling bench is expected to show: bounds for iterations and ratios, by table.

A measured value outside its bounds is printed as missed; nothing is left out for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

from simlab.bench.runner import print_table

__all__ = ["Goal", "Ratio", "named", "print_goals", "with_goals"]


@dataclass(frozen=True)
class Goal:
    """An interval, and the tables it belongs to; ``None`` stands for all."""

    name: str
    low: float = 0.0
    high: float = inf
    families: tuple[str, ...] | None = None
    n: int | None = None
    pc: str | None = None

    def applies(self, name: str, head: Mapping[str, Any]) -> bool:
        """Whether this is the goal of a number of the table with that family, n and pc."""
        return (
            name == self.name
            and (self.families is None or head.get("family") in self.families)
            and self.n in (None, head.get("n"))
            and self.pc in (None, head.get("pc"))
        )

    def __str__(self) -> str:
        if self.high == inf:
            return f">= {self.low:g}"
        return f"{self.low:g} to {self.high:g}" if self.low else f"<= {self.high:g}"


@dataclass(frozen=True)
class Ratio:
    """One measured ratio: its name, the table it is from, the value."""

    name: str
    head: Mapping[str, Any]
    value: float | None

    @property
    def key(self) -> str:
        """Name with family, size and preconditioner: unique over the bench."""
        parts = [str(self.head[part]) for part in ("family", "n", "pc") if part in self.head]
        return "_".join([self.name, *parts])

    @property
    def has_goal(self) -> bool:
        """Whether something is expected of it."""
        return _goal(RATIOS, self.name, self.head)[1] is not None


_C = tuple(f"C{i}" for i in range(1, 9))
_TEN = 10_000

ITERATIONS = (  # by solver
    Goal("gmres40", 3_000, 6_000, ("F0",), 2_500, "none"),
    Goal("notcarried", 240, 310, ("F0",), 2_500, "none"),
    Goal("carried_unsorted", 220, 290, ("F0",), 2_500, "none"),
    Goal("carried_greedy", 220, 290, ("F0",), 2_500, "none"),
    Goal("gmres40", 9_000, 10_000, ("F0",), 10_000, "none"),  # nearly all at the limit
    Goal("carried_unsorted", 650, 900, ("F0",), 10_000, "none"),
    Goal("carried_greedy", 650, 900, ("F0",), 10_000, "none"),
    Goal("notcarried", 98, 110, ("C1",), _TEN, "ilu"),
    Goal("carried_unsorted", 0, 48, ("C1",), _TEN, "ilu"),
    Goal("carried_greedy", 0, 48, ("C1",), _TEN, "ilu"),
    Goal("static", 0, 46, ("C1",), _TEN, "ilu"),
    Goal("static40", 0, 34, ("C1",), _TEN, "ilu"),
    Goal("carried_unsorted", 0, 77, ("C2",), _TEN, "ilu"),
    Goal("carried_greedy", 0, 77, ("C2",), _TEN, "ilu"),
    Goal("static", 0, 60, ("C2",), _TEN, "ilu"),
)
RATIOS = (
    Goal("greedy_over_unsorted", 0, 0.97, ("C3",), _TEN, "ilu"),
    Goal("greedy_over_unsorted", 0, 0.90, ("C3",), 2_500, "none"),
    Goal("notcarried_over_best_recycled_cpu", 1.3, inf, ("C1",), 10_000, "asm64"),
    Goal("notcarried_over_best_recycled_cpu", 1.5, inf, ("C7",), _TEN, "ilu"),
    Goal("overhead_static", 0, 1.5, ("C1",), _TEN, "ilu"),
    Goal("iterating_overhead_static", 0, 1.5, ("C1",), _TEN, "ilu"),
    Goal("overhead_static", 0, 1.25, ("C1",), 40_000, "ilu"),
    Goal("iterating_overhead_static", 0, 1.25, ("C1",), 40_000, "ilu"),
    Goal("overhead_carried", 0, 1.5, ("C1",), _TEN, "ilu"),
    Goal("iterating_overhead_carried", 0, 1.5, ("C1",), _TEN, "ilu"),
    Goal("overhead_carried", 0, 1.25, ("C1",), 40_000, "ilu"),
    Goal("iterating_overhead_carried", 0, 1.25, ("C1",), 40_000, "ilu"),
    Goal("overhead_seldom", 0, 1.5, ("C1",), _TEN, "ilu"),
    Goal("overhead_seldom", 0, 1.25, ("C1",), 40_000, "ilu"),
    Goal("k0_difference", 0, 1),
    Goal("static_carried_over_paper", 0, 0.8, ("C1", "C2", "C4"), _TEN, "ilu"),
    Goal("static_over_paper", 0, 0.8, ("C1", "C2", "C4"), _TEN, "ilu"),
    Goal("auto_over_best", 0, 1.15, _C),
    Goal("paper_none_over_auto_cpu", 10),
    Goal("paper_none_over_auto_with_pilot", 10),
    Goal("iterations_off", 0, 0.02),
    Goal("solution_off_over_rtol", 0, 10),
    Goal("two_chains_over_one_wall", 0, 0.6),
    Goal("two_chains_over_one_cpu", 0, 0.6),
    Goal("gate_ended_after", 1, 40),
)


def with_goals(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows with the interval expected for their iterations, where there is one."""
    return [row | {"goal": _goal(ITERATIONS, row["solver"], row)[0]} for row in rows]


def named(values: Mapping[str, float | None], head: Mapping[str, Any]) -> list[Ratio]:
    """Return the ratios of one table."""
    return [Ratio(name, head, value) for name, value in values.items()]


def print_goals(title: str, ratios: Sequence[Ratio]) -> None:
    """Print ratios beside their goals."""
    rows = []
    for ratio in ratios:
        text, bounds = _goal(RATIOS, ratio.name, ratio.head)
        met = None
        if bounds is not None and ratio.value is not None:
            met = "yes" if bounds.low <= ratio.value <= bounds.high else "missed"
        rows.append({"ratio": ratio.key, "measured": ratio.value, "goal": text or "", "met": met})
    if rows:
        print_table(title, rows)


def _goal(
    goals: Sequence[Goal], name: str, head: Mapping[str, Any]
) -> tuple[str | None, Goal | None]:
    found = next((goal for goal in goals if goal.applies(name, head)), None)
    return (str(found), found) if found else (None, None)
