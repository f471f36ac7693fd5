"""Channels: one way to follow a store, whether its files are at hand or on other nodes.

A channel answers one request, ``records(position, at_most)``: up to ``at_most`` new records and the
position after them. It keeps nothing that matters, so either side may end and start again; the
caller's position, kept with what was made of the records, is the only acknowledgement.

``tail`` reads the files of the store. ``stream`` (:mod:`.stream`) asks a process that can.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np

from simlab.core.samples import Sample, Trajectory
from simlab.store.events import Begin, End, Event
from simlab.store.follow import Position
from simlab.store.schema import Schema
from simlab.store.store import SnapshotStore

__all__ = ["Channel", "TailChannel", "open_channel", "received_split"]

_AT_MOST = 256


class Channel(Protocol):
    """Where a follower gets its records from."""

    schema: Schema

    def records(
        self, position: Position | None, at_most: int
    ) -> tuple[list[Event], Position | None]:
        """Return up to ``at_most`` records after ``position``, and the position after them.

        Nothing new: no records and a new position. No answer for now: no records and the very
        ``position`` that was given. What was not asked for is never sent, so ``at_most`` is the
        control of the flow; of large records fewer come at a time (``CALL_BYTES``).
        """
        ...

    def is_complete(self) -> bool:
        """Return whether every trajectory had ended when this channel last looked."""
        ...

    def ids(self, split: str) -> np.ndarray:
        """Return the ids of all trajectories of a split, made or not; int64, sorted."""
        ...

    def close(self) -> None:
        """Let go of files and sockets."""
        ...


class TailChannel:
    """Follows the files of a store: on one host, or on a file system that all nodes share.

    Attributes
    ----------
    store : SnapshotStore
    schema : Schema
    """

    def __init__(self, path: str | Path) -> None:
        self.store = SnapshotStore.open(path)
        self.schema = self.store.schema

    def records(self, position: Position | None, at_most: int) -> tuple[list[Event], Position]:
        """Return up to ``at_most`` records after ``position``, and the position after them."""
        return self.store.follow(position, at_most)

    def is_complete(self) -> bool:
        """Return whether every trajectory has ended."""
        return self.store.is_complete()

    def ids(self, split: str) -> np.ndarray:
        """Return the ids of all trajectories of a split."""
        return self.store.ids(split)

    def close(self) -> None:
        """Do nothing: no file stays open between calls."""


def open_channel(where: str | Path, stop: Callable[[], bool] = lambda: False) -> Channel:
    """Return the channel to a store: ``tail`` for its directory, ``stream`` for a server's file.

    Raises
    ------
    StoreError
        When there is no store, or its server does not answer: at once when ``stop()`` is true.
    """
    where = Path(where)
    if where.is_dir() or not where.name.endswith(".json"):
        return TailChannel(where)
    from simlab.store.stream import StreamChannel

    return StreamChannel(where, stop=stop)


def received_split(
    channel: Channel,
    split: str,
    stop: Callable[[], bool] = lambda: False,
    wait: Callable[[], None] = lambda: time.sleep(0.1),
) -> list[Trajectory] | None:
    """Wait until every trajectory of a split has ended; return the finished ones, sorted by id.

    They are what :meth:`simlab.store.store.SnapshotStore.split` reads from the files, held in
    memory. Starts at the beginning of the store, where a campaign puts its held-out splits;
    ``wait()`` is called when nothing is new.

    Returns
    -------
    list of Trajectory, or None
        None when ``stop()`` came to be true before.
    """
    missing = set(channel.ids(split).tolist())
    times = np.asarray(channel.schema.times)
    position: Position | None = None
    samples: dict[int, tuple[int, Sample]] = {}  # attempt, sample of what has begun
    steps: dict[int, list[dict[str, np.ndarray]]] = {}
    found: dict[int, Trajectory] = {}
    while missing and not stop():
        events, position = channel.records(position, _AT_MOST)
        if not events:
            wait()
        for event in events:
            traj = event.traj
            if isinstance(event, Begin):
                if event.split == split:
                    samples[traj], steps[traj] = (event.attempt, event.sample), []
            elif traj not in samples or samples[traj][0] != event.attempt:
                continue
            elif not isinstance(event, End):
                steps[traj].append({name: v.copy() for name, v in event.fields.items()})
            else:
                sample, made = samples.pop(traj)[1], steps.pop(traj)
                if event.status == "done":
                    outputs = {name: np.stack([step[name] for step in made]) for name in made[0]}
                    found[traj] = Trajectory(sample, times[: len(made)], outputs)
                if event.status != "abandoned":
                    missing.discard(traj)
    return None if missing else [found[traj] for traj in sorted(found)]
