"""Processes known by more than their number, and processes found by what they inherited.

A number is given again once its process is gone, so a process is marked by its start time too. What
a process starts inherits its environment, so everything that belongs to it can be found by one
variable, also when it is gone itself.

Both read Linux's ``/proc``; where there is none, nothing is found: a run is then supervised as
well, but not adopted after its supervisor's death.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["ProcessMark", "cpu_seconds", "end_heirs", "heirs", "is_any_stopped"]

_PROC = Path("/proc")
# places in /proc/PID/stat, counted behind the name
_STATE, _USER_TICKS, _SYSTEM_TICKS, _START_TICKS = 0, 11, 12, 19
_POLL_SECONDS = 0.02


@dataclass(frozen=True)
class ProcessMark:
    """A process, told from every other one this machine has had.

    Attributes
    ----------
    pid : int
    ticks : int
        When it was started, in clock ticks since the machine was; -1 when that cannot be known.
    boot : str
        Which start of the machine that was.
    """

    pid: int
    ticks: int
    boot: str

    @classmethod
    def of(cls, pid: int) -> ProcessMark:
        """Return the mark of a process that is there now, living or not yet waited for."""
        facts = _stat(pid)
        return cls(pid, int(facts[_START_TICKS]) if facts else -1, _boot())

    @classmethod
    def read(cls, entry: Mapping[str, Any]) -> ProcessMark | None:
        """Return the mark written as plain values, None when the entry is something else."""
        try:
            return cls(int(entry["pid"]), int(entry["ticks"]), str(entry["boot"]))
        except (KeyError, TypeError, ValueError):
            return None

    def is_alive(self) -> bool:
        """Return whether this very process still runs."""
        facts = _stat(self.pid)
        return (
            self.ticks >= 0
            and bool(facts)
            and facts[_STATE] not in "ZX"
            and int(facts[_START_TICKS]) == self.ticks
            and _boot() == self.boot
        )


def heirs(name: str, value: str) -> list[int]:
    """Return the pids of all processes but this one that were started with ``name=value``."""
    wanted = f"{name}={value}".encode()
    found = []
    for entry in _PROC.iterdir() if _PROC.is_dir() else ():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                inherited = (entry / "environ").read_bytes().split(b"\0")
            except OSError:  # gone, or somebody else's
                continue
            if wanted in inherited:
                found.append(int(entry.name))
    return found


def end_heirs(name: str, value: str, seconds: float = 10.0) -> int:
    """Kill all :func:`heirs`, wait until they are gone and return how many there were."""
    pids = heirs(name, value)
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + seconds
    while pids and heirs(name, value) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    return len(pids)


def cpu_seconds(pids: Iterable[int]) -> float:
    """Return the CPU time that some processes have used so far, together."""
    found = [facts for facts in map(_stat, pids) if facts]
    ticks = sum(int(facts[_USER_TICKS]) + int(facts[_SYSTEM_TICKS]) for facts in found)
    return ticks / os.sysconf("SC_CLK_TCK")


def is_any_stopped(pids: Iterable[int]) -> bool:
    """Return whether a signal, or a debugger, has stopped one of some processes."""
    return any(facts[_STATE] in "Tt" for facts in map(_stat, pids) if facts)


def _stat(pid: int) -> list[str]:
    """Return the fields of ``/proc/PID/stat`` behind the name; none when there is no process."""
    try:
        text = (_PROC / str(pid) / "stat").read_text()
    except OSError:
        return []
    return text[text.rindex(")") + 1 :].split()


def _boot() -> str:
    try:
        return (_PROC / "sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
