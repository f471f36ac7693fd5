"""Further processes of one training on this machine, started and ended by the first.

    simlab train  = rank 0: manifest, metrics, validation, model
       +-- python -m simlab.pipeline.companions ...  = rank 1, 2, ...: their share of the gradients

They meet through a file and talk over gloo on the loopback interface; none of it is MPI. All go on
together or not at all (:mod:`simlab.learn.ranks`): when one dies, rank 0 says which and how, and
ends the others; when rank 0 dies, the others see their standard input end. Ctrl-C reaches them all,
but only rank 0 decides to stop, and the others hear of it before the next batch.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from simlab.core.errors import CollectiveError, SimlabError
from simlab.core.runs import RunDirectory

if TYPE_CHECKING:
    from simlab.learn.ranks import Ranks

__all__ = ["training_ranks"]

_READY, _FAILED = "ready", "failed: "
_SECONDS_TO_END = 60.0
_SECONDS_TO_DIE = 5.0


@contextmanager
def training_ranks(
    run: RunDirectory, size: int, solver_ranks: int = 0, resume: bool = False
) -> Iterator[Ranks]:
    """Start ``size - 1`` further processes on a run and be rank 0 of them all.

    Raises
    ------
    CollectiveError
        When one of them dies, with what it said or the signal that ended it.
    """
    from simlab.learn.ranks import Ranks

    if size == 1:
        yield Ranks()
        return
    with tempfile.TemporaryDirectory(prefix="simlab-ranks-") as folder:
        meeting = Path(folder) / "meeting"
        words = [str(run.path.absolute()), str(meeting), str(size), str(solver_ranks)]
        words += ["--resume"] if resume else []
        others = [_Companion(rank, words) for rank in range(1, size)]
        try:
            for other in others:
                other.wait_until_ready()
            with Ranks.join(rank=0, size=size, meeting=meeting) as ranks:
                yield ranks
            for other in others:
                other.wait(_SECONDS_TO_END)
        except CollectiveError as error:
            dead = _first_dead(others)
            raise (error if dead is None else CollectiveError(dead)) from error
        finally:
            for other in others:
                other.end()


class _Companion:
    """One of the other ranks, as rank 0 sees it."""

    def __init__(self, rank: int, words: Sequence[str]) -> None:
        self.rank = rank
        command = [sys.executable, "-m", "simlab.pipeline.companions", str(rank), *words]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def wait_until_ready(self) -> None:
        """Return once it has loaded what it needs; CollectiveError when it dies before."""
        assert self._process.stdout is not None
        if self._process.stdout.readline().strip() != _READY:
            raise CollectiveError(self.death(_SECONDS_TO_DIE) or f"rank {self.rank} did not start")

    def wait(self, seconds: float) -> None:
        """Wait for its end; CollectiveError when that is a bad one, or does not come."""
        words = self.death(seconds)
        if words:
            raise CollectiveError(words)
        if self._process.poll() is None:
            raise CollectiveError(f"training process {self.rank} does not end")

    def death(self, seconds: float) -> str:
        """Return how it ended, waiting for it a little; empty when it lives or ended well."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        code = self._process.returncode
        if not code:
            return ""
        assert self._process.stdout is not None
        said = [line[len(_FAILED) :] for line in self._process.stdout if line.startswith(_FAILED)]
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        who = f"training process {self.rank} (pid {self._process.pid})"
        return f"{who} ended with {said[-1].strip() if said else how}"

    def end(self) -> None:
        """End it if it still runs."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(_SECONDS_TO_DIE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


def _first_dead(others: Sequence[_Companion]) -> str | None:
    """Return the words of the one whose own fault it was, else of any that died."""
    deadline = time.monotonic() + _SECONDS_TO_DIE
    while time.monotonic() < deadline:
        words = [text for other in others if (text := other.death(0.0))]
        first = next((text for text in words if CollectiveError.__name__ not in text), None)
        if first is not None:
            return first
        time.sleep(0.05)
    return next((text for other in others if (text := other.death(0.0))), None)


def _end_with_parent() -> None:
    """End this process as soon as the first one has gone, however it went."""
    sys.stdin.read()
    os._exit(1)


def _main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("rank", type=int)
    parser.add_argument("run", type=Path)
    parser.add_argument("meeting", type=Path)
    parser.add_argument("size", type=int)
    parser.add_argument("solver_ranks", type=int)
    parser.add_argument("--resume", action="store_true")
    given = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        from simlab.learn.ranks import Ranks
        from simlab.pipeline.training import train_beside

        print(_READY, flush=True)
        with Ranks.join(rank=given.rank, size=given.size, meeting=given.meeting) as ranks:
            train_beside(RunDirectory.open(given.run), ranks, given.solver_ranks, given.resume)
    except SimlabError as error:
        name = type(error).__name__ if isinstance(error, CollectiveError) else ""
        print(f"{_FAILED}{name}{': ' if name else ''}{error}", flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main())
