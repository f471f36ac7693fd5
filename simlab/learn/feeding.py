"""From a stream to batches: what enters the buffer, when, and when a batch may be drawn.

    Feed         as items arrive, or in a fixed order (deterministic): then every batch is preceded
                 by so many new items, and by nothing before they are there
    ReplayFeed   as a log of arrivals says, each item read back from where it was committed

Both hold all that decides which rows come in which batch, and say so in their state.
"""

from __future__ import annotations

import json
import logging
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np

from simlab.core.errors import StoreError
from simlab.learn.arrivals import ArrivalLog, read_arrivals
from simlab.learn.buffers import Buffer
from simlab.learn.encoding import Normaliser, Statistics
from simlab.learn.lookup import Committed
from simlab.learn.model import Model
from simlab.learn.ordered import OrderedStream
from simlab.learn.ranks import Ranks, ShareStream
from simlab.learn.settings import TrainSettings
from simlab.learn.stream import Item, Stream

__all__ = ["Feed", "ReplayFeed"]

log = logging.getLogger("simlab.train")


class Feed:
    """Polls a stream, fills the buffer and draws batches.

    Attributes
    ----------
    has_ended : bool
        Whether the stream has delivered everything at least once.
    is_scaled : bool
        Whether the normalisation is fixed; no batch comes before.
    pilot : Statistics, optional
        What it is to be made of, as soon as that is known.
    is_over : bool
        Whether no batch will ever come again.
    """

    is_over = False

    def __init__(
        self,
        settings: TrainSettings,
        model: Model,
        buffer: Buffer,
        stream: Stream,
        arrivals: Path | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self._settings, self._model, self._buffer = settings, model, buffer
        ranks = ranks or Ranks()
        stream = ShareStream(stream, ranks) if ranks.size > 1 else stream
        self._is_ordered = settings.mode == "deterministic"
        self._n_pilot = settings.pilot
        if self._is_ordered:  # each rank gathers those of its share
            self._n_pilot = -(-settings.pilot // ranks.size)
        self._stream = OrderedStream(stream, settings.lanes) if self._is_ordered else stream
        self._at_most = max(64, 4 * settings.batch)
        if self._is_ordered:
            self._at_most = settings.fresh or settings.batch
        self._pending: deque[Item] = deque()
        self.is_scaled = self.has_ended = self._is_starved = False
        self.pilot: Statistics | None = None
        self._log = ArrivalLog(arrivals)
        self._n_finished = 0
        encoding = model.encoding
        finished = self._stream.finished
        buffer.draw_from(Committed(finished, encoding.n_times, self._stream.row, encoding.row_size))

    def advance(self) -> bool:
        """Move items from the stream to the buffer; return whether there were any."""
        stream = self._stream
        has_news, self._is_starved = bool(self._pending), False
        self._put_pending()
        waits_for_pilot = not self.is_scaled and len(self._pending) < self._buffer.capacity
        if (not self._pending or waits_for_pilot) and not stream.is_exhausted:
            items = stream.poll(self._at_most)
            has_news |= bool(items)
            self._is_starved = self._is_ordered and not items and not stream.is_exhausted
            self._include(items)
            self._pending.extend(items)
            self._note_finished()
            self._put_pending()
        if not self.is_scaled and self.pilot is None:
            is_full = bool(self._pending) and not waits_for_pilot
            self._take_pilot(now=is_full or stream.is_exhausted)
        if stream.is_exhausted and not self._pending:
            self._end_pass()
        return has_news

    def rows(self, n: int) -> np.ndarray | None:
        """Return a batch of at most ``n`` rows, or None when data have to arrive first."""
        if not self.is_scaled or self._is_starved:
            return None
        if not self.has_ended and self._is_ahead():
            return None
        return self._buffer.get(n)

    def _is_ahead(self) -> bool:
        """Return whether more was drawn already than what has arrived allows."""
        settings, put, got = self._settings, self._buffer.n_put, self._buffer.n_got
        if got >= settings.max_repeats * max(put, 1):
            return True
        if self._is_ordered or self._pending:  # a buffer that refuses more cannot wait for more
            return False
        return put * settings.batch < settings.fresh * (got + settings.batch)

    def rate(self, planned: float) -> float:
        """Return the learning rate of the batch just drawn; the planned one, and note it."""
        self._log.note(f"b {planned!r}")
        return planned

    def _include(self, items: list[Item]) -> None:
        encoding = self._model.encoding
        for item in items:
            if item.step == 0:
                condition = item.row[: encoding.condition_size]
                self._model.ranges.include(encoding.features(condition))

    def _put_pending(self) -> None:
        while self._pending:
            item = self._pending[0]
            if not self._buffer.put(item.row, item.step, item.traj):
                break
            self._pending.popleft()
            self._log.note(f"p {item.traj} {item.step}")

    def _note_finished(self) -> None:
        finished = self._stream.finished
        for traj in finished[self._n_finished :]:
            self._log.note(f"f {traj}")
        self._n_finished = len(finished)

    def scale(self, statistics: Statistics) -> None:
        """Fix the normalisation."""
        names = np.array(self._model.encoding.columns)
        if bad := dict.fromkeys(names[~np.isfinite(statistics.total)].tolist()):
            raise StoreError(
                f"{', '.join(bad)}: among the first {self._settings.pilot} training trajectories "
                "are values that are no finite float32 numbers, so nothing can be learned"
            )
        normaliser = Normaliser.fit(statistics)
        self._model.network.normalise(normaliser, self._model.encoding)
        self.is_scaled = True
        scales = {"mean": normaliser.mean.tolist(), "std": normaliser.std.tolist()}
        self._log.note(f"s {json.dumps(scales)}")

    def _take_pilot(self, now: bool) -> None:
        self.pilot = self._stream.pilot(self._n_pilot, now)
        if self.pilot is None:
            if self._stream.is_exhausted:
                self._refuse_empty()
            return
        if now and not self._stream.is_exhausted:
            log.warning(
                "the first %d training trajectories are not complete while the buffer is full: "
                "normalised with what there is; raise train.buffer.capacity or lower train.pilot",
                self._settings.pilot,
            )

    def _end_pass(self) -> None:
        """Go on after the stream's end: with all it had, if that is in the buffer, or once more."""
        if not self._stream.n_items:
            self._refuse_empty()
        self.has_ended = True
        if self._buffer.retains(self._stream.n_items):
            if not self._buffer.is_finished:
                self._buffer.finish()
                self._log.note("e")
        else:
            self._stream.rewind()

    def _refuse_empty(self) -> None:
        raise StoreError(
            "there are no finished training trajectories to learn from; generate some, or look at "
            "why they failed with `simlab store status`"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the stream's position and what was polled and not put yet."""
        self._log.flush()
        pending = [item.row for item in self._pending]
        size = self._model.encoding.row_size
        return {
            "stream": self._stream.state_dict(),
            "pending": np.stack(pending) if pending else np.zeros((0, size), np.float32),
            "pending_ids": [[item.traj, item.step, item.attempt] for item in self._pending],
            "has_ended": self.has_ended,
            "is_scaled": self.is_scaled,
            "arrivals": self._log.size,
            "n_finished": self._n_finished,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._stream.load_state_dict(state["stream"])
        self._pending = deque(
            Item(traj, step, row, attempt)
            for (traj, step, attempt), row in zip(
                state["pending_ids"], state["pending"], strict=True
            )
        )
        self.has_ended, self.is_scaled = state["has_ended"], state["is_scaled"]
        self._log.size = state["arrivals"]
        self._n_finished = state["n_finished"]


class ReplayFeed:
    """Feeds what a log of arrivals says, in its order; attributes as for :class:`Feed`."""

    is_scaled = True
    pilot = None

    def __init__(self, model: Model, buffer: Buffer, stream: Stream, arrivals: Path) -> None:
        stream.skip_pilot()
        self._path = arrivals
        self._model, self._buffer, self._stream = model, buffer, stream
        self._offset = 0
        self._lines = read_arrivals(self._path)
        self._finished: list[int] = []
        self._rate, self._has_begun = 0.0, False
        self.has_ended = self.is_over = False
        encoding = model.encoding
        buffer.draw_from(Committed(self._finished, encoding.n_times, stream.row, encoding.row_size))

    def advance(self) -> bool:
        """Do what the log says up to the next batch; return whether there is one."""
        for kind, rest, offset in self._lines:
            self._offset = offset
            if kind == "b":
                self._rate, self._has_begun = float(rest), True
                return True
            if kind == "p":
                self._put(*map(int, rest.split()))
            elif kind == "f":
                self._finished.append(int(rest))
            elif kind == "s":
                scales = {name: np.array(values) for name, values in json.loads(rest).items()}
                self._model.network.normalise(Normaliser(**scales), self._model.encoding)
            elif kind == "e":
                self.has_ended = True
                self._buffer.finish()
            else:
                raise StoreError(f"{self._path}: a line of unknown kind {kind!r}")
        if not self._has_begun:
            raise StoreError(
                f"{self._path}: no batch is in this log, so there is nothing to replay"
            )
        self.is_over = True
        return False

    def _put(self, traj: int, step: int) -> None:
        row, encoding = self._stream.row(traj, step), self._model.encoding
        if step == 0:
            self._model.ranges.include(encoding.features(row[: encoding.condition_size]))
        if not self._buffer.put(row, step, traj):
            raise StoreError(
                f"{self._path}: the buffer refuses step {step} of trajectory {traj}; the log is of "
                "a training with another train.buffer, train.seed or train.batch"
            )

    def rows(self, n: int) -> np.ndarray | None:
        """Return the batch the log speaks of."""
        if self.is_over:
            return None
        rows = self._buffer.get(n)
        if rows is None:
            raise StoreError(
                f"{self._path}: there is no batch where the log has one; it is of a training with "
                "another train.buffer, train.seed or train.batch"
            )
        return rows

    def scale(self, statistics: Statistics) -> None:
        """Do nothing: the log holds the normalisation."""

    def rate(self, planned: float) -> float:
        """Return the learning rate the log has for the batch just drawn."""
        return self._rate

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the log."""
        return {
            "offset": self._offset,
            "finished": list(self._finished),
            "has_ended": self.has_ended,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._offset, self._has_begun = state["offset"], True
        self._finished[:] = state["finished"]
        self._lines = read_arrivals(self._path, self._offset)
        self.has_ended = state["has_ended"]
