"""The groups of a campaign, each walking its own chain, and taking work from each other at its end.

    every group    walk the samples of its chain in order
    one that is through    ask all others how much they have left
                           take the tail of the fullest: half of it, at least 10 samples
                           go on with that; through for good once nobody has 15 left

A tail is a stretch of the order, so what neighbours have in common is kept; single samples never
change hands. Only roots talk, in messages on a communicator of their own: a group that walks looks
for messages between two samples (a probe, about a microsecond), so an answer takes one sample at
most; a group that waits sleeps. No collective call of all groups is made until the phase is over.
Within a group the root decides and tells the others the next sample.

A sample is handed out by one root only, to its own group or once to another, so none is solved
twice. Messages carry the number of their phase: what arrives late is dropped, what arrives early
is kept. A group that fails tells the others, which raise as well instead of waiting for it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np

from simlab.core.comm import Group
from simlab.core.errors import CollectiveError

__all__ = ["SEGMENT", "Crew"]

SEGMENT = 10
"""Fewest samples that change hands."""

_LEAST = 15  # samples left from which giving a segment away still pays
_NAP_SECONDS = 1e-3
_LOOK_SECONDS = 0.05  # between looks for a stop while waiting
_THROUGH, _FAILED = -1, -2


class Crew:
    """All groups of one campaign; a context manager around its phases.

    Collective on ``group.parent`` when made and on a clean exit.

    Parameters
    ----------
    group : Group
        This rank's group.

    Attributes
    ----------
    n_taken : int
        Samples this group took over from others.

    Examples
    --------
    >>> from simlab.core.comm import self_comm, split
    >>> with Crew(split(self_comm())) as crew:
    ...     walked = list(crew.walk([4, 2, 7], stop=lambda: False))
    ...     crew.gather()
    >>> walked
    [4, 2, 7]
    """

    def __init__(self, group: Group) -> None:
        self._group = group
        # rank i of the roots' communicator is the root of group i
        self._roots = group.parent.Split(0 if group.is_root else 1, group.parent.rank)
        self._phase = 0
        self._left: deque[int] = deque()
        self._early: list[tuple[int, int, str, Any]] = []
        self._sent: list[Any] = []
        self._n_sent = [0] * group.n_groups
        self._n_received = [0] * group.n_groups
        self._counts: dict[int, int] = {}  # what the others answered
        self._segments: dict[int, list[int]] = {}
        self._through: set[int] = set()
        self._is_told = False
        self.n_taken = 0

    def __enter__(self) -> Crew:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._drain()
            self._roots.Free()
        elif self._group.is_root and not self._is_told:
            self._tell_all("failed", f"{kind.__name__}: {error}")

    def walk(self, chain: Sequence[int] | np.ndarray, stop: Callable[[], bool]) -> Iterator[int]:
        """Yield this group's samples of one phase, then those it takes from others.

        Collective on the group; every group calls it once per phase, with an empty chain if need
        be, and :meth:`gather` afterwards.

        Parameters
        ----------
        chain : sequence of int
            In order. Only the root's counts.
        stop : callable
            Asked by the root before every sample; when true, the walk ends.

        Raises
        ------
        CollectiveError
            When another group has failed.
        """
        self._phase += 1
        if not self._group.is_root:
            while (index := self._hear()) >= 0:
                yield index
            return
        self._left = deque(map(int, chain))
        self._through = set()
        early, self._early = self._early, []
        for message in early:
            self._take_in(*message)
        while True:
            self._answer()
            if stop():
                break
            if not self._left:
                segment = self._steal(stop)
                if not segment:
                    break
                self.n_taken += len(segment)
                self._left.extend(segment)
                continue  # the wait may have been long: ask for a stop again
            index = self._left.popleft()
            self._say(index)
            yield index
        self._left.clear()
        self._tell_all("through")
        self._say(_THROUGH)

    def gather(self) -> None:
        """Wait, asleep, until all groups are through with this phase. Collective on the parent."""
        if not self._group.is_root:
            self._hear()
            return
        arrived = self._roots.Ibarrier()
        while not arrived.Test():
            self._answer()
            time.sleep(_NAP_SECONDS)
        self._say(_THROUGH)

    def _steal(self, stop: Callable[[], bool]) -> list[int]:
        """Return a segment of the fullest other group, or nothing when there is none to have."""
        while not stop():
            self._counts = {}
            self._ask(self._others() - self._through, "count?", self._counts, stop)
            full = {n: rival for rival, n in self._counts.items() if rival not in self._through}
            if max(full, default=0) < _LEAST:
                break
            rival = full[max(full)]
            self._segments = {}
            self._ask({rival}, "take?", self._segments, stop)
            if self._segments.get(rival):
                return self._segments[rival]
        return []

    def _ask(
        self, rivals: set[int], word: str, answers: Mapping[int, Any], stop: Callable[[], bool]
    ) -> None:
        """Ask some groups and wait, asleep, until each has answered or is through."""
        for rival in rivals:
            self._tell(rival, word)
        looked = time.perf_counter()
        while not rivals <= answers.keys() | self._through:
            time.sleep(_NAP_SECONDS)
            self._answer()
            if time.perf_counter() - looked > _LOOK_SECONDS:
                looked = time.perf_counter()
                if stop():
                    break

    def _answer(self) -> None:
        """Take in every message that has arrived."""
        while self._roots.iprobe():
            phase, sender, word, value = self._receive()
            if word == "failed":
                self._give_up(sender, value)
            elif phase == self._phase:
                self._take_in(phase, sender, word, value)
            elif phase > self._phase:
                self._early.append((phase, sender, word, value))

    def _take_in(self, phase: int, sender: int, word: str, value: Any) -> None:
        if word == "count?":
            self._tell(sender, "count", len(self._left))
        elif word == "take?":
            self._tell(sender, "segment", self._tail())
        elif word == "count":
            self._counts[sender] = value
        elif word == "segment":
            self._segments[sender] = value
        else:
            self._through.add(sender)

    def _tail(self) -> list[int]:
        if len(self._left) < _LEAST:
            return []
        n = max(SEGMENT, len(self._left) // 2)
        return [self._left.pop() for _ in range(n)][::-1]

    def _give_up(self, sender: int, reason: str) -> None:
        self._is_told = True
        self._say(_FAILED)
        raise CollectiveError(f"group {sender} failed, so this one stops: {reason}")

    def _others(self) -> set[int]:
        return set(range(self._group.n_groups)) - {self._group.index}

    def _tell_all(self, word: str, value: Any = None) -> None:
        for other in self._others():
            self._tell(other, word, value)

    def _tell(self, other: int, word: str, value: Any = None) -> None:
        self._sent = [request for request in self._sent if not request.Test()]
        message = (self._phase, self._group.index, word, value)
        self._sent.append(self._roots.isend(message, other))
        self._n_sent[other] += 1

    def _receive(self) -> tuple[int, int, str, Any]:
        message: tuple[int, int, str, Any] = self._roots.recv()
        self._n_received[message[1]] += 1
        return message

    def _drain(self) -> None:
        """Receive what is still on its way, so that the communicator can go. Collective."""
        if self._group.is_root:
            expected = self._roots.alltoall(self._n_sent)
            while self._n_received != expected:
                self._receive()

    def _say(self, index: int) -> None:
        """Tell the ranks of this group what is next."""
        if self._group.comm.size > 1:
            self._group.comm.Ibcast(np.array([index], dtype=np.int64)).Wait()

    def _hear(self) -> int:
        """Learn from the root what is next; sleeps when that takes long, as a broadcast does not.

        Raises
        ------
        CollectiveError
            When the root gives up.
        """
        index = np.empty(1, dtype=np.int64)
        request = self._group.comm.Ibcast(index)
        begun = time.perf_counter()
        while not request.Test():
            if time.perf_counter() - begun > _NAP_SECONDS:
                time.sleep(_NAP_SECONDS)
        if index[0] == _FAILED:
            self._is_told = True
            raise CollectiveError("another group failed, so this one stops")
        return int(index[0])
