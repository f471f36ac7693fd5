"""What every table shares: the list of benches, one JSON format, fair timing in one process.

A bench is a module of this package with ``run(quick: bool, **options) -> dict`` and a docstring;
its result is

    {"name": ..., "machine": {...}, "rows": [{column: value}, ...], "ratios": {name: value}}

Times are CPU milliseconds of this process, medians, taken side by side: contestants run on the
same input one after the other, and the order turns round with every input, so that neither a warm
cache nor a neighbour on the machine favours one of them.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import simlab.bench
from simlab.core.config import nearest
from simlab.core.errors import ConfigError

__all__ = [
    "Contest",
    "bench_module",
    "bench_names",
    "machine",
    "outcome",
    "print_ratios",
    "print_table",
    "save",
]


def bench_names() -> dict[str, str]:
    """Return name and first docstring line of every bench; imports them."""
    names = [
        item.name
        for item in pkgutil.iter_modules(simlab.bench.__path__)
        if item.name != "runner" and not item.name.startswith("_")
    ]
    docs = {name: importlib.import_module(f"simlab.bench.{name}").__doc__ or "" for name in names}
    return {name: doc.strip().splitlines()[0] if doc else "" for name, doc in docs.items()}


def bench_module(name: str) -> ModuleType:
    """Return a bench by name.

    Raises
    ------
    ConfigError
        When there is none of that name.
    """
    names = bench_names()
    if name not in names:
        raise ConfigError(f"no bench {name!r}{nearest(name, names)}")
    return importlib.import_module(f"simlab.bench.{name}")


def machine() -> dict[str, Any]:
    """Return what a reader needs to judge times by."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
        model = next(
            (x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), model
        )
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS", "not set"),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "system": f"{platform.system()} {platform.release()}",
    }


def outcome(
    name: str, rows: Sequence[Mapping[str, Any]], ratios: Mapping[str, float | None]
) -> dict[str, Any]:
    """Return the result of a bench in the common format."""
    return {
        "name": name,
        "machine": machine(),
        "rows": [dict(row) for row in rows],
        "ratios": {key: None if value is None else float(value) for key, value in ratios.items()},
    }


def save(result: Mapping[str, Any], path: str | Path) -> None:
    """Write a result as JSON."""
    Path(path).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


class Contest:
    """Several contestants on the same inputs, in an order that turns round every time.

    Parameters
    ----------
    contestants : mapping of str to callable
        ``contestant(item)`` does the timed work once and returns anything.
    too_slow : float
        CPU seconds; a contestant whose first turn took longer is left out afterwards, so that its
        first time is its only one.
    budget : float
        CPU seconds; a contestant that has used more is left out afterwards.

    Attributes
    ----------
    seconds : dict of str to list of float
        CPU seconds of every turn, first one included.
    answers : dict of str to list
        What the contestants returned.
    """

    def __init__(
        self,
        contestants: Mapping[str, Callable[[Any], Any]],
        too_slow: float = np.inf,
        budget: float = np.inf,
    ) -> None:
        self._contestants = dict(contestants)
        self._too_slow, self._budget = too_slow, budget
        self.seconds: dict[str, list[float]] = {name: [] for name in contestants}
        self.answers: dict[str, list[Any]] = {name: [] for name in contestants}

    def run(self, items: Iterable[Any]) -> None:
        """Let every contestant have a turn on every item."""
        for turn, item in enumerate(items):
            names = [
                name
                for name, seconds in self.seconds.items()
                if not seconds or (seconds[0] <= self._too_slow and sum(seconds) <= self._budget)
            ]
            for name in names if turn % 2 == 0 else reversed(names):
                start = time.process_time()
                answer = self._contestants[name](item)
                self.seconds[name].append(time.process_time() - start)
                self.answers[name].append(answer)

    def milliseconds(self, name: str, skip: int = 1) -> float:
        """Return the median CPU milliseconds per turn after the first ``skip``."""
        seconds = self.seconds[name]
        return 1e3 * float(np.median(seconds[skip:] or seconds[-1:]))


def print_table(
    title: str, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None
) -> None:
    """Print rows as a table; numbers are shortened, missing values shown as a dash."""
    columns = list(columns or rows[0])
    table = Table(title=title)
    for column in columns:
        is_text = isinstance(rows[0].get(column), str)
        table.add_column(column, justify="left" if is_text else "right")
    for row in rows:
        table.add_row(*(_shown(row.get(column)) for column in columns))
    Console(width=None if Console().is_terminal else 140).print(table)


def print_ratios(ratios: Mapping[str, float | None], goals: Mapping[str, str]) -> None:
    """Print ratios beside their goals."""
    rows = [
        {"ratio": name, "measured": value, "goal": goals.get(name, "")}
        for name, value in ratios.items()
    ]
    print_table("ratios", rows, ["ratio", "measured", "goal"])


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        if value == 0 or 1e-2 <= abs(value) < 1e5:
            return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
        return f"{value:.1e}"
    return str(value)
