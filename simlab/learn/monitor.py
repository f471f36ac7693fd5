"""What a training says of itself while it runs: losses, rates, and what the buffer is made of."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from simlab.learn.buffers import Buffer
from simlab.learn.encoding import Encoding

__all__ = ["Monitor"]

log = logging.getLogger("simlab.train")

_LEAST_SPREAD = 0.5


class Monitor:
    """Collects losses and counts between two lines of metrics.

    Parameters
    ----------
    encoding : Encoding
        Of the rows in the buffer.
    buffer : Buffer
    """

    def __init__(self, encoding: Encoding, buffer: Buffer) -> None:
        self._encoding, self._buffer = encoding, buffer
        self._losses: list[float] = []
        self._last = (0.0, 0, 0)
        self._has_warned = False

    def add(self, loss: float) -> None:
        """Take in the loss of a batch."""
        self._losses.append(loss)

    def report(self, seconds: float) -> dict[str, Any]:
        """Return the values of a line, ``seconds`` after the first batch, and start the next one.

        ``buffer`` is :meth:`simlab.learn.buffers.Buffer.state` and ``contents``: mean and standard
        deviation over the items held, of every parameter and of ``time``.
        """
        buffer, n_batches = self._buffer, max(len(self._losses), 1)
        since, put, got = self._last
        self._last = (seconds, buffer.n_put, buffer.n_got)
        passed = max(seconds - since, 1e-9)
        values = {
            "loss": float(np.mean(self._losses)),
            "samples_per_s": (buffer.n_got - got) / passed,
            "put_per_s": (buffer.n_put - put) / passed,
            "new_per_batch": (buffer.n_put - put) / n_batches,
            "buffer": buffer.state() | {"contents": self.contents()},
        }
        self._losses.clear()
        return values

    def contents(self) -> dict[str, list[float]]:
        """Return [mean, standard deviation] over the items held; empty when there are none."""
        encoding = self._encoding
        names = dict(zip(encoding.names, range(encoding.n_parameters), strict=True))
        if encoding.n_time:
            names["time"] = encoding.condition_size
        if not len(self._buffer) or not names:
            return {}
        columns = self._buffer.columns(list(names.values())).astype(np.float64)
        mean, std = columns.mean(axis=0), columns.std(axis=0)
        self._look_at_time(float(std[-1]))
        pairs = np.stack([mean, std], axis=1).tolist()
        return dict(zip(names, pairs, strict=True))

    def _look_at_time(self, spread: float) -> None:
        """Warn once when a well filled buffer holds one time only, as solvers in step make it."""
        if self._has_warned or self._encoding.n_times < 3:
            return
        uniform = float(np.std(self._encoding.schema.times))
        if 2 * len(self._buffer) >= self._buffer.capacity and spread < _LEAST_SPREAD * uniform:
            self._has_warned = True
            log.warning(
                "the times in the buffer spread by %.2g, those of a whole trajectory by %.2g: what "
                "is trained on is one time after the other; raise train.buffer.capacity, or let "
                "the solvers start one after the other",
                spread,
                uniform,
            )

    def state_dict(self) -> dict[str, Any]:
        """Return losses and counts of the line under way."""
        return {"losses": list(self._losses), "last": list(self._last)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._losses = list(state["losses"])
        seconds, put, got = state["last"]
        self._last = (seconds, int(put), int(got))
