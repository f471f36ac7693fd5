"""Ctrl-C in two steps: the first asks a loop to end after the work at hand, the second insists."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["interrupts"]


def _end_now() -> None:
    raise KeyboardInterrupt


@contextmanager
def interrupts(
    first: Callable[[], None], again: Callable[[], None] = _end_now
) -> Iterator[list[int]]:
    """Call ``first`` at the first SIGINT or SIGTERM and ``again`` at every further one.

    Without ``again`` a further signal raises KeyboardInterrupt. Main thread only. Yields the list
    of signals received so far.
    """
    received: list[int] = []

    def handle(number: int, frame: Any) -> None:
        received.append(number)
        (first if len(received) == 1 else again)()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
