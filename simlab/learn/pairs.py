"""Windows over time as items of their own: what one-step and rollout networks learn from.

A stream of steps u_0, u_1, ... becomes one of windows (u_k; u_{k+1}, ..., u_{k+m}). To the rest of
the training a window is an ordinary item of another schema, whose inputs are those of the first
and ``<field>_now``, whose outputs are ``<field>_next1`` to ``<field>_next<m>``, at the times t_k of
the windows. So every network, buffer and mode of training takes it as it is.

A window never holds steps of two attempts at a trajectory, whose last digits may differ; the few
that would are left out.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np

from simlab.core.errors import ConfigError
from simlab.learn.encoding import Encoding, Statistics
from simlab.learn.pilots import PilotStatistics
from simlab.learn.stream import Item, Stream
from simlab.store.schema import Schema

__all__ = ["PairedStream", "paired_schema"]


def paired_schema(schema: Schema, ahead: int) -> Schema:
    """Return the schema of windows of a step and the ``ahead`` steps after it.

    Raises
    ------
    ConfigError
        When trajectories are shorter than that.
    """
    if not 1 <= ahead < len(schema.times):
        raise ConfigError(
            f"windows of {ahead} steps ahead need trajectories of at least {ahead + 1} steps; "
            f"{schema.name!r} has {len(schema.times)}"
        )
    outputs = Encoding(schema).outputs
    now = [replace(spec, name=f"{spec.name}_now", role="input") for spec in outputs]
    later = [
        replace(spec, name=f"{spec.name}_next{k}") for k in range(1, ahead + 1) for spec in outputs
    ]
    return replace(
        schema,
        fields=(*schema.inputs, *now, *later),
        times=tuple(schema.times[:-ahead]),
        mesh=None,
    )


class PairedStream:
    """The windows of another stream, each (trajectory, first step) once per pass.

    Parameters
    ----------
    inner : Stream
        Steps of one trajectory may come in any order, mixed with others.
    ahead : int
        Steps after the first that a window holds.
    """

    def __init__(self, inner: Stream, ahead: int = 1) -> None:
        self._inner, self._ahead = inner, ahead
        self.schema = paired_schema(inner.schema, ahead)
        self._steps, self._encoding = Encoding(inner.schema), Encoding(self.schema)
        self.finished = inner.finished
        self._pilot = PilotStatistics(self._encoding)
        self._start()

    def _start(self) -> None:
        self._held: dict[int, dict[int, Item]] = {}
        self._made: dict[int, set[int]] = {}
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
        held = self._held.setdefault(item.traj, {})
        made = self._made.setdefault(item.traj, set())
        if any(other.attempt < item.attempt for other in held.values()):
            made.update(range(item.step))  # lost: they would mix two attempts
            held.clear()
        held[item.step] = item
        windows = []
        for start in self._starts(item.step):
            steps = range(start, start + self._ahead + 1)
            if start not in made and all(step in held for step in steps):
                made.add(start)
                row = self._window([held[step].row for step in steps])
                windows.append(Item(item.traj, start, row, item.attempt))
        for step in [step for step in held if made.issuperset(self._starts(step))]:
            del held[step]
        return windows

    def _starts(self, step: int) -> range:
        """Return where the windows that hold a step begin."""
        return range(max(0, step - self._ahead), min(step + 1, self._encoding.n_times))

    def _window(self, rows: list[np.ndarray]) -> np.ndarray:
        size = self._steps.condition_size
        start = size + self._steps.n_time
        time = rows[0][size : size + self._encoding.n_time]
        later = [row[start:] for row in rows[1:]]
        return np.concatenate([rows[0][:size], rows[0][start:], time, *later])

    @property
    def is_exhausted(self) -> bool:
        """Whether this pass has delivered everything there will ever be."""
        return self._inner.is_exhausted

    @property
    def n_items(self) -> int:
        """Windows delivered in this pass."""
        return self._n_items

    def rewind(self) -> None:
        """Begin another pass."""
        self._inner.rewind()
        self._start()

    def ids(self) -> np.ndarray:
        """Return the trajectories there are or will be, int64, sorted."""
        return self._inner.ids()

    def is_over(self, traj: int) -> bool:
        """Whether this pass has delivered all of a trajectory there will ever be."""
        return self._inner.is_over(traj)

    def row(self, traj: int, step: int) -> np.ndarray:
        """Return a window that was delivered before once more, shape (row_size,)."""
        steps = range(step, step + self._ahead + 1)
        return self._window([self._inner.row(traj, k) for k in steps])

    def pilot(self, n: int, now: bool = False) -> Statistics | None:
        """Return the statistics of the first ``n`` trajectories by id all of whose windows came."""
        return self._pilot.take(n, now, self.ids().tolist(), self.is_over)

    def state_dict(self) -> dict[str, Any]:
        """Return the inner stream's state and the steps that wait for later ones."""
        items = [item for held in self._held.values() for item in held.values()]
        plain = {
            "held": [[item.traj, item.step, item.attempt] for item in items],
            "made": [[traj, sorted(made)] for traj, made in self._made.items()],
            "n_items": self._n_items,
        }
        rows = [item.row for item in items] or np.zeros((0, self._steps.row_size), np.float32)
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
        self._n_items = plain["n_items"]
        self._pilot.close()
