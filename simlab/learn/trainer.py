"""The training loop: poll the stream, put into the buffer, get a batch, step. One thread.

    until the budget is used:
        poll items, put them until the buffer refuses      (the stream waits, nothing is lost)
        once the pilot is complete: fix the normalisation
        get a batch, or wait for data
        loss, gradient, AdamW step, learning rate from the share of the budget used

On several ranks nobody takes a step until all have a batch (:mod:`simlab.learn.ranks`).

When the stream is exhausted and budget is left, training goes on: with what the buffer holds when
that is everything, with another pass over the stream otherwise.

The checkpoint (weights, optimiser, buffer, stream position, generators, batch) is the only
acknowledgement there is. For a stream whose order does not depend on time, a run that was stopped
and resumed equals one that was not, bit for bit, at the same number of threads. What enters the
buffer and when is decided, and logged, by :mod:`simlab.learn.feeding`.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from simlab.core.config import as_table, build, differences
from simlab.core.errors import ConfigError, ConvergenceError, StoreError
from simlab.core.progress import Progress
from simlab.core.samples import Trajectory
from simlab.learn import checkpoints
from simlab.learn.active import ActiveSampling
from simlab.learn.average import Average
from simlab.learn.encoding import Ranges
from simlab.learn.feeding import Feed, ReplayFeed
from simlab.learn.model import Model
from simlab.learn.monitor import Monitor
from simlab.learn.pairs import PairedStream
from simlab.learn.ranks import Ranks
from simlab.learn.settings import TrainSettings
from simlab.learn.stream import Stream
from simlab.learn.validator import Report, Validator
from simlab.store.schema import Schema

__all__ = ["ARRIVALS", "Trainer", "shown_by"]

log = logging.getLogger("simlab.train")

ARRIVALS = "arrivals.log"
_CHECKPOINTS = "checkpoints"
_SPREAD = 104729
_IDLE_SECONDS = 0.01
_DEAR_SECONDS = 20.0  # of validations to come: several times what it costs to start a process
_BRIEF_SECONDS = 1.0  # that the first validation may take to find out how long one takes
_PART = 8  # of a validation set is one that tells whether it will take longer
Observer = Callable[..., Any]


def shown_by(progress: Progress) -> Observer:
    """Return an observer that moves a progress bar."""

    def show(kind: str, **values: Any) -> None:
        if kind == "train":
            progress.update(values["batch"], f"loss {values['loss']:.2e}")

    return show


class Trainer:
    """Owns model, optimiser, buffer and generators of one training.

    Parameters
    ----------
    settings : TrainSettings
    schema : Schema
        Of the data.
    directory : str or Path, optional
        Where the model and, below ``checkpoints/``, the checkpoints go; nowhere when left out.
    observers : sequence of callable
        Each is called as ``observer(kind, **values)`` with ``kind`` "train" or "validation":
        :meth:`simlab.core.runs.RunDirectory.log_metric` is one, a progress bar another.
    solver_ranks : int
        Solver processes on this machine, whose cores are left alone until the stream is exhausted.
    ranks : Ranks, optional
        The processes that train together, each calling every method with the same arguments;
        metrics, validation and the model are those of rank 0.
    active : ActiveSampling, optional
        Weights the losses of items, and is told of them.

    Examples
    --------
    >>> trainer = Trainer(TrainSettings(n_batches=500), schema)        # doctest: +SKIP
    >>> model = trainer.run(MemoryStream(trajectories, schema, 7))     # doctest: +SKIP
    """

    def __init__(
        self,
        settings: TrainSettings,
        schema: Schema,
        directory: str | Path | None = None,
        *,
        observers: Sequence[Observer] = (),
        solver_ranks: int = 0,
        ranks: Ranks | None = None,
        active: ActiveSampling | None = None,
    ) -> None:
        size = 1 if ranks is None else ranks.size
        if settings.ranks not in (1, size):
            raise ConfigError(
                f"ranks: {settings.ranks} processes of the trainer are started by `simlab train` "
                "and `simlab run`; here leave it at 1, start your script with torchrun and pass "
                "ranks=Ranks.join()"
            )
        self.settings, self.schema = settings, schema
        self.directory = None if directory is None else Path(directory)
        self.model = Model(settings, schema)
        self.ranks = ranks or Ranks()
        seed = settings.seed + _SPREAD * self.ranks.rank
        self.buffer = settings.buffer.build(self.model.encoding.row_size, seed)
        self.batch = 0
        self._optimizer = torch.optim.AdamW(
            self.model.network.parameters(),
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
        )
        self._observers, self._solver_ranks = tuple(observers), solver_ranks
        self._active = active
        self._channels = self.model.encoding.field_channels()
        self._average = Average(self.model.network, settings.ema) if settings.ema else None
        self._given: Stream | None = None
        self._stream: Stream | None = None
        self._feed: Feed | ReplayFeed | None = None
        self._drawn: np.ndarray | None = None
        self._elapsed = self._waited = 0.0
        self._monitor = Monitor(self.model.encoding, self.buffer)
        self._validator: Validator | None = None
        self._validation_seconds = 0.0

    @property
    def is_done(self) -> bool:
        """Whether the budget is used up, or the log that is replayed at its end."""
        return self._share >= 1.0 or (self._feed is not None and self._feed.is_over)

    @property
    def _share(self) -> float:
        spent = self.batch / self.settings.n_batches
        if self.settings.max_seconds is not None and self.settings.mode == "live":
            spent = max(spent, self._elapsed / self.settings.max_seconds)
        return spent

    def run(
        self,
        stream: Stream,
        validation: Sequence[Trajectory] = (),
        stop: Callable[[], bool] = lambda: False,
    ) -> Model:
        """Train until the budget is used up or ``stop()`` is true, and return the model.

        Parameters
        ----------
        stream : Stream
            Of steps; with ``train.ahead`` its windows are trained on.
        validation : sequence of Trajectory
            Made beforehand, never streamed; its errors are reported every ``validate_every``
            batches and become the model's own estimate of its error. It is pickled when a process
            of its own is to validate.
        stop : callable
            Asked before every batch. A stopped run leaves a checkpoint and no finished model.
        """
        try:
            return self._run(stream, validation, stop)
        finally:
            if self._validator is not None:
                self._validator.close()
                self._validator = None

    def _run(
        self, stream: Stream, validation: Sequence[Trajectory], stop: Callable[[], bool]
    ) -> Model:
        feed, ranks = self._feed_from(stream), self.ranks
        self._set_threads()
        saved = time.monotonic()
        while not ranks.any(self.is_done or stop()):
            begun = time.monotonic()
            self._collect()
            has_news = self._fill(feed)
            rows = self._drawn
            if ranks.any(rows is None) or rows is None:
                if not has_news and not feed.is_over:
                    time.sleep(_IDLE_SECONDS)
                self._count_time(begun, waiting=True)
                continue
            self._drawn = None
            loss = self.step(rows)
            self._evolve()
            self._count_time(begun)
            self._observe(loss)
            if self.batch % self.settings.validate_every == 0 and not self.is_done:
                self._validate(validation)
            if ranks.any(time.monotonic() - saved > self.settings.checkpoint_seconds):
                self._try_checkpoint()
                saved = time.monotonic()
        if self.is_done:
            self._try_checkpoint()
        else:
            self.checkpoint()
        if ranks.any(self.is_done):
            self._finish(validation)
        return self.model

    def _fill(self, feed: Feed | ReplayFeed) -> bool:
        """Have a batch drawn if there can be one; return whether anything new arrived."""
        if self._drawn is not None:
            return False
        had_ended = feed.has_ended
        has_news = feed.advance()
        if feed.has_ended != had_ended:
            self._set_threads()
        if not feed.is_scaled and not self.ranks.any(feed.pilot is None):
            assert feed.pilot is not None
            feed.scale(self.ranks.merged(feed.pilot))
        self._drawn = feed.rows(self.settings.batch)
        return has_news

    def _finish(self, validation: Sequence[Trajectory]) -> None:
        ranges = self.model.ranges
        ranges.lower = -self.ranks.largest(-ranges.lower)
        ranges.upper = self.ranks.largest(ranges.upper)
        if self._average is not None:
            self._average.place()
        self._validate(validation, last=True)
        if self.directory is not None and self.ranks.rank == 0:
            self.model.save(self.directory)
        self.ranks.wait()
        log.info("training done: %d batches in %.1f s", self.batch, self._elapsed)

    def step(self, rows: np.ndarray) -> float:
        """Take one optimiser step on rows of shape (B, row_size) and return the loss before it."""
        settings, network = self.settings, self.model.network
        network.train()
        share = self._share
        if settings.max_seconds is not None:
            share = float(self.ranks.largest(np.array([share]))[0])
        rate = settings.learning_rate_at(share)
        if self._feed is not None:
            rate = self._feed.rate(rate)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.zero_grad(set_to_none=True)
        *inputs, truth = (
            torch.from_numpy(np.ascontiguousarray(part)) for part in self.model.encoding.split(rows)
        )
        network.observe(inputs[1], truth)
        losses = self._losses(network(*inputs), truth)
        loss = losses.mean() if self._active is None else self._weighted(losses)
        loss.backward()
        value = self.ranks.average(network.parameters(), float(loss.detach()))
        if not math.isfinite(value):
            self._refuse_bad(rows)
            raise ConvergenceError(
                f"training diverged: loss {value} at batch {self.batch}; lower "
                f"train.learning_rate = {settings.learning_rate:g}"
            )
        self._optimizer.step()
        self.batch += 1
        if self._average is not None:
            self._average.update(self.batch)
        return value

    def _refuse_bad(self, rows: np.ndarray) -> None:
        """Raise when it is the data, not the training."""
        bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
        if len(bad) and len(self.buffer.drawn) == len(rows):
            traj, step = self.buffer.drawn[bad[0]].tolist()
            raise StoreError(
                f"step {step} of trajectory {traj} holds values that are no finite float32 "
                "numbers, so nothing can be learned from it"
            )

    def _losses(self, made: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        """Return the loss of every item, shape (B,)."""
        scale = self.model.network.scale_of(truth)
        if self.settings.loss == "mse":
            return torch.square((made - truth) / scale).flatten(1).mean(dim=1)
        parts = []
        for channels in self._channels:
            error = (made[:, channels] - truth[:, channels]).flatten(1).norm(dim=1)
            values = truth[:, channels].flatten(1)
            floor = 0.01 * scale[channels].square().mean().sqrt() * math.sqrt(values.shape[1])
            parts.append(error / torch.maximum(values.norm(dim=1), floor))
        return torch.stack(parts).mean(dim=0)

    def _weighted(self, losses: torch.Tensor) -> torch.Tensor:
        """Return the loss that active sampling wants, and tell it of the items'. Collective."""
        active, items = self._active, self.buffer.drawn
        assert active is not None
        weights = active.weights(items)
        found = np.column_stack([items, losses.detach().numpy()])
        found = self.ranks.gathered(found, self.settings.batch)
        active.note(found[:, :2].astype(np.int64), found[:, 2])
        if weights is None:
            return losses.mean()
        return (losses * torch.from_numpy(weights).to(losses.dtype)).mean()

    def _evolve(self) -> None:
        """Have a new generation made when it is time."""
        if self._active is None or self._given is None or self.ranks.rank:
            return
        made = self._active.evolve(len(self._given.finished))
        if made is not None:
            self._tell("sampling", batch=self.batch, **made)

    def _feed_from(self, stream: Stream) -> Feed | ReplayFeed:
        """Return what turns a stream into batches, made at its first use."""
        if self._feed is None or self._given is not stream:
            self._given = stream
            if self.settings.ahead:
                stream = PairedStream(stream, self.settings.ahead)
            self._stream = stream
            if self.settings.arrivals is not None:
                path = self._own(Path(self.settings.arrivals))
                self._feed = ReplayFeed(self.model, self.buffer, stream, path)
            else:
                arrivals = self.directory and self._own(self.directory / ARRIVALS)
                self._feed = Feed(
                    self.settings, self.model, self.buffer, stream, arrivals, self.ranks
                )
        return self._feed

    def _own(self, path: Path) -> Path:
        """Return the name a file of this rank has; rank 0 has the name itself."""
        rank = self.ranks.rank
        return path.with_name(f"{path.stem}-{rank}{path.suffix}") if rank else path

    def _set_threads(self) -> None:
        cores = len(os.sched_getaffinity(0))
        n, has_ended = self.settings.threads, self._feed is not None and self._feed.has_ended
        if not n:
            n = cores if has_ended else cores - self._solver_ranks
            n = max(1, n // self.ranks.size)
        if n != torch.get_num_threads():
            torch.set_num_threads(n)
            why = ": the stream has ended, its cores are free" if has_ended else ""
            log.info("training on %d of %d cores%s", n, cores, why)

    def _count_time(self, begun: float, waiting: bool = False) -> None:
        spent = time.monotonic() - begun
        if self.batch:
            self._elapsed += spent
            self._waited += spent if waiting else 0.0

    def _observe(self, loss: float) -> None:
        self._monitor.add(loss)
        if self.batch % self.settings.log_every and not self.is_done:
            return
        values = self._monitor.report(self._elapsed) | {
            "batch": self.batch,
            "learning_rate": self._optimizer.param_groups[0]["lr"],
            "wait_s": self._waited,
            "train_s": self._elapsed,
            "threads": torch.get_num_threads(),
        }
        if self._active is not None:
            values["sampling"] = self._active.report()
        self._tell("train", **values)

    def _validate(self, validation: Sequence[Trajectory], last: bool = False) -> None:
        """Validate the weights after this batch, or have it done; the last one is waited for."""
        if not len(validation) or self.ranks.rank:
            return
        if self._validator is None and self._wants_process(validation):
            self._validator = Validator(self.settings, self.schema, validation)
        average, validator = self._average, self._validator
        with nullcontext() if average is None else average.in_place():
            if validator is not None and not validator.failure:
                threads = torch.get_num_threads() if last else 1
                validator.submit(self.batch, self.model.tensors(), threads)
            if validator is not None and last:
                self._tell_of(validator.finish())
            is_told = validator is not None and not validator.failure
            if not is_told:
                errors, self._validation_seconds = self._timed(validation)
                self._tell("validation", batch=self.batch, **errors)

    def _timed(self, validation: Sequence[Trajectory]) -> tuple[dict[str, Any], float]:
        """Return the errors, and the seconds it took to find them."""
        begun = time.monotonic()
        return self.model.validate(validation), time.monotonic() - begun

    def _wants_process(self, validation: Sequence[Trajectory]) -> bool:
        """Whether validations are to be made elsewhere: as asked, or because they are dear.

        How long one takes is known from those made here, and before the first from a part of it.
        """
        if self.settings.validator != "auto":
            return self.settings.validator == "process"
        share, seconds = self._share, self._validation_seconds
        n_left = self.batch / self.settings.validate_every * (1.0 - share) / share
        if n_left and not seconds:
            part = validation[: -(-len(validation) // _PART)]
            seconds = self._timed(part)[1] * len(validation) / len(part)
            seconds = seconds if seconds > _BRIEF_SECONDS else 0.0
        return n_left * seconds > _DEAR_SECONDS

    def _collect(self) -> None:
        """Pass on what another process has found by now."""
        if self._validator is not None:
            self._tell_of(self._validator.collect())

    def _tell_of(self, reports: Sequence[Report]) -> None:
        for report in reports:
            self.model.validation, self.model.one_step = report.validation, report.one_step
            self._tell("validation", batch=report.batch, **report.errors)

    def _tell(self, kind: str, **values: Any) -> None:
        for observer in self._observers if self.ranks.rank == 0 else ():
            observer(kind, **values)

    def checkpoint(self) -> Path | None:
        """Write a checkpoint; nothing before the first batch or without a directory.

        Nor after the end of a training with averaged weights: the last one holds the others.
        Collective; that of rank 0, written last, makes the others count.

        Raises
        ------
        StoreError
            When it cannot be written.
        """
        if self.directory is None or self._feed is None or not self.batch:
            return None
        if self._average is not None and self._average.is_placed:
            return None
        state = {
            "settings": json.dumps(as_table(self.settings)),
            "schema": json.dumps(self.schema.to_json()),
            "network": self.model.tensors(),
            "optimizer": self._optimizer.state_dict(),
            "buffer": self.buffer.state_dict(checkpoints.recall(self._stream, is_final=True)),
            "average": None if self._average is None else self._average.tensors(),
            "feed": self._feed.state_dict(),
            "drawn": self._drawn,
            "ranges": {"lower": self.model.ranges.lower, "upper": self.model.ranges.upper},
            "torch_rng": torch.get_rng_state(),
            "batch": self.batch,
            "times": [self._elapsed, self._waited],
            "monitor": self._monitor.state_dict(),
            "active": None if self._active is None else self._active.state_dict(),
        }
        folder = self._own(self.directory / _CHECKPOINTS)
        written, fault = None, None
        if self.ranks.rank:
            try:
                written = checkpoints.write(folder, self.batch, state)
            except StoreError as error:
                fault = error
        if self.ranks.any(fault is not None):
            raise fault or StoreError("another training process cannot write its checkpoint")
        return written or checkpoints.write(folder, self.batch, state)

    def _try_checkpoint(self) -> None:
        """Write a checkpoint; on a disk that is full training goes on without."""
        try:
            self.checkpoint()
        except StoreError as error:
            log.warning("%s; training goes on without it", error)

    def resume(self, stream: Stream) -> bool:
        """Go back to the newest checkpoint, stream included; return False when there is none.

        Raises
        ------
        ConfigError
            When settings or schema are not those of the checkpoint.
        """
        if self.directory is None:
            return False
        state = self._newest(self.directory)
        if state is None:
            return False
        settled = build(TrainSettings, json.loads(state["settings"]))  # older ones lack keys
        changed = differences(as_table(settled), as_table(self.settings), "train")
        here = json.loads(json.dumps(self.schema.to_json()))
        changed += differences(json.loads(state["schema"]), here, "schema")
        if changed:
            raise ConfigError(
                [f"{line}: changed since the checkpoint was made" for line in changed],
                str(self.directory),
            )
        self.model.load_tensors(state["network"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._feed_from(stream)
        self.buffer.load_state_dict(state["buffer"], checkpoints.recall(stream))
        if self._average is not None:
            self._average.load(state["average"])
        self._feed_from(stream).load_state_dict(state["feed"])
        self._drawn = state["drawn"]
        self.model.ranges = Ranges(state["ranges"]["lower"], state["ranges"]["upper"])
        torch.set_rng_state(state["torch_rng"])
        self.batch = state["batch"]
        self._elapsed, self._waited = state["times"]
        self._monitor.load_state_dict(state["monitor"])
        if self._active is not None and state.get("active") is not None:
            self._active.load_state_dict(state["active"])
        log.info("resumed at batch %d of %d", self.batch, self.settings.n_batches)
        return True

    def _newest(self, directory: Path) -> dict[str, Any] | None:
        """Return this rank's part of rank 0's newest checkpoint. Collective."""
        ranks, state = self.ranks, None
        if ranks.rank == 0:
            state = checkpoints.newest(directory / _CHECKPOINTS)
        batch = int(ranks.largest(np.array([state["batch"] if state else -1]))[0])
        if ranks.rank and batch >= 0:
            state = checkpoints.newest(self._own(directory / _CHECKPOINTS), batch)
        if ranks.any(batch >= 0 and state is None):
            raise StoreError(
                f"{directory}: a rank has no checkpoint of batch {batch}; resume on as many ranks "
                "as there were, or begin afresh"
            )
        return state
