"""A stream in an order that depends on nothing but the trajectories: deterministic training.

Lanes in turn give one step each; a lane whose trajectory has ended takes the next id. What arrives
before its turn is held in memory, and whoever asks before the next ``n`` items in order are there
gets nothing. So a loop that polls, puts and draws in fixed proportion makes the same weights,
however fast or slow the producers are.

A trajectory that fails holds the order up until the campaign is complete, because it may be tried
again until then.
"""

from __future__ import annotations

import json
from typing import Any

from simlab.learn.encoding import Encoding, Statistics
from simlab.learn.pilots import PilotStatistics
from simlab.learn.stream import DerivedStream, Item, Stream

__all__ = ["OrderedStream"]


class OrderedStream(DerivedStream):
    """Round robin over trajectories, step by step.

    Parameters
    ----------
    inner : Stream
        Delivers each trajectory's steps at any time, in any order.
    lanes : int
        Trajectories in turn. At least the number of solvers, else some wait for their turn in
        memory.
    """

    def __init__(self, inner: Stream, lanes: int) -> None:
        super().__init__(inner)
        inner.skip_pilot()
        self.schema = inner.schema
        self._encoding = Encoding(self.schema)
        self._pilot = PilotStatistics(self._encoding)
        self.finished: list[int] = []
        self._known: set[int] = set()
        self._n_lanes = lanes
        self._start()

    def _start(self) -> None:
        self._ids = self._inner.ids().tolist()
        self._place = {traj: place for place, traj in enumerate(self._ids)}
        self._lanes: list[list[int]] = [[traj, 0] for traj in self._ids[: self._n_lanes]]
        self._next_id, self._turn = len(self._lanes), 0
        self._held: dict[tuple[int, int], Item] = {}
        self._ready: list[Item] = []
        self._over: list[int] = []
        self._n_items, self._is_exhausted = 0, False
        self._mark = self._standing()

    def poll(self, at_most: int) -> list[Item]:
        """Return exactly so many items, or nothing while they are not there, or the last ones."""
        while len(self._ready) < at_most and self._lanes:
            if not self._advance() and not self._fetch(at_most):
                return []
        self._is_exhausted = len(self._ready) < at_most
        items, self._ready = self._ready[:at_most], self._ready[at_most:]
        self._n_items += len(items)
        for item in items:
            self._pilot.add(item.traj, item.row)
        self._finish()
        self._mark = self._standing()
        return items

    def _advance(self) -> bool:
        """Take the next item in order if it is there; return whether anything could be done."""
        lane = self._lanes[self._turn]
        traj, step = lane
        item = self._held.pop((traj, step), None)
        if item is not None:
            self._ready.append(item)
            lane[1] += 1
            if lane[1] == self._encoding.n_times:
                self._over.append(traj)
                self._replace()
            else:
                self._turn = (self._turn + 1) % len(self._lanes)
            return True
        if self._inner.is_over(traj):
            self._replace()
            return True
        return False

    def _finish(self) -> None:
        new = [traj for traj in self._over if traj not in self._known]
        self.finished += new
        self._known.update(new)
        self._over.clear()

    def _replace(self) -> None:
        if self._next_id < len(self._ids):
            self._lanes[self._turn] = [self._ids[self._next_id], 0]
            self._next_id += 1
            self._turn += 1
        else:
            del self._lanes[self._turn]
        self._turn %= max(len(self._lanes), 1)

    def _fetch(self, n: int) -> bool:
        """Hold what has arrived; return whether there was anything, or an end."""
        was_exhausted = self._inner.is_exhausted
        items = self._inner.poll(max(n, 64))
        for item in items:
            if self._is_wanted(item):
                self._held[item.traj, item.step] = item
        return bool(items) or (self._inner.is_exhausted and not was_exhausted)

    def _is_wanted(self, item: Item) -> bool:
        if self._place[item.traj] >= self._next_id:
            return True
        return any(traj == item.traj and item.step >= step for traj, step in self._lanes)

    @property
    def is_exhausted(self) -> bool:
        """Whether a poll found fewer items than it asked for, and no more to come."""
        return self._is_exhausted

    def rewind(self) -> None:
        """Begin another pass, in the same order."""
        self._inner.rewind()
        self._start()

    def is_over(self, traj: int) -> bool:
        """Whether this pass has delivered all of a trajectory there will ever be."""
        is_waiting = self._place[traj] >= self._next_id
        return not is_waiting and traj not in [lane[0] for lane in self._lanes]

    def pilot(self, n: int, now: bool = False) -> Statistics | None:
        """Return the statistics of the first ``n`` trajectories that came whole, as delivered."""
        return self._pilot.take(n, now, self._ids, self.is_over)

    def skip_pilot(self) -> None:
        """Gather no statistics."""
        self._pilot.close()

    def _standing(self) -> dict[str, Any]:
        return {
            "lanes": [list(lane) for lane in self._lanes],
            "next_id": self._next_id,
            "turn": self._turn,
            "n_ready": len(self._ready),
            "n_items": self._n_items,
            "is_exhausted": self._is_exhausted,
            "finished": list(self.finished),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return where the order stands; what was held ahead is read again from the start."""
        return {"plain": json.dumps(self._mark)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there: the inner stream delivers from the beginning, the past is skipped."""
        self._inner.rewind()
        self._start()
        plain = json.loads(state["plain"])
        self._lanes, self._next_id = plain["lanes"], plain["next_id"]
        self._turn, self._n_items = plain["turn"], plain["n_items"]
        self._is_exhausted = plain["is_exhausted"]
        self.finished[:] = plain["finished"]
        self._known = set(self.finished)
        self._pilot.close()
        self._mark = self._standing()
