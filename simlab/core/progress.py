"""Logging and progress: rank 0 talks, a terminal sees a bar, a pipe sees one line per interval.

Nothing is configured on import; the command line calls :func:`configure_logging`.
"""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from simlab.core import environment

__all__ = ["Progress", "configure_logging", "console", "duration"]

log = logging.getLogger("simlab.progress")


def console() -> Console:
    """Return a console on standard error, where progress and logs go."""
    return Console(stderr=True)


def configure_logging(rank: int = 0, directory: Path | None = None, verbose: bool = False) -> None:
    """Send simlab's log to standard error on rank 0, and warnings only on the others."""
    logger = logging.getLogger("simlab")
    logger.handlers.clear()
    logger.propagate = False
    talks = rank == 0
    logger.setLevel((logging.DEBUG if verbose else logging.INFO) if talks else logging.WARNING)
    if sys.stderr.isatty():
        handler: logging.Handler = RichHandler(console=console(), show_path=False, markup=False)
        handler.setFormatter(logging.Formatter("%(message)s", datefmt="%H:%M:%S"))
    else:
        handler = logging.StreamHandler(sys.stderr)
        prefix = "" if talks else f"rank {rank} "
        handler.setFormatter(
            logging.Formatter(f"%(asctime)s {prefix}%(levelname)s %(message)s", datefmt="%H:%M:%S")
        )
    logger.addHandler(handler)
    if directory is not None and environment.read("SIMLAB_LOG_RANKS") == "all":
        directory.mkdir(parents=True, exist_ok=True)
        per_rank = logging.FileHandler(directory / f"rank{rank:04d}.log")
        per_rank.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
        logger.addHandler(per_rank)
        logger.setLevel(logging.DEBUG if verbose else logging.INFO)


def duration(seconds: float) -> str:
    """Write seconds as a person would: ``47 s``, ``3 min 20 s``, ``2 h 05 min``."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"


class Progress:
    """Progress of a known amount of work: a bar on a terminal, otherwise a line per interval.

    Parameters
    ----------
    label : str
        What is being done.
    total : int
        Amount of work.
    unit : str
        Word for one piece of work, for the rate.
    interval : float
        Seconds between lines where there is no terminal.
    enabled : bool
        False on ranks that stay silent.

    Examples
    --------
    >>> with Progress("counting", 3, enabled=False) as progress:
    ...     for i in range(3):
    ...         progress.update(i + 1)
    """

    def __init__(
        self,
        label: str,
        total: int,
        unit: str = "sample",
        interval: float = 5.0,
        enabled: bool = True,
    ) -> None:
        self._label, self._total, self._unit, self._interval = label, total, unit, interval
        self._enabled = enabled
        self._start = self._last_line = time.perf_counter()
        self._bar: Bar | None = None

    def __enter__(self) -> Progress:
        self._start = self._last_line = time.perf_counter()
        if self._enabled and sys.stderr.isatty():
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(),
            )
            self._bar = Bar(*columns, console=console(), transient=False)
            self._task = self._bar.add_task(self._label, total=self._total, note="")
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int, note: str = "") -> None:
        """Say how much is done; cheap enough to call after every piece of work."""
        if not self._enabled:
            return
        if self._bar is not None:
            self._bar.update(self._task, completed=done, note=note)
            return
        now = time.perf_counter()
        if now - self._last_line < self._interval:
            return
        self._last_line = now
        rate = done / (now - self._start)
        left = duration((self._total - done) / rate) if rate > 0 else "?"
        share = 100.0 * done / max(self._total, 1)
        text = f"{self._label}: {done}/{self._total} ({share:.0f} %), {rate:.3g} {self._unit}/s"
        log.info("%s, %s left%s", text, left, f", {note}" if note else "")
