"""Signs of life: told apart from a process that is there and gets nowhere.

A process that works beats: it touches a file of its own, at most once a second, whenever it has got
something done (:class:`Heart`). Whoever watches it (:class:`Pulse`) knows from the beats how long
something takes here, and calls the side *hung* after a silence of

    limit = max(patience, 10 * median, 3 * longest)    of the times between beats

The limit doubles with each time the side was found hung, so that a rare long step is not killed
over and over. A solver rank has a beat only while it walks its chain of samples; before and after,
and where the program is no MPI program, CPU time is a sign of life too (ranks of MPI that wait for
each other use CPU time without end). Waiting for data is no silence: a trainer that waits beats.

Ten times the patience is had where nothing has been heard yet (a first sample may take any time, a
cold start from a slow disk as well) and where somebody has stopped a process (SIGSTOP), who may
mean to let it go on. While the watcher itself was stopped no silence is counted.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from simlab.core import environment
from simlab.core.runs import RunDirectory
from simlab.pipeline.processes import cpu_seconds, is_any_stopped

__all__ = ["LEAST_PATIENCE", "Heart", "Pulse"]

LEAST_PATIENCE = 30.0

_BEAT_SECONDS = 1.0
_LONGEST_LOOK = 1.0  # of a silence; more means that the watcher was stopped
_OVER_MEDIAN, _OVER_LONGEST = 10.0, 3.0
_FEWEST = 3  # intervals from which a limit is made
_MOST = 1000  # intervals that are kept
_LONGER = 10.0  # times the patience, where silence says less
_LEAST_SHARE = 0.01  # of a core: the CPU time that counts as work


class Heart:
    """The beat of one process; silent where no supervisor listens.

    Parameters
    ----------
    run : RunDirectory
    name : str
        The side's name, followed by what tells its processes apart: ``"solvers-3"``.
    """

    def __init__(self, run: RunDirectory, name: str) -> None:
        is_watched = bool(environment.read("SIMLAB_SIDE"))
        self._file = run.path / "logs" / f"{name}.beat" if is_watched else None
        self._last = -_BEAT_SECONDS

    def beat(self) -> None:
        """Say that something got done."""
        now = time.monotonic()
        if self._file is not None and now - self._last >= _BEAT_SECONDS:
            self._last = now
            with suppress(OSError):  # a full disk is found out by what has something to write
                self._file.touch()

    def rest(self) -> None:
        """Say that there will be no beats for a while."""
        if self._file is not None:
            self._last = -_BEAT_SECONDS
            self._file.unlink(missing_ok=True)


class Pulse:
    """The watcher's end: how long the processes of one side have been silent.

    Parameters
    ----------
    run : RunDirectory
    side : str
    pids : callable
        Returns all processes of the side.
    patience : float
        Seconds; a shorter silence never counts.
    counts_cpu : bool
        CPU time is a sign of life even while beats are expected: right for programs without MPI.
    """

    def __init__(
        self,
        run: RunDirectory,
        side: str,
        pids: Callable[[], Sequence[int]],
        patience: float,
        counts_cpu: bool,
    ) -> None:
        self._folder, self._side, self._pids = run.path / "logs", side, pids
        self._patience, self._counts_cpu = patience, counts_cpu
        self._intervals: deque[float] = deque(maxlen=_MOST)
        self._n_hung = 0
        self.begin()

    def begin(self, fresh: bool = False) -> None:
        """Count from now on; with ``fresh`` a start, before which nothing beat."""
        if fresh:
            for path in self._files():
                path.unlink(missing_ok=True)
        self._beats: dict[Path, float] = {}
        self._silences: dict[Path, float] = {}
        self._idle = self._since_cpu = 0.0
        self._cpu: float | None = None
        self._looked = time.monotonic()

    def look(self) -> str:
        """Return why the side must be taken for hung, nothing when it need not. Cheap; be quick."""
        now = time.monotonic()
        passed, self._looked = min(now - self._looked, _LONGEST_LOOK), now
        self._listen(passed)
        self._feel(passed)
        silent = max(self._silences.values(), default=self._idle)
        has_beats = bool(self._silences) and len(self._intervals) >= _FEWEST
        if self._counts_cpu or not has_beats:
            silent = min(silent, self._idle)
        longer = max(self.limit, _LONGER * self._patience * self._mildness)
        limit = self.limit if has_beats else longer
        if silent <= limit or (silent <= longer and is_any_stopped(self._pids())):
            return ""
        self._n_hung += 1
        return f"no sign of life for {silent:.0f} s"

    @property
    def limit(self) -> float:
        """Seconds of silence that are borne while beats are expected."""
        limit = self._patience
        if len(self._intervals) >= _FEWEST:
            median = statistics.median(self._intervals)
            limit = max(limit, _OVER_MEDIAN * median, _OVER_LONGEST * max(self._intervals))
        return limit * self._mildness

    @property
    def _mildness(self) -> float:
        return float(2**self._n_hung)

    def _files(self) -> list[Path]:
        return [
            *self._folder.glob(f"{self._side}.beat"),
            *self._folder.glob(f"{self._side}-*.beat"),
        ]

    def _listen(self, passed: float) -> None:
        """Note beats, and how long each file has had none."""
        beats: dict[Path, float] = {}
        for path in self._files():
            with suppress(OSError):  # removed since
                beats[path] = path.stat().st_mtime
        silences = {}
        for path, when in beats.items():
            before, silent = self._beats.get(path), self._silences.get(path, 0.0) + passed
            if before is not None and when != before:
                self._intervals.append(silent)
                self._idle = 0.0
            silences[path] = silent if before == when else 0.0
        self._beats, self._silences = beats, silences

    def _feel(self, passed: float) -> None:
        """Note, now and then, whether CPU time was used."""
        self._idle += passed
        self._since_cpu += passed
        if self._cpu is not None and self._since_cpu < self._patience / 4:
            return
        cpu = cpu_seconds(self._pids())
        if self._cpu is None or abs(cpu - self._cpu) > _LEAST_SHARE * self._since_cpu:
            self._idle = 0.0
        self._cpu, self._since_cpu = cpu, 0.0
