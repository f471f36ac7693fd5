"""The ``[train]`` table. Imports no torch, so that reading a case stays quick."""

from __future__ import annotations

from math import cos, pi
from typing import Annotated, Literal

from pydantic import Field

from simlab.core.config import settings
from simlab.core.errors import ConfigError
from simlab.learn.buffers import BufferSettings, buffers
from simlab.learn.operators import Operator, operators

__all__ = ["TrainSettings"]


@settings
class TrainSettings:
    """What is trained, on what, for how long.

    Attributes
    ----------
    operator, buffer : kind or table
        The network, and the buffer between the stream of samples and the training loop.
    ahead : int
        0: the network gives the state at any time from the sample. m: it gives the next m stored
        states from the one before them, and predicts a trajectory by going on from its own answer.
    n_batches, max_seconds : int, float
        The budget: training ends when either is used up. The learning rate follows the share used,
        so that it has come down by then. Seconds count from the first batch, waiting included.
    batch : int
        Items per batch.
    learning_rate, weight_decay : float
        Of AdamW. The first 5 % of the budget warm up linearly.
    schedule : {"cosine", "halving", "constant"}
        Down to 0 along half a cosine; halved at 1/4, 1/2, 3/4 of the budget; or as it is.
    loss : {"relative_l2", "mse"}
        Mean over items and fields of ||prediction - u|| / ||u||; or mean square of the normalised
        error.
    ema : float
        Decay per batch of a running average of the weights, which is then what is validated, saved
        and returned; shorter at the start. 0: the weights themselves.
    mode : {"live", "deterministic", "replay"}
        Items in the order of their arrival; or in turn from ``lanes`` trajectories, each batch
        after ``fresh`` new ones, so that the weights do not depend on how fast anybody is; or as
        the file ``arrivals``, left by a training beside its model, says.
    lanes : int
        Trajectories in turn, for deterministic training.
    arrivals : str, optional
        For replay: all other settings must be those of the training that left the file.
    fresh : int
        New items for every batch, while there are any to come: live training waits for them, as
        long as the buffer has room; deterministic training takes so many and no more. 0: live
        training does not wait, deterministic training takes as many as a batch has rows.
    max_repeats : float
        While samples still arrive, training waits rather than draw each of those that are there
        more often than this on average.
    pilot : int
        Trajectories whose statistics fix the normalisation: the first training ids.
    seed : int
        Of initial weights and of the buffer.
    threads : int
        Threads of torch; 0: the cores that solvers leave, and all of them once the solvers are
        done.
    ranks : int
        Processes of the trainer on this machine, each with its own trajectories, buffer and batches
        of ``batch`` items: steps are those of one process with batches ``ranks`` times as large.
    log_every, validate_every : int
        Batches between metric lines and between validations.
    validator : {"auto", "inline", "process"}
        Who validates on the way: the trainer between batches; a process of its own, so that
        training never waits; or whichever is cheaper once the first validation has been timed.
    checkpoint_seconds : float
    channel : str
        How steps come from the solvers: ``"tail"`` reads the files of the run's store;
        ``"stream"`` asks a server, which `simlab run` keeps beside the store. A path that ends in
        ``.json`` is the file of a server elsewhere (`simlab store serve`), for `simlab train`.
    """

    operator: Annotated[Operator, operators.field] = Field(default="fno", validate_default=True)
    buffer: Annotated[BufferSettings, buffers.field] = Field(
        default="reservoir", validate_default=True
    )
    ahead: int = Field(0, ge=0)
    n_batches: int = Field(2000, ge=1)
    max_seconds: float | None = Field(None, gt=0)
    batch: int = Field(8, ge=1)
    learning_rate: float = Field(3e-3, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    schedule: Literal["cosine", "halving", "constant"] = "cosine"
    loss: Literal["relative_l2", "mse"] = "relative_l2"
    ema: float = Field(0.0, ge=0, lt=1)
    mode: Literal["live", "deterministic", "replay"] = "live"
    lanes: int = Field(8, ge=1)
    arrivals: str | None = None
    fresh: int = Field(0, ge=0)
    max_repeats: float = Field(32.0, ge=1)
    pilot: int = Field(16, ge=1)
    seed: int = Field(19937, ge=0)
    threads: int = Field(0, ge=0)
    ranks: int = Field(1, ge=1)
    log_every: int = Field(10, ge=1)
    validate_every: int = Field(200, ge=1)
    validator: Literal["auto", "inline", "process"] = "auto"
    checkpoint_seconds: float = Field(60.0, gt=0)
    channel: str = "tail"

    def __post_init__(self) -> None:
        if self.mode == "deterministic" and self.max_seconds is not None:
            raise ConfigError(
                "max_seconds: seconds differ from run to run, so they are no budget of a "
                'deterministic training; give n_batches, or mode = "live"'
            )
        if (self.mode == "replay") != (self.arrivals is not None):
            raise ConfigError(
                'arrivals: give the log of arrivals for mode = "replay", and only then'
            )
        if self.channel not in ("tail", "stream") and not self.channel.endswith(".json"):
            raise ConfigError(
                f"channel: {self.channel!r} is neither 'tail' nor 'stream' nor the stream.json of "
                "a server"
            )
        if self.channel != "tail" and "replay" in (self.mode, self.buffer.kind):
            raise ConfigError(
                f"channel: {self.channel!r} hands steps on in their order, but a replay reads "
                "them at random, which needs the files of the store: channel = 'tail'"
            )

    def learning_rate_at(self, share: float) -> float:
        """Return the learning rate when a share (0 to 1) of the budget is used."""
        warm = min(1.0, 0.02 + share / 0.05)
        if self.schedule == "cosine":
            factor = 0.5 * (1.0 + cos(pi * min(share, 1.0)))
        elif self.schedule == "halving":
            factor = 0.5 ** sum(share >= mark for mark in (0.25, 0.5, 0.75))
        else:
            factor = 1.0
        return self.learning_rate * warm * factor
