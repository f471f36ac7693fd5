"""Buffers between a stream of samples and a training loop that draws batches at its own pace.

    FIFO           oldest first, each item once
    FIRO(t)        uniform among what is there once more than t are, each item once
    Reservoir(t)   two sets, unseen U and seen S. put: refused while U fills the buffer, else a
                   uniform victim leaves S when there is no room. get: uniform over U and S once
                   more than t are there; what was drawn from U moves to S

So a reservoir repeats samples as often as the pace asks for, forgets only what was drawn at least
once, and never loses an unseen sample: put returns False instead, and the producer has to wait
(Meyer et al., "High Throughput Training of Deep Surrogates from Large Ensemble Runs", SC'23). A
batch holds no item twice. Departure from the paper: when the stream has ended (`finish`) a
reservoir keeps what was drawn instead of draining, because the trainer has a budget of batches.

Items are rows of one preallocated float32 array; the sets are lists of row numbers, so put costs
one copy and O(1), get O(batch). Not thread safe: one loop polls, puts, gets and steps.

    >>> buffer = Reservoir(capacity=8, threshold=0).build(row_size=2, seed=5)
    >>> buffer.put(np.ones(2, dtype=np.float32))
    True
    >>> buffer.get(4).shape
    (1, 2)
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
from pydantic import Field

from simlab.core.config import Registry
from simlab.core.errors import ConfigError
from simlab.core.samples import generator

__all__ = ["FIFO", "FIRO", "Buffer", "BufferSettings", "Reservoir", "buffers"]


class BufferSettings(Protocol):
    """Settings of a buffer."""

    kind: ClassVar[str]
    capacity: int

    def build(self, row_size: int, seed: int) -> Buffer:
        """Return an empty buffer for rows of ``row_size`` float32 values."""
        ...


buffers: Registry[BufferSettings] = Registry("buffer", "simlab.learn.buffers", "simlab.buffers")


class Buffer:
    """Rows in one array, and who may be drawn. Base of the three kinds.

    Attributes
    ----------
    n_put, n_got : int
        Items accepted and items handed out so far.
    """

    def __init__(self, capacity: int, threshold: int, row_size: int, seed: int) -> None:
        self._rows = np.empty((capacity, row_size), dtype=np.float32)
        self._threshold = threshold
        self._free = list(range(capacity - 1, -1, -1))
        self._rng = generator(seed, 0, "buffer")
        self._is_finished = False
        self.n_put = self.n_got = 0

    @property
    def capacity(self) -> int:
        """Rows there is room for."""
        return len(self._rows)

    def __len__(self) -> int:
        """Items held."""
        return self.capacity - len(self._free)

    @property
    def n_unseen(self) -> int:
        """Items that were never handed out."""
        return len(self)

    @property
    def n_seen(self) -> int:
        """Items that were handed out and are still held."""
        return 0

    def put(self, row: np.ndarray) -> bool:
        """Copy a row in, or return False when nothing may be dropped for it."""
        slot = self._slot()
        if slot is None:
            return False
        self._rows[slot] = row
        self._admit(slot)
        self.n_put += 1
        return True

    def get(self, n: int) -> np.ndarray | None:
        """Return up to ``n`` rows, shape (k, row_size), or None when more have to arrive first."""
        if not len(self) or (len(self) <= self._threshold and not self._is_finished):
            return None
        slots = self._draw(min(n, len(self)))
        self.n_got += len(slots)
        return self._rows[slots]

    def finish(self) -> None:
        """Say that nothing more will be put: the threshold no longer holds batches back."""
        self._is_finished = True

    def retains(self, n: int) -> bool:
        """Whether ``n`` items put one by one are all still there after any number of gets."""
        return False

    def _slot(self) -> int | None:
        return self._free.pop() if self._free else None

    def _admit(self, slot: int) -> None:
        raise NotImplementedError

    def _draw(self, n: int) -> list[int]:
        raise NotImplementedError

    def _sets(self) -> dict[str, list[int]]:
        raise NotImplementedError

    def _restore(self, sets: dict[str, list[int]]) -> None:
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Return the state as an array of the held rows and one string of JSON."""
        sets = self._sets()
        held = [slot for name in sorted(sets) for slot in sets[name]]
        plain = {
            "sets": sets,
            "free": self._free,
            "rng": _plain(self._rng.bit_generator.state),
            "is_finished": self._is_finished,
            "n_put": self.n_put,
            "n_got": self.n_got,
        }
        return {"rows": self._rows[held], "plain": json.dumps(plain)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state from a buffer of the same settings."""
        plain = json.loads(state["plain"])
        held = [slot for name in sorted(plain["sets"]) for slot in plain["sets"][name]]
        self._rows[held] = state["rows"]
        self._free = plain["free"]
        self._restore(plain["sets"])
        rng = plain["rng"]
        rng["state"] = {
            name: np.array(value, dtype=np.uint64) for name, value in rng["state"].items()
        }
        rng["buffer"] = np.array(rng["buffer"], dtype=np.uint64)
        self._rng.bit_generator.state = rng
        self._is_finished = plain["is_finished"]
        self.n_put, self.n_got = plain["n_put"], plain["n_got"]


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
        self._held: list[int] = []

    def _admit(self, slot: int) -> None:
        self._held.append(slot)

    def _draw(self, n: int) -> list[int]:
        picks = self._rng.choice(len(self._held), size=n, replace=False)
        slots = [self._held[i] for i in picks]
        _take(self._held, picks)
        self._free += slots
        return slots

    def _sets(self) -> dict[str, list[int]]:
        return {"held": self._held}

    def _restore(self, sets: dict[str, list[int]]) -> None:
        self._held = sets["held"]


class _Reservoir(Buffer):
    def __init__(self, capacity: int, threshold: int, row_size: int, seed: int) -> None:
        super().__init__(capacity, threshold, row_size, seed)
        self._unseen: list[int] = []
        self._seen: list[int] = []

    @property
    def n_unseen(self) -> int:
        return len(self._unseen)

    @property
    def n_seen(self) -> int:
        return len(self._seen)

    def retains(self, n: int) -> bool:
        return n <= self.capacity

    def _slot(self) -> int | None:
        if self._free or not self._seen:
            return super()._slot()
        victim = int(self._rng.integers(len(self._seen)))
        slot = self._seen[victim]
        _take(self._seen, [victim])
        return slot

    def _admit(self, slot: int) -> None:
        self._unseen.append(slot)

    def _draw(self, n: int) -> list[int]:
        n_unseen = len(self._unseen)
        picks = self._rng.choice(n_unseen + len(self._seen), size=n, replace=False)
        slots = [
            self._unseen[i] if i < n_unseen else self._seen[i - n_unseen] for i in picks.tolist()
        ]
        fresh = [i for i in picks.tolist() if i < n_unseen]
        self._seen += [self._unseen[i] for i in fresh]
        _take(self._unseen, fresh)
        return slots

    def _sets(self) -> dict[str, list[int]]:
        return {"seen": self._seen, "unseen": self._unseen}

    def _restore(self, sets: dict[str, list[int]]) -> None:
        self._seen, self._unseen = sets["seen"], sets["unseen"]


def _take(members: list[int], positions: Sequence[int] | np.ndarray) -> None:
    """Remove distinct positions; the last members fill the gaps, so the order changes."""
    for position in sorted(positions, reverse=True):
        members[position] = members[-1]
        members.pop()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    return value.tolist() if isinstance(value, np.ndarray) else value


def _threshold(given: int | None, capacity: int) -> int:
    """Return the threshold in force: a quarter of the capacity, at most 100, when none is given."""
    if given is None:
        return min(100, capacity // 4)
    if given >= capacity:
        raise ConfigError(
            f"threshold = {given} is not below capacity = {capacity}: no batch would ever start"
        )
    return given


@buffers.register("fifo")
class FIFO:
    """First in, first out: each item once, in order of arrival. The baseline."""

    capacity: int = Field(2000, ge=1)

    def build(self, row_size: int, seed: int) -> Buffer:
        """Return an empty buffer."""
        return _FIFO(self.capacity, row_size, seed)


@buffers.register("firo")
class FIRO:
    """First in, random out: each item once, drawn once more than ``threshold`` are there."""

    capacity: int = Field(2000, ge=1)
    threshold: int | None = Field(None, ge=0)

    def __post_init__(self) -> None:
        _threshold(self.threshold, self.capacity)

    def build(self, row_size: int, seed: int) -> Buffer:
        """Return an empty buffer."""
        threshold = _threshold(self.threshold, self.capacity)
        return _FIRO(self.capacity, threshold, row_size, seed)


@buffers.register("reservoir")
class Reservoir:
    """Unseen items are never dropped, seen ones are repeated; the default.

    Attributes
    ----------
    capacity : int
        Items held; one item is one step of one trajectory.
    threshold : int
        Items that must be exceeded before the first batch; a quarter of the capacity, at most 100,
        when left out.
    """

    capacity: int = Field(2000, ge=1)
    threshold: int | None = Field(None, ge=0)

    def __post_init__(self) -> None:
        _threshold(self.threshold, self.capacity)

    def build(self, row_size: int, seed: int) -> Buffer:
        """Return an empty buffer."""
        threshold = _threshold(self.threshold, self.capacity)
        return _Reservoir(self.capacity, threshold, row_size, seed)
