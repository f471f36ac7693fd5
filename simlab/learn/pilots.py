"""Statistics of the first trajectories, gathered while their items pass by."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from simlab.learn.encoding import Encoding, Statistics

__all__ = ["PilotStatistics"]


class PilotStatistics:
    """Sums by trajectory, until those of the first ones are taken.

    Parameters
    ----------
    encoding : Encoding
        Of the rows; a trajectory is whole with ``encoding.n_times`` of them.
    """

    def __init__(self, encoding: Encoding) -> None:
        self._encoding = encoding
        self._parts: dict[int, list[Statistics]] = {}
        self._counts: dict[int, int] = {}
        self.is_taken = False

    def add(self, traj: int, row: np.ndarray) -> None:
        """Take in a row, unless the statistics were taken."""
        if self.is_taken:
            return
        new = Statistics.of(self._encoding, row[None])
        old = self._parts.get(traj, [])
        self._parts[traj] = [Statistics.merged([*old, new])]
        self._counts[traj] = self._counts.get(traj, 0) + 1

    def take(
        self, n: int, now: bool, ids: Sequence[int], is_over: Callable[[int], bool]
    ) -> Statistics | None:
        """Return the sums of the first ``n`` trajectories that came whole; None while open.

        With ``now`` those that are whole; where there is not one but more is to come, all items.
        """
        if self.is_taken:
            raise RuntimeError("the pilot was taken already")
        whole: list[Statistics] = []
        for traj in ids:
            if self._counts.get(traj, 0) == self._encoding.n_times:
                whole += self._parts[traj]
            elif not now and not is_over(traj):
                return None
            if len(whole) == n:
                break
        if now and not whole and not all(map(is_over, ids)):
            whole = [part for parts in self._parts.values() for part in parts]
        if not whole:
            return None
        self.close()
        return Statistics.merged(whole)

    def close(self) -> None:
        """Gather no more."""
        self.is_taken = True
        self._parts.clear()
        self._counts.clear()
