"""Channels: one way to follow a store, whether its files are at hand or on other nodes.

A channel answers one request, ``records(position, at_most)``: up to ``at_most`` new records and the
position after them. It keeps nothing that matters, so either side may end and start again; the
caller's position, kept with what was made of the records, is the only acknowledgement.

``tail`` reads the files of the store. ``stream`` (:mod:`.stream`) asks a process that can.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np

from simlab.store.events import Event
from simlab.store.follow import Position
from simlab.store.schema import Schema
from simlab.store.store import SnapshotStore

__all__ = ["Channel", "TailChannel", "open_channel"]


class Channel(Protocol):
    """Where a follower gets its records from."""

    schema: Schema

    def records(
        self, position: Position | None, at_most: int
    ) -> tuple[list[Event], Position | None]:
        """Return up to ``at_most`` records after ``position``, and the position after them.

        Nothing new: no records and a new position. No answer for now: no records and the very
        ``position`` that was given. What was not asked for is never sent, so ``at_most`` is the
        control of the flow.
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


def open_channel(where: str | Path) -> Channel:
    """Return the channel to a store: ``tail`` for its directory, ``stream`` for a server's file."""
    where = Path(where)
    if where.is_dir() or not where.name.endswith(".json"):
        return TailChannel(where)
    from simlab.store.stream import StreamChannel

    return StreamChannel(where)
