"""Recycled Krylov solvers on sequences: every family, every rival, what each ingredient brings.

Main tables: all solvers on the same systems in one process, taking turns in alternating order;
means and medians after the first system, rtol = 1e-8 on the true residual. A solver that cannot
take a family is named; one that has used twelve CPU seconds meets no more systems (``n_systems``).
Then what restarts, recycling, carrying and sorting contribute on the released matrices (which
reproduce the published figures) and on ours; static spaces of 20 to 60 vectors; one matrix for all
systems beside factoring once; ``auto`` against the published scheme; when carrying is switched off;
1, 2 and 4 ranks; orders of samples; ``auto`` beside all it may choose from.

Ratios, per table: ``carried_over_notcarried``, ``static_over_notcarried``, ``static_over_paper``
and ``static_carried_over_paper`` of iterations, at no more memory than the published scheme has;
``notcarried_over_best_recycled_cpu``, among the solvers of the same Krylov method;
``auto_over_best`` of CPU; ``overhead_*``, CPU per iteration over that of PETSc's GMRES(40) with the
same preconditioner, everything done once per system included, and ``iterating_overhead_*`` without
that; ``k0_difference``, the largest difference on one system between the iterations of the
recycling solver without recycling and those of GMRES(40).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console

from simlab.bench import _skr_auto, _skr_figures, _skr_ordering, _skr_scaling, _skr_studies
from simlab.bench._skr_goals import Ratio, named, print_goals, with_goals
from simlab.bench._skr_solvers import TABLE
from simlab.bench._skr_table import BUDGET, COLUMNS, RTOL, Measured, measured, ratios
from simlab.bench.runner import outcome, print_table

__all__ = ["run"]

_STATIC = ("notcarried", "carried_unsorted", "carried_greedy", "carried40", "static", "static40")
_SUMMARY = (*_STATIC, "static60", "static_carried", "static_carried20", "carried_paper")
_WIDER = (*TABLE, "carried40", "static40", "static60")
_MAIN: tuple[tuple[str, int | None, str | None], ...] = (
    ("C1", None, None),
    ("C2", None, None),
    ("C3", None, None),
    ("C4", None, None),
    ("C5", None, None),
    ("C6", None, None),
    ("C7", None, None),
    ("C8", None, None),
    ("C9", None, None),
    ("C1", None, "asm64"),
    ("C7", None, "asm64"),
    ("C1", 40_000, None),
)
_QUICK: tuple[tuple[str, int | None, str | None], ...] = tuple(
    (family, 2_500, pc) for family, n, pc in _MAIN if n is None
)
_ABLATION = (("F0", 2_500), ("F0s", 2_500), ("C1", 2_500), ("C2", 2_500), ("C3", 2_500))
_HEADLINES = ("auto_over_best", "overhead_static", "overhead_carried")


def run(
    quick: bool = False,
    *,
    family: str | None = None,
    n: int | None = None,
    pc: str | None = None,
    samples: int | None = None,
    figures: str | Path | None = None,
) -> dict[str, Any]:
    """Measure, print and return the tables.

    Parameters
    ----------
    quick : bool
        2 500 unknowns and 8 systems per table.
    family : str, optional
        Only the main table of this family, of several joined by commas, or of the family of a case
        file; and what is asked about it: F0 comes with the ablation, ``thermal`` and ``poisson``
        with factoring once.
    n : int, optional
        About how many unknowns.
    pc : str, optional
        Preconditioner of the GMRES and recycling solvers: none, jacobi, sor, ilu, icc, asm64 (64
        subdomains), bjacobi16...
    samples : int, optional
        Systems per table.
    figures : path, optional
        Folder for the figures.
    """
    bench = _Bench(quick, samples or (8 if quick else 24))
    if family is None and n is None and pc is None:
        bench.everything()
    else:
        for name in (family or "C1").split(","):
            bench.one(name, n, pc)
    if figures is not None:
        for path in _skr_figures.draw(figures, n or (2_500 if quick else 10_000), bench.n_samples):
            Console().print(f"written: {path}")
    return bench.finished()


class _Bench:
    """Tables being made: printed as they come, kept for the result."""

    def __init__(self, quick: bool, n_samples: int) -> None:
        self.quick, self.n_samples = quick, n_samples
        self._n = 2_500 if quick else 10_000
        self._budget = 1.0 if quick else BUDGET
        self._rows: list[dict[str, Any]] = []
        self._ratios: list[Ratio] = []

    def everything(self) -> None:
        """Measure all there is."""
        for family, n, pc in _QUICK if self.quick else _MAIN:
            self.main(family, n, pc)
        self._static()
        for family, n in _ABLATION if self.quick else (*_ABLATION, ("F0", 10_000)):
            self.ablation(family, n)
        for family in _skr_studies.CONSTANT:
            self.constant(family, None)
        self._goal()
        if not self.quick:
            self._gate()
        self._scaling()
        ordering = _skr_ordering.rows(self.quick)
        self._table("ordering", "Orders of samples", ordering, _skr_ordering.COLUMNS)
        self._auto()

    def one(self, family: str, n: int | None, pc: str | None) -> None:
        """Measure one family."""
        if family in _skr_studies.CONSTANT:
            self.constant(family, n)
            return
        self.main(family, n or (2_500 if self.quick else None), pc)
        if family == "F0":
            self.ablation("F0", n or 2_500)

    def main(self, family: str, n: int | None, pc: str | None) -> None:
        """Measure one family with all solvers."""
        is_static = family in ("C1", "C2", "C3", "C4") and pc is None
        names = _WIDER if is_static else TABLE
        found = measured(family, n, pc, n_samples=self.n_samples, names=names, budget=self._budget)
        rows = with_goals(found.rows)
        self._table("main", found.title, rows, (*COLUMNS, "goal"), found.left_out)
        self._compare(found, ratios(found))

    def ablation(self, family: str, n: int) -> None:
        """Measure what restarts, recycling, carrying and sorting bring."""
        found, shares = _skr_studies.ablation(
            family, n, self.n_samples if self.quick else 40, self._budget
        )
        title = f"What each ingredient brings: {found.title}"
        columns = (*COLUMNS[:-2], "goal")
        self._table("ablation", title, with_goals(found.rows), columns, found.left_out)
        self._compare(found, shares)

    def constant(self, family: str, n: int | None) -> None:
        """Measure a family of one matrix, at the published sizes unless another is asked for."""
        sizes = (n,) if n else (2_500,) if self.quick else _skr_studies.CONSTANT[family]
        for size in sizes:
            found, shares = _skr_studies.constant(family, size, 4 if self.quick else 6)
            columns = (*COLUMNS[:-2], "first_ms", "seed_ms")
            title = f"One matrix for all: {found.title}"
            self._table("constant", title, found.rows, columns, found.left_out)
            self._compare(found, shares)

    def finished(self) -> dict[str, Any]:
        """Print how all goals were met; return the result."""
        values = {ratio.key: ratio.value for ratio in self._ratios}
        for name in _HEADLINES:
            found = [r.value for r in self._ratios if r.name == name and r.value is not None]
            values[name] = max(found, default=None)
        print_goals("all ratios with a goal", [ratio for ratio in self._ratios if ratio.has_goal])
        return outcome("skr", self._rows, values)

    def _static(self) -> None:
        """Print iterations by what is recycled, from the main tables."""
        summary: dict[tuple[str, int], dict[str, Any]] = {}
        for row in self._rows:
            if row["table"] == "main" and row["pc"] == "ilu" and row["solver"] in _SUMMARY:
                key = (row["family"], row["n"])
                head = {"family": row["family"], "n": row["n"]}
                summary.setdefault(key, head)[row["solver"]] = row["iterations"]
        rows = [row for row in summary.values() if "static60" in row]
        columns = ("family", "n", *_SUMMARY)
        if rows:
            print_table(
                "Iterations after the first system, ILU, by what is recycled", rows, columns
            )

    def _goal(self) -> None:
        found, values = _skr_studies.goal(self._n, self.n_samples if self.quick else 100)
        self._table("goal", f"auto and the published scheme: {found.title}", found.rows, COLUMNS)
        self._compare(found, values)

    def _gate(self) -> None:
        rows = [_skr_studies.gate(name, n, 40) for name, n in (("F0", 10_000), ("C5", 24**3))]
        self._table("gate", "When carrying is switched off", rows)
        for row in rows:
            ended = row["carrying_ended_after"]
            self._ratios += named({"gate_ended_after": ended}, {"family": row["family"]})

    def _auto(self) -> None:
        rows = _skr_auto.rows(self.quick)
        self._table("auto", "auto and all it may choose from", rows, _skr_auto.COLUMNS)
        for row in rows:
            if row["auto_over_best"] is not None:
                head = {"family": row["family"], "n": row["n"]}
                self._ratios += named({"auto_over_best": row["auto_over_best"]}, head)

    def _scaling(self) -> None:
        ranks = (1, 2) if self.quick else (1, 2, 4)
        n = 2_500 if self.quick else 10_000
        try:
            rows = _skr_scaling.together(n, 4 if self.quick else 6, ranks)
            self._table("ranks", "Several ranks per system", rows, _skr_scaling.COLUMNS)
            head = {"family": "C1", "n": n}
            worst = {
                "iterations_off": max(row["iterations_off"] for row in rows),
                "solution_off_over_rtol": max(row["solution_off"] for row in rows) / RTOL,
            }
            chains = _skr_scaling.chains(n, 40 if self.quick else 80, 1 if self.quick else 5)
            self._table("chains", "One chain per rank", chains, _skr_scaling.COLUMNS)
            for clock in ("wall", "cpu"):
                ratio = chains[1][f"{clock}_s"] / chains[0][f"{clock}_s"]
                worst[f"two_chains_over_one_{clock}"] = ratio
            self._ratios += named(worst, head)
        except _skr_scaling.NotMeasured as error:
            Console().print(f"several ranks not measured: {error}")

    def _compare(self, found: Measured, values: Any) -> None:
        row = found.rows[0]
        measured_now = named(values, {key: row[key] for key in ("family", "n", "pc")})
        print_goals(f"ratios: {found.title}", [r for r in measured_now if r.value is not None])
        self._ratios += measured_now

    def _table(
        self,
        table: str,
        title: str,
        rows: list[dict[str, Any]],
        columns: Iterable[str] | None = None,
        left_out: Any = None,
    ) -> None:
        """Print a table and keep its rows."""
        wanted = list(columns or rows[0])
        empty = {"failed": (None, 0)}
        shown = [c for c in wanted if any(row.get(c) not in empty.get(c, (None,)) for row in rows)]
        print_table(title, rows, shown)
        for name, why in (left_out or {}).items():
            Console().print(f"left out: {name}: {why}")
        self._rows += [{"table": table} | row for row in rows]
