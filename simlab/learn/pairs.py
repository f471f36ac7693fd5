"""Windows over time as items of their own: what one-step and rollout networks learn from.

A stream of steps u_1, u_2, ... becomes one of windows (u_k; u_{k+1}, ..., u_{k+m}), laid out as
:mod:`simlab.learn.layout` says. To the rest of the training a window is an ordinary item of another
schema. So every network, buffer and mode of training takes it as it is.

A window never holds steps of two attempts at a trajectory, whose last digits may differ; the few
that would are left out.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from simlab.learn.encoding import Statistics
from simlab.learn.layout import WindowLayout, paired_schema
from simlab.learn.pilots import PilotStatistics
from simlab.learn.stream import DerivedStream, Item, Stream

__all__ = ["PairedStream", "paired_schema"]


class PairedStream(DerivedStream):
    """The windows of another stream, each (trajectory, first step) once per pass.

    Parameters
    ----------
    inner : Stream
        Steps of one trajectory may come in any order, mixed with others.
    ahead : int
        Steps after the first that a window holds.
    """

    def __init__(self, inner: Stream, ahead: int = 1) -> None:
        super().__init__(inner)
        inner.skip_pilot()
        self._layout = WindowLayout(inner.schema, ahead)
        self.schema = self._layout.schema
        self.finished = inner.finished
        self._pilot = PilotStatistics(self._layout.encoding)
        self._start()

    def _start(self) -> None:
        self._held: dict[int, dict[int, Item]] = {}
        self._made: dict[int, set[int]] = {}
        self._whole: set[int] = set()  # with all windows made; of those nothing else is kept
        self._n_items = 0

    def poll(self, at_most: int) -> list[Item]:
        """Return the windows that the next items of the inner stream complete."""
        windows: list[Item] = []
        while not windows and (items := self._inner.poll(at_most)):
            windows = [window for item in items for window in self._take(item)]
        self._n_items += len(windows)
        for window in windows:
            self._pilot.add(window.traj, window.row)
        return windows

    def _take(self, item: Item) -> list[Item]:
        """Hold a step; return the windows it completes, drop steps that none needs any more."""
        if item.traj in self._whole:
            return []
        held = self._held.setdefault(item.traj, {})
        made = self._made.setdefault(item.traj, set())
        if any(other.attempt < item.attempt for other in held.values()):
            made.update(range(item.step + self._layout.has_start))  # they would mix two attempts
            held.clear()
        held[item.step] = item
        windows = []
        layout = self._layout
        for window in layout.containing(item.step):
            steps = layout.steps_of(window)
            if window not in made and all(step in held for step in steps):
                made.add(window)
                row = layout.row(window, [held[step].row for step in steps])
                windows.append(Item(item.traj, window, row, item.attempt))
        for step in [step for step in held if made.issuperset(layout.containing(step))]:
            del held[step]
        if len(made) == layout.encoding.n_times:
            self._whole.add(item.traj)
            del self._held[item.traj], self._made[item.traj]
        return windows

    def rewind(self) -> None:
        """Begin another pass."""
        self._inner.rewind()
        self._start()

    def row(self, traj: int, step: int) -> np.ndarray:
        """Return a window that was delivered before once more, shape (row_size,)."""
        steps = self._layout.steps_of(step)
        return self._layout.row(step, [self._inner.row(traj, k) for k in steps])

    def pilot(self, n: int, now: bool = False) -> Statistics | None:
        """Return the statistics of the first ``n`` trajectories by id all of whose windows came."""
        return self._pilot.take(n, now, self.ids().tolist(), self.is_over)

    def skip_pilot(self) -> None:
        """Gather no statistics."""
        self._pilot.close()

    def state_dict(self) -> dict[str, Any]:
        """Return the inner stream's state and the steps that wait for later ones."""
        items = [item for held in self._held.values() for item in held.values()]
        plain = {
            "held": [[item.traj, item.step, item.attempt] for item in items],
            "made": [[traj, sorted(made)] for traj, made in self._made.items()],
            "whole": sorted(self._whole),
            "n_items": self._n_items,
        }
        rows = [item.row for item in items] or np.zeros(
            (0, self._layout.steps.row_size), np.float32
        )
        return {
            "inner": self._inner.state_dict(),
            "plain": json.dumps(plain),
            "rows": np.array(rows, dtype=np.float32),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there, without the statistics of the pilot: the trainer has its result."""
        self._inner.load_state_dict(state["inner"])
        self._start()
        plain = json.loads(state["plain"])
        for (traj, step, attempt), row in zip(plain["held"], state["rows"], strict=True):
            self._held.setdefault(traj, {})[step] = Item(traj, step, row, attempt)
        self._made = {traj: set(made) for traj, made in plain["made"]}
        self._whole = set(plain.get("whole", []))  # an older checkpoint lists their windows
        self._n_items = plain["n_items"]
        self._pilot.close()
