"""What all buffers share: rows in one array, who may be drawn, what is known of each item."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
from pydantic import Field

from simlab.core.config import Registry, settings
from simlab.core.errors import ConfigError, StoreError
from simlab.core.samples import generator

__all__ = ["Archive", "Buffer", "BufferSettings", "Recall", "Thresholded", "buffers"]

_DRAW_BINS = 9
_AGE_BINS = 8
_LEAST_BYTES = 16384  # of a row that is worth a random read to not be written

Recall = Callable[[int, int], np.ndarray | None]
"""``recall(traj, step)`` reads an item once more, or returns None where it cannot."""


class BufferSettings(Protocol):
    """Settings of a buffer."""

    kind: ClassVar[str]
    capacity: int

    def build(self, row_size: int, seed: int) -> Buffer:
        """Return an empty buffer for rows of ``row_size`` float32 values."""
        ...


buffers: Registry[BufferSettings] = Registry("buffer", "simlab.learn.buffers", "simlab.buffers")


@settings
class Thresholded:
    """Settings of a buffer that waits for a number of items before its first batch.

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
        if self.threshold is not None and self.threshold >= self.capacity:
            raise ConfigError(
                f"threshold = {self.threshold} is not below capacity = {self.capacity}: no batch "
                "would ever start"
            )

    @property
    def start(self) -> int:
        """The threshold in force."""
        return min(100, self.capacity // 4) if self.threshold is None else self.threshold


class Archive(Protocol):
    """All committed training samples, whatever the buffer still holds of them."""

    def __len__(self) -> int:
        """Return how many samples can be read."""
        ...

    def rows(self, picks: np.ndarray) -> np.ndarray:
        """Return the samples of these numbers, shape (k, row_size), float32."""
        ...

    def items(self, picks: np.ndarray) -> np.ndarray:
        """Return the trajectories and steps of these numbers, shape (k, 2), int64."""
        ...


class Buffer:
    """Rows in one array, and who may be drawn. Base of all kinds.

    Attributes
    ----------
    n_put, n_got : int
        Items accepted and items handed out so far.
    drawn : ndarray of int64, shape (k, 2)
        Trajectory and step of each row of the batch that :meth:`get` returned last; trajectory -1
        where :meth:`put` was not told.
    """

    def __init__(self, capacity: int, threshold: int, row_size: int, seed: int) -> None:
        self._rows = np.empty((capacity, row_size), dtype=np.float32)
        self._threshold = threshold
        self._free = list(range(capacity - 1, -1, -1))
        self._draws = np.zeros(capacity, dtype=np.int64)
        self._born = np.zeros(capacity, dtype=np.int64)
        self._items = np.zeros((capacity, 2), dtype=np.int64)
        self.drawn = np.zeros((0, 2), dtype=np.int64)
        self._is_kept = np.zeros(capacity, dtype=bool)  # can be recalled: compared bit for bit
        self._crcs = np.zeros(capacity, dtype=np.int64)
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

    def put(self, row: np.ndarray, step: int = 0, traj: int = -1) -> bool:
        """Copy the row of a time step in, or return False when nothing may be dropped for it."""
        slot = self._slot()
        if slot is None:
            return False
        self._rows[slot] = row
        self._draws[slot], self._born[slot], self._items[slot] = 0, self.n_put, (traj, step)
        self._is_kept[slot] = False
        self._admit(slot)
        self.n_put += 1
        return True

    def get(self, n: int) -> np.ndarray | None:
        """Return up to ``n`` rows, shape (k, row_size), or None when more have to arrive first."""
        if not self._is_ready(n):
            return None
        slots = self._draw(min(n, len(self)))
        self._draws[slots] += 1
        self.n_got += len(slots)
        self.drawn = self._items[slots]
        return self._rows[slots]

    @property
    def is_finished(self) -> bool:
        """Whether :meth:`finish` was called."""
        return self._is_finished

    def finish(self) -> None:
        """Say that nothing more will be put: the threshold no longer holds batches back."""
        self._is_finished = True

    def retains(self, n: int) -> bool:
        """Whether ``n`` items put one by one are all still there after any number of gets."""
        return False

    def draw_from(self, archive: Archive) -> None:
        """Offer everything that is committed; only a replay mix makes use of it."""

    def columns(self, picks: Sequence[int]) -> np.ndarray:
        """Return some columns of all items held, shape (len(self), len(picks))."""
        return self._rows[self._held()[:, None], list(picks)]

    def state(self) -> dict[str, Any]:
        """Return what a page on the buffer shows, as plain values.

        ``draws`` counts the items held by how often each was handed out, the last entry being "that
        often or more"; ``ages`` counts them by how many items were put after them, in
        equal bins from 0 to ``oldest``.
        """
        held = self._held()
        ages = self.n_put - self._born[held]
        oldest = int(ages.max(initial=0))
        draws = np.minimum(self._draws[held], _DRAW_BINS - 1)
        return {
            "unseen": self.n_unseen,
            "seen": self.n_seen,
            "put": self.n_put,
            "got": self.n_got,
            "draws": np.bincount(draws, minlength=_DRAW_BINS).tolist(),
            "ages": np.histogram(ages, _AGE_BINS, (0, max(oldest, 1)))[0].tolist(),
            "oldest": oldest,
        }

    def _is_ready(self, n: int) -> bool:
        return len(self) > self._threshold or (self._is_finished and len(self) > 0)

    def _slot(self) -> int | None:
        return self._free.pop() if self._free else None

    def _admit(self, slot: int) -> None:
        raise NotImplementedError

    def _draw(self, n: int) -> list[int]:
        raise NotImplementedError

    def _sets(self) -> dict[str, list[int]]:
        """Return lists of row numbers that say all there is to say of who may be drawn."""
        raise NotImplementedError

    def _restore(self, sets: dict[str, list[int]]) -> None:
        raise NotImplementedError

    def _held(self) -> np.ndarray:
        slots = [slot for members in self._sets().values() for slot in members]
        return np.unique(np.array(slots, dtype=np.int64))

    def state_dict(self, recall: Recall | None = None) -> dict[str, Any]:
        """Return the state as an array of the held rows and one string of JSON.

        Parameters
        ----------
        recall : callable, optional
            Rows that it returns bit for bit are left out, and are read by it again when the state
            is loaded. Each is compared once; rows below 16 KiB are quicker written than read.
        """
        held = self._held()
        kept = np.zeros(len(held), dtype=bool)
        if recall is not None and self._rows.itemsize * self._rows.shape[1] >= _LEAST_BYTES:
            self._compare(held, recall)
            kept = self._is_kept[held]
        plain = {
            "kept": kept.astype(int).tolist(),
            "crcs": self._crcs[held[kept]].tolist(),
            "sets": self._sets(),
            "held": held.tolist(),
            "draws": self._draws[held].tolist(),
            "born": self._born[held].tolist(),
            "trajs": self._items[held, 0].tolist(),
            "steps": self._items[held, 1].tolist(),
            "drawn": self.drawn.tolist(),
            "free": self._free,
            "rng": _plain(self._rng.bit_generator.state),
            "is_finished": self._is_finished,
            "n_put": self.n_put,
            "n_got": self.n_got,
        }
        return {"rows": self._rows[held[~kept]], "plain": json.dumps(plain)}

    def _compare(self, held: np.ndarray, recall: Recall) -> None:
        """Note which rows can be recalled, and a checksum of each."""
        for slot in held[~self._is_kept[held]].tolist():
            traj, step = self._items[slot].tolist()
            found = recall(traj, step) if traj >= 0 else None
            row = self._rows[slot]
            if found is not None and found.astype(np.float32).tobytes() == row.tobytes():
                self._is_kept[slot], self._crcs[slot] = True, zlib.crc32(row.data)

    def load_state_dict(self, state: dict[str, Any], recall: Recall | None = None) -> None:
        """Take over a state from a buffer of the same settings.

        Raises
        ------
        StoreError
            When a row was left out and ``recall`` does not return it as it was.
        """
        plain = json.loads(state["plain"])
        held = np.array(plain["held"], dtype=np.int64)
        self._is_kept[:] = False
        self._is_kept[held] = plain.get("kept", False)
        self._rows[held[~self._is_kept[held]]] = state["rows"]
        self._draws[held], self._born[held] = plain["draws"], plain["born"]
        unknown = [-1] * len(held)  # a checkpoint from before items were known by name
        self._items[held] = np.transpose([plain.get("trajs", unknown), plain["steps"]])
        self.drawn = np.array(plain.get("drawn", []), dtype=np.int64).reshape(-1, 2)
        self._read_back(held[self._is_kept[held]], plain.get("crcs", []), recall)
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

    def _read_back(self, slots: np.ndarray, crcs: list[int], recall: Recall | None) -> None:
        for slot, crc in zip(slots.tolist(), crcs, strict=True):
            traj, step = self._items[slot].tolist()
            found = None if recall is None else recall(traj, step)
            if found is not None:
                self._rows[slot], self._crcs[slot] = found, crc
            if found is None or zlib.crc32(self._rows[slot].data) != crc:
                raise StoreError(
                    f"the checkpoint needs step {step} of trajectory {traj} from the store, which "
                    + ("cannot read it" if found is None else "holds other values by now")
                    + "; give the store it was made with, or begin afresh"
                )


def take(members: list[int], positions: Sequence[int] | np.ndarray) -> None:
    """Remove distinct positions; the last members fill the gaps, so the order changes."""
    for position in sorted(positions, reverse=True):
        members[position] = members[-1]
        members.pop()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    return value.tolist() if isinstance(value, np.ndarray) else value
