"""Buffers that repeat what was seen and lose nothing that was not."""

from __future__ import annotations

from collections.abc import Sized

from simlab.learn.buffers.base import Buffer, Thresholded, buffers, take

__all__ = ["BatchReservoir", "RepeatingBuffer", "Reservoir", "ReservoirBuffer"]


class RepeatingBuffer(Buffer):
    """Two sets, unseen and seen: what was drawn stays, and is all that may be dropped."""

    _unseen: Sized
    _seen: Sized

    @property
    def n_unseen(self) -> int:
        """Items that were never handed out."""
        return len(self._unseen)

    @property
    def n_seen(self) -> int:
        """Items that were handed out and are still held."""
        return len(self._seen)

    def retains(self, n: int) -> bool:
        """Whether ``n`` items fit: what fits is never dropped."""
        return n <= self.capacity


class ReservoirBuffer(RepeatingBuffer):
    """Both sets are lists; see :mod:`simlab.learn.buffers`."""

    def __init__(self, capacity: int, threshold: int, row_size: int, seed: int) -> None:
        super().__init__(capacity, threshold, row_size, seed)
        self._unseen: list[int] = []
        self._seen: list[int] = []

    def _slot(self) -> int | None:
        if self._free or not self._seen:
            return super()._slot()
        victim = int(self._rng.integers(len(self._seen)))
        slot = self._seen[victim]
        take(self._seen, [victim])
        return slot

    def _admit(self, slot: int) -> None:
        self._unseen.append(slot)

    def _draw(self, n: int) -> list[int]:
        n_unseen = len(self._unseen)
        picks = self._rng.choice(n_unseen + len(self._seen), size=n, replace=False).tolist()
        slots = [self._unseen[i] if i < n_unseen else self._seen[i - n_unseen] for i in picks]
        fresh = [i for i in picks if i < n_unseen]
        self._seen += [self._unseen[i] for i in fresh]
        take(self._unseen, fresh)
        return slots

    def _sets(self) -> dict[str, list[int]]:
        return {"seen": self._seen, "unseen": self._unseen}

    def _restore(self, sets: dict[str, list[int]]) -> None:
        self._seen, self._unseen = sets["seen"], sets["unseen"]


class _Batches(ReservoirBuffer):
    def _is_ready(self, n: int) -> bool:
        return super()._is_ready(n) and (len(self) >= min(n, self.capacity) or self._is_finished)


@buffers.register("reservoir")
class Reservoir(Thresholded):
    """Unseen items are never dropped, seen ones are repeated; the default."""

    def build(self, row_size: int, seed: int) -> Buffer:
        """Return an empty buffer."""
        return ReservoirBuffer(self.capacity, self.start, row_size, seed)


@buffers.register("batch_reservoir")
class BatchReservoir(Thresholded):
    """A reservoir that waits until a whole batch of distinct items is there.

    Only after the end of the stream, when fewer are held, is a batch smaller.
    """

    def build(self, row_size: int, seed: int) -> Buffer:
        """Return an empty buffer."""
        return _Batches(self.capacity, self.start, row_size, seed)
