"""Streams of training items: out of a store that is still being written, or out of memory.

A stream hands out items in its own order, each (trajectory, step) once per pass, and can say where
it stands, so that a resumed trainer neither loses nor repeats one. Following a store, a trajectory
counts by its steps in order: of a later attempt only the steps that were not delivered yet are
taken, steps of earlier attempts and of other splits are dropped, and a trajectory that fails keeps
what it delivered but gives nothing more.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from simlab.core.errors import SchemaError, StoreError
from simlab.core.samples import Trajectory, generator
from simlab.learn.encoding import Encoding, Statistics
from simlab.learn.lookup import StoreSteps
from simlab.store.channel import Channel, TailChannel, open_channel
from simlab.store.follow import Begin, End, Event, Position
from simlab.store.schema import Schema

__all__ = ["DerivedStream", "FollowedStream", "Item", "MemoryStream", "Stream"]


class Item(NamedTuple):
    """One step of one trajectory; ``row`` as in :class:`simlab.learn.encoding.Encoding`."""

    traj: int
    step: int
    row: np.ndarray
    attempt: int = 1


class Stream(Protocol):
    """Where a trainer gets its items from.

    Attributes
    ----------
    schema : Schema
    finished : list of int
        Trajectories that are complete, in the order in which they were found to be; only grows.
    """

    schema: Schema
    finished: list[int]

    def poll(self, at_most: int) -> list[Item]:
        """Return the next items; an empty list when there are none for now. Never waits."""
        ...

    @property
    def is_exhausted(self) -> bool:
        """Whether this pass has delivered everything there will ever be."""
        ...

    @property
    def n_items(self) -> int:
        """Items delivered in this pass."""
        ...

    def rewind(self) -> None:
        """Begin another pass."""
        ...

    def ids(self) -> np.ndarray:
        """Return the trajectories there are or will be, int64, sorted."""
        ...

    def is_over(self, traj: int) -> bool:
        """Whether this pass has delivered all of a trajectory there will ever be."""
        ...

    def row(self, traj: int, step: int) -> np.ndarray:
        """Return an item that was delivered before once more, shape (row_size,)."""
        ...

    def sync(self) -> bool:
        """Bring what ``row`` reads to the disk; return whether it can read at all."""
        ...

    def pilot(self, n: int, now: bool = False) -> Statistics | None:
        """Return the statistics of the first ``n`` trajectories by id, None while incomplete.

        With ``now`` those of the first complete ones; where there is not one but more is to come,
        those of all items delivered so far. None only when there is nothing at all.
        """
        ...

    def skip_pilot(self) -> None:
        """Gather no statistics: nobody will ask for them."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return where the stream stands, as arrays and plain values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        ...


class DerivedStream:
    """What a stream leaves to another one that it is made of. Base.

    Parameters
    ----------
    inner : Stream
    """

    def __init__(self, inner: Stream) -> None:
        self._inner, self._n_items = inner, 0

    @property
    def is_exhausted(self) -> bool:
        """Whether this pass has delivered everything there will ever be."""
        return self._inner.is_exhausted

    @property
    def n_items(self) -> int:
        """Items delivered in this pass."""
        return self._n_items

    def ids(self) -> np.ndarray:
        """Return the trajectories there are or will be, int64, sorted."""
        return self._inner.ids()

    def is_over(self, traj: int) -> bool:
        """Whether this pass has delivered all of a trajectory there will ever be."""
        return self._inner.is_over(traj)

    def row(self, traj: int, step: int) -> np.ndarray:
        """Return an item that was delivered before once more, shape (row_size,)."""
        return self._inner.row(traj, step)

    def sync(self) -> bool:
        """Bring what ``row`` reads to the disk; return whether it can read at all."""
        return self._inner.sync()


class MemoryStream:
    """Trajectories in memory; every pass in another random order.

    Parameters
    ----------
    trajectories : sequence of Trajectory
        All are held in memory; larger data are followed from their store. Known by the index of
        their sample; where two have the same one, as of several campaigns, by their place.
    schema : Schema
    seed : int
        The order depends on it and on the number of the pass.

    Raises
    ------
    SchemaError
        When a trajectory is shorter or longer than the schema says.
    """

    def __init__(self, trajectories: Sequence[Trajectory], schema: Schema, seed: int) -> None:
        self.schema = schema
        self._encoding = Encoding(schema)
        for t in trajectories:
            if len(t.times) != self._encoding.n_times:
                raise SchemaError(
                    f"trajectory {t.sample.index} has {len(t.times)} times, those of "
                    f"{schema.name!r} have {self._encoding.n_times}"
                )
        self._trajectories = trajectories
        self._conditions = [self._encoding.condition(t.sample) for t in trajectories]
        self._names = [t.sample.index for t in trajectories]
        if len(set(self._names)) < len(self._names):
            self._names = list(range(len(self._names)))
        self._index = {name: place for place, name in enumerate(self._names)}
        self.finished = sorted(self._index)
        self._seed, self._pass, self._position = seed, 0, 0
        self._shuffle()

    def _shuffle(self) -> None:
        n = len(self._trajectories) * self._encoding.n_times
        self._order = generator(self._seed, self._pass, "stream").permutation(n)

    def poll(self, at_most: int) -> list[Item]:
        """Return the next items of this pass."""
        picks = self._order[self._position : self._position + at_most]
        self._position += len(picks)
        items = []
        for index, step in zip(*np.divmod(picks, self._encoding.n_times), strict=True):
            trajectory = self._trajectories[index]
            row = self._encoding.step(trajectory, self._conditions[index], int(step))
            items.append(Item(self._names[index], int(step), row))
        return items

    @property
    def is_exhausted(self) -> bool:
        """Whether this pass is over."""
        return self._position >= len(self._order)

    @property
    def n_items(self) -> int:
        """Items delivered in this pass."""
        return self._position

    def rewind(self) -> None:
        """Begin another pass in a new order."""
        self._pass, self._position = self._pass + 1, 0
        self._shuffle()

    def ids(self) -> np.ndarray:
        """Return the names of all trajectories, sorted."""
        return np.array(self.finished, dtype=np.int64)

    def is_over(self, traj: int) -> bool:
        """Whether the pass is over: before that any trajectory may still give an item."""
        return self.is_exhausted

    def row(self, traj: int, step: int) -> np.ndarray:
        """Return one item, shape (row_size,)."""
        place = self._index[traj]
        return self._encoding.step(self._trajectories[place], self._conditions[place], step)

    def sync(self) -> bool:
        """Return True: whoever resumes brings the same trajectories."""
        return True

    def pilot(self, n: int, now: bool = False) -> Statistics | None:
        """Return the statistics of the first ``n`` trajectories by name."""
        first = [self._trajectories[self._index[name]] for name in sorted(self._index)[:n]]
        parts = [Statistics.of(self._encoding, self._encoding.rows(t)) for t in first]
        return Statistics.merged(parts) if parts else None

    def skip_pilot(self) -> None:
        """Do nothing: statistics are made when they are asked for."""

    def state_dict(self) -> dict[str, Any]:
        """Return pass and position."""
        return {"pass": self._pass, "position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there; the trajectories must be the same ones."""
        self._pass, self._position = state["pass"], state["position"]
        self._shuffle()


@dataclass
class _Open:
    """A trajectory that is being delivered."""

    attempt: int
    condition: np.ndarray


class FollowedStream:
    """One split of a store, as it is written or after.

    Parameters
    ----------
    where : str, Path or Channel
        The store, the file of a server beside it, or a channel to it.
    split : str
        Only trajectories of this split are delivered.
    """

    def __init__(self, where: str | Path | Channel, split: str = "train") -> None:
        self._channel = open_channel(where) if isinstance(where, str | Path) else where
        self._split = split
        self.schema: Schema = self._channel.schema
        self._encoding = Encoding(self.schema)
        self._statistics: dict[int, Statistics] | None = {}
        self._steps: StoreSteps | None = None
        if isinstance(self._channel, TailChannel):
            self._steps = StoreSteps(self._channel.store, self._encoding)
        self.finished: list[int] = []
        self._is_finished: set[int] = set()
        self._start()

    def _start(self) -> None:
        self._position: Position | None = None
        self._open: dict[int, _Open] = {}
        self._next: dict[int, int] = {}
        self._done: set[int] = set()
        self._failed: set[int] = set()
        self._n_items = 0
        self._is_complete = self._is_exhausted = False

    def poll(self, at_most: int) -> list[Item]:
        """Return the items among the next events, ``at_most`` at a time until there are any."""
        items: list[Item] = []
        while not items:
            before = self._position
            events, self._position = self._channel.records(before, at_most)
            if not events:  # complete is asked before the last look, so nothing slips in between
                if self._position is not before:  # an answer, not silence
                    self._is_exhausted = self._is_complete
                    self._is_complete = self._is_complete or self._channel.is_complete()
                break
            items = [item for event in events if (item := self._take(event)) is not None]
        self._n_items += len(items)
        return items

    def _take(self, event: Event) -> Item | None:
        if event.traj in self._done:
            return None
        opened = self._open.get(event.traj)
        if isinstance(event, Begin):
            if event.split == self._split and (opened is None or event.attempt > opened.attempt):
                condition = self._encoding.condition(event.sample)
                self._open[event.traj] = _Open(event.attempt, condition)
                self._failed.discard(event.traj)
            return None
        if opened is None or event.attempt != opened.attempt:
            return None
        if isinstance(event, End):
            del self._open[event.traj]
            if event.status == "done":
                self._done.add(event.traj)
                if event.traj not in self._is_finished:
                    self._is_finished.add(event.traj)
                    self.finished.append(event.traj)
            elif event.status == "failed":
                self._failed.add(event.traj)
            return None
        expected = self._next.get(event.traj, 0)
        if event.step > expected:
            raise StoreError(
                f"store: trajectory {event.traj} goes from step {expected - 1} to {event.step}; "
                "run `simlab store verify`"
            )
        if event.step < expected:
            return None
        self._next[event.traj] = expected + 1
        row = self._encoding.row(opened.condition, event.time, event.fields)
        if self._statistics is not None:
            new = Statistics.of(self._encoding, row[None])
            old = self._statistics.get(event.traj)
            self._statistics[event.traj] = new if old is None else Statistics.merged([old, new])
        return Item(event.traj, event.step, row, event.attempt)

    @property
    def is_exhausted(self) -> bool:
        """Whether the store is complete and everything in it was delivered."""
        return self._is_exhausted

    @property
    def n_items(self) -> int:
        """Items delivered in this pass."""
        return self._n_items

    def rewind(self) -> None:
        """Follow the store from its beginning again."""
        self._start()

    def ids(self) -> np.ndarray:
        """Return the trajectories of the split, made or not, int64, sorted."""
        return np.sort(self._channel.ids(self._split))

    def is_over(self, traj: int) -> bool:
        """Whether a trajectory is done, or failed and the campaign complete: else it may go on."""
        return traj in self._done or self._is_exhausted

    def row(self, traj: int, step: int) -> np.ndarray:
        """Return one item by a random read of the store, shape (row_size,)."""
        if self._steps is None:
            raise StoreError(
                "this buffer reads the store at random, which needs its files: follow the store's "
                "directory, or choose another train.buffer.kind"
            )
        return self._steps.row(traj, step)

    def sync(self) -> bool:
        """Bring the store's records to the disk; False when they come over a network."""
        if self._steps is not None:
            self._steps.sync()
        return self._steps is not None

    def pilot(self, n: int, now: bool = False) -> Statistics | None:
        """Return the statistics of the first ``n`` trajectories by id that did not fail.

        They are the same for any number of writers and any order of arrival. None while one of them
        is incomplete; with ``now``, those of the first complete ones, or of what has come so far.
        """
        if self._statistics is None:
            raise RuntimeError("the pilot was taken already")
        n_times = self._encoding.n_times
        ids = [
            int(i) for i in np.sort(self._channel.ids(self._split)) if int(i) not in self._failed
        ]
        ready = [i for i in ids if self._next.get(i, 0) == n_times][:n]
        if now and not ready and not self._is_exhausted:
            ready = [i for i in ids if i in self._statistics]
        if not ready or (ready != ids[:n] and not now):
            return None
        merged = Statistics.merged([self._statistics[i] for i in ready])
        self._statistics = None
        return merged

    def skip_pilot(self) -> None:
        """Gather no statistics."""
        self._statistics = None

    def state_dict(self) -> dict[str, Any]:
        """Return position, next steps, and the samples of trajectories half delivered."""
        plain = {
            "position": self._position and self._position.to_json(),
            "next": sorted(self._next.items()),
            "done": sorted(self._done),
            "failed": sorted(self._failed),
            "finished": self.finished,
            "attempts": [(traj, item.attempt) for traj, item in self._open.items()],
            "n_items": self._n_items,
        }
        conditions = [item.condition for item in self._open.values()]
        size = (0, self._encoding.condition_size)
        return {
            "plain": json.dumps(plain),
            "conditions": np.stack(conditions) if conditions else np.zeros(size, np.float32),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there, without the statistics of the pilot: the trainer has its result."""
        self._start()
        plain = json.loads(state["plain"])
        self._position = plain["position"] and Position.from_json(plain["position"])
        self._n_items = plain["n_items"]
        self._next = {traj: step for traj, step in plain["next"]}
        self._done, self._failed = set(plain["done"]), set(plain["failed"])
        self.finished[:] = plain["finished"]
        self._is_finished = set(self.finished)
        self._open = {
            traj: _Open(attempt, condition)
            for (traj, attempt), condition in zip(
                plain["attempts"], state["conditions"], strict=True
            )
        }
        self._statistics = None
