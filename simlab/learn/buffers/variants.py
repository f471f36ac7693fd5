"""Reservoirs with another law of drawing: by time first, or mixed with what the store holds."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from pydantic import Field

from simlab.learn.buffers.base import Archive, Buffer, Recall, Thresholded, buffers
from simlab.learn.buffers.reservoirs import RepeatingBuffer, ReservoirBuffer

__all__ = ["ReplayMix", "TimeStratified"]


class _Bag:
    """A list that finds its members: add, remove and pick in O(1)."""

    def __init__(self, members: list[int] | None = None) -> None:
        self.members = members or []
        self._where = {slot: place for place, slot in enumerate(self.members)}

    def __len__(self) -> int:
        return len(self.members)

    def add(self, slot: int) -> None:
        self._where[slot] = len(self.members)
        self.members.append(slot)

    def remove(self, slot: int) -> None:
        place, last = self._where.pop(slot), self.members.pop()
        if last != slot:
            self.members[place] = last
            self._where[last] = place


class _Stratified(RepeatingBuffer):
    """Unseen, seen, and every item once more in the bag of its time."""

    _unseen: _Bag
    _seen: _Bag

    def __init__(self, capacity: int, threshold: int, row_size: int, seed: int, width: int) -> None:
        super().__init__(capacity, threshold, row_size, seed)
        self._width = width
        self._unseen, self._seen = _Bag(), _Bag()
        self._strata: dict[int, _Bag] = {}

    def _slot(self) -> int | None:
        if self._free or not self._seen:
            return super()._slot()
        slot = self._seen.members[int(self._rng.integers(len(self._seen)))]
        self._seen.remove(slot)
        stratum = int(self._items[slot, 1]) // self._width
        self._strata[stratum].remove(slot)
        if not self._strata[stratum]:
            del self._strata[stratum]
        return slot

    def _admit(self, slot: int) -> None:
        self._unseen.add(slot)
        self._strata.setdefault(int(self._items[slot, 1]) // self._width, _Bag()).add(slot)

    def _draw(self, n: int) -> list[int]:
        bags = [self._strata[stratum].members for stratum in sorted(self._strata)]
        sizes = np.array([len(bag) for bag in bags])
        quotas = self._quotas(n, sizes)
        alone = np.flatnonzero(quotas == 1)  # most, where times are many: one call for them all
        picks = self._rng.integers(sizes[alone])
        slots = [bags[place][i] for place, i in zip(alone.tolist(), picks.tolist(), strict=True)]
        for place in np.flatnonzero(quotas > 1).tolist():
            picks = self._rng.choice(sizes[place], size=quotas[place], replace=False)
            slots += [bags[place][i] for i in picks.tolist()]
        for slot in slots:
            if not self._draws[slot]:
                self._unseen.remove(slot)
                self._seen.add(slot)
        return slots

    def _quotas(self, n: int, sizes: np.ndarray) -> np.ndarray:
        """Return how many items to draw of each stratum: uniform, as far as they have so many."""
        quotas = np.zeros_like(sizes)
        while (left := n - int(quotas.sum())) > 0:
            roomy = np.flatnonzero(quotas < sizes)
            picks = roomy[self._rng.integers(len(roomy), size=left)]
            quotas = np.minimum(quotas + np.bincount(picks, minlength=len(sizes)), sizes)
        return quotas

    def _sets(self) -> dict[str, list[int]]:
        strata = {str(stratum): bag.members for stratum, bag in self._strata.items()}
        return {"seen": self._seen.members, "unseen": self._unseen.members} | strata

    def _restore(self, sets: dict[str, list[int]]) -> None:
        self._seen, self._unseen = _Bag(sets.pop("seen")), _Bag(sets.pop("unseen"))
        self._strata = {int(stratum): _Bag(members) for stratum, members in sets.items()}


class _Replay(ReservoirBuffer):
    """A reservoir, and beside it everything that is committed."""

    def __init__(self, capacity: int, threshold: int, row_size: int, seed: int, q: float) -> None:
        super().__init__(capacity, threshold, row_size, seed)
        self._q = q
        self._archive: Archive | None = None
        self.n_replayed = 0

    def draw_from(self, archive: Archive) -> None:
        self._archive = archive

    def get(self, n: int) -> np.ndarray | None:
        archive = self._archive
        if archive is None or len(archive) <= self.capacity or not self._is_ready(n):
            return super().get(n)
        n_old = int(self._rng.binomial(n, self._q))
        picks = self._rng.integers(len(archive), size=n_old)
        old, items = archive.rows(picks), archive.items(picks)
        self.n_got += n_old
        self.n_replayed += n_old
        new = super().get(n - n_old) if n_old < n else None
        self.drawn = items if new is None else np.concatenate([self.drawn, items])
        return old if new is None else np.concatenate([new, old])

    def state(self) -> dict[str, Any]:
        return super().state() | {"replayed": self.n_replayed}

    def state_dict(self, recall: Recall | None = None) -> dict[str, Any]:
        return super().state_dict(recall) | {"more": json.dumps({"n_replayed": self.n_replayed})}

    def load_state_dict(self, state: dict[str, Any], recall: Recall | None = None) -> None:
        super().load_state_dict(state, recall)
        self.n_replayed = json.loads(state["more"])["n_replayed"]


@buffers.register("time_stratified")
class TimeStratified(Thresholded):
    """A reservoir that draws the time first, then an item of that time.

    Attributes
    ----------
    width : int
        Steps of time that are drawn as one.
    """

    width: int = Field(1, ge=1)

    def build(self, row_size: int, seed: int) -> Buffer:
        """Return an empty buffer."""
        return _Stratified(self.capacity, self.start, row_size, seed, self.width)


@buffers.register("replay")
class ReplayMix(Thresholded):
    """A reservoir, mixed with uniform draws over everything committed.

    Attributes
    ----------
    q : float
        Probability of a draw over all samples of finished trajectories, read back from where the
        stream takes them; in force once they are more than ``capacity``. 0 is a reservoir.
    """

    q: float = Field(0.5, ge=0, le=1)

    def build(self, row_size: int, seed: int) -> Buffer:
        """Return an empty buffer."""
        return _Replay(self.capacity, self.start, row_size, seed, self.q)
