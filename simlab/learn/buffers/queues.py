"""Buffers that hand out each item once."""

from __future__ import annotations

from collections import deque

from pydantic import Field

from simlab.learn.buffers.base import Buffer, Thresholded, buffers, take

__all__ = ["FIFO", "FIRO"]


class _FIFO(Buffer):
    def __init__(self, capacity: int, row_size: int, seed: int) -> None:
        super().__init__(capacity, 0, row_size, seed)
        self._queue: deque[int] = deque()

    def _admit(self, slot: int) -> None:
        self._queue.append(slot)

    def _draw(self, n: int) -> list[int]:
        slots = [self._queue.popleft() for _ in range(n)]
        self._free += slots
        return slots

    def _sets(self) -> dict[str, list[int]]:
        return {"queue": list(self._queue)}

    def _restore(self, sets: dict[str, list[int]]) -> None:
        self._queue = deque(sets["queue"])


class _FIRO(Buffer):
    def __init__(self, capacity: int, threshold: int, row_size: int, seed: int) -> None:
        super().__init__(capacity, threshold, row_size, seed)
        self._waiting: list[int] = []

    def _admit(self, slot: int) -> None:
        self._waiting.append(slot)

    def _draw(self, n: int) -> list[int]:
        picks = self._rng.choice(len(self._waiting), size=n, replace=False)
        slots = [self._waiting[i] for i in picks]
        take(self._waiting, picks)
        self._free += slots
        return slots

    def _sets(self) -> dict[str, list[int]]:
        return {"waiting": self._waiting}

    def _restore(self, sets: dict[str, list[int]]) -> None:
        self._waiting = sets["waiting"]


@buffers.register("fifo")
class FIFO:
    """First in, first out: each item once, in order of arrival. The baseline."""

    capacity: int = Field(2000, ge=1)

    def build(self, row_size: int, seed: int) -> Buffer:
        """Return an empty buffer."""
        return _FIFO(self.capacity, row_size, seed)


@buffers.register("firo")
class FIRO(Thresholded):
    """First in, random out: each item once, drawn once more than ``threshold`` are there."""

    def build(self, row_size: int, seed: int) -> Buffer:
        """Return an empty buffer."""
        return _FIRO(self.capacity, self.start, row_size, seed)
