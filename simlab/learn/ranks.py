"""Training on several processes that always agree before they step, over gloo.

Every rank has its own share of the trajectories, a buffer and the whole network. Before each step
all ranks say whether they have a batch and whether they want to end; nobody steps unless all can,
and all end together. So streams of different length or pace make ranks wait, never hang. Gradients
are averaged, so that R ranks with batches of B take the steps of one with batches of R B.

``train.ranks = 2`` in a case file has `simlab train` and `simlab run` start the processes. From
Python, also over several machines::

    torchrun --nproc-per-node 2 train.py

    with Ranks.join() as ranks:
        Trainer(settings, schema, "model", ranks=ranks).run(FollowedStream("runs/heat/store"))

A rank that dies, or is silent for too long, makes the others raise :class:`CollectiveError`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from simlab.core.errors import CollectiveError, ConfigError
from simlab.learn.encoding import Statistics
from simlab.learn.stream import DerivedStream, Item, Stream

__all__ = ["Ranks", "ShareStream"]

_LOOPBACK = Path("/sys/class/net/lo")


@contextmanager
def _together() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo's, for a lost connection as for a timeout
        first = str(error).splitlines()[0]
        raise CollectiveError(f"another training process is gone or silent ({first})") from error


class Ranks:
    """The processes of one training; a single one unless :meth:`join` found more.

    Attributes
    ----------
    rank, size : int
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @classmethod
    def join(
        cls,
        seconds: float = 1800.0,
        *,
        rank: int = 0,
        size: int = 0,
        meeting: Path | None = None,
    ) -> Ranks:
        """Return the ranks that ``torchrun`` started, connected; one rank without it. Collective.

        Parameters
        ----------
        seconds : float
            After which a rank that waits for another one gives up with an error.
        rank, size, meeting : int, int, Path, optional
            Without ``torchrun``, for processes of one machine: who this is of how many, and a file
            in which they find each other, which is not there yet.
        """
        patience = timedelta(seconds=seconds)
        if meeting is not None and size > 1:
            if _LOOPBACK.exists():
                os.environ.setdefault("GLOO_SOCKET_IFNAME", _LOOPBACK.name)
            with _together():
                dist.init_process_group(
                    "gloo", f"file://{meeting}", patience, rank=rank, world_size=size
                )
            return cls(rank, size)
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size > 1 and not dist.is_initialized():
            dist.init_process_group("gloo", timeout=patience)
        return cls(dist.get_rank(), dist.get_world_size()) if size > 1 else cls()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        """Disconnect; a process that ends connected may be aborted."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def any(self, claim: bool) -> bool:
        """Return whether the claim holds on any rank. Collective."""
        return bool(self.largest(np.array([float(claim)]))[0]) if self.size > 1 else claim

    def largest(self, values: np.ndarray) -> np.ndarray:
        """Return the largest over the ranks, entry by entry, float64. Collective."""
        if self.size == 1:
            return values
        found = torch.from_numpy(np.array(values, dtype=np.float64))
        with _together():
            dist.all_reduce(found, dist.ReduceOp.MAX)
        reduced: np.ndarray = found.numpy()
        return reduced

    def merged(self, part: Statistics) -> Statistics:
        """Return the sums over all ranks. Collective."""
        if self.size == 1:
            return part
        total = torch.from_numpy(np.stack([part.count, part.total, part.square]))
        with _together():
            dist.all_reduce(total)
        return Statistics(*total.numpy())

    def average(self, parameters: Iterable[torch.nn.Parameter], loss: float) -> float:
        """Average gradients in place; return the mean of the losses. Collective."""
        if self.size == 1:
            return loss
        gradients = [
            torch.view_as_real(p.grad) if p.grad.is_complex() else p.grad
            for p in parameters
            if p.grad is not None
        ]
        flat = torch.cat([g.reshape(-1) for g in gradients] + [torch.tensor([loss])])
        with _together():
            dist.all_reduce(flat)
        flat /= self.size
        start = 0
        for gradient in gradients:
            gradient.copy_(flat[start : start + gradient.numel()].view_as(gradient))
            start += gradient.numel()
        return float(flat[-1])

    def gathered(self, rows: np.ndarray, most: int) -> np.ndarray:
        """Return the rows of all ranks, in turn, float64. Collective.

        Parameters
        ----------
        rows : ndarray, shape (n, k)
            At most ``most`` on any rank.
        """
        if self.size == 1:
            return rows
        padded = torch.full((most, rows.shape[1]), torch.nan, dtype=torch.float64)
        padded[: len(rows)] = torch.from_numpy(rows)
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        with _together():
            dist.all_gather(parts, padded)
        together: np.ndarray = torch.cat(parts).numpy()
        return together[~np.isnan(together).all(axis=1)]

    def wait(self) -> None:
        """Return when all ranks are here. Collective."""
        if self.size > 1:
            with _together():
                dist.barrier()


class ShareStream(DerivedStream):
    """Those trajectories of a stream that one of several ranks trains on: every R-th id.

    Parameters
    ----------
    inner : Stream
        The same on every rank.
    ranks : Ranks
    """

    def __init__(self, inner: Stream, ranks: Ranks) -> None:
        super().__init__(inner)
        self.schema = inner.schema
        ids = inner.ids()
        if len(ids) < ranks.size:
            raise ConfigError(
                f"ranks: {ranks.size} processes of the trainer for {len(ids)} training "
                "trajectories; each wants one at least"
            )
        self._ids = ids[ranks.rank :: ranks.size]
        self._mine = set(self._ids.tolist())
        self.finished: list[int] = []
        self._n_known = 0
        self._update()

    def _update(self) -> None:
        new = self._inner.finished[self._n_known :]
        self._n_known += len(new)
        self.finished += [traj for traj in new if traj in self._mine]

    def poll(self, at_most: int) -> list[Item]:
        """Return the next items of this rank's trajectories."""
        items: list[Item] = []
        while not items and (found := self._inner.poll(at_most)):
            items = [item for item in found if item.traj in self._mine]
        self._n_items += len(items)
        self._update()
        return items

    def rewind(self) -> None:
        """Begin another pass."""
        self._inner.rewind()
        self._n_items = 0

    def ids(self) -> np.ndarray:
        """Return this rank's trajectories."""
        return self._ids

    def pilot(self, n: int, now: bool = False) -> Statistics | None:
        """Return the statistics of the first trajectories of the whole stream: every rank's."""
        return self._inner.pilot(n, now)

    def skip_pilot(self) -> None:
        """Gather no statistics."""
        self._inner.skip_pilot()

    def state_dict(self) -> dict[str, Any]:
        """Return where the inner stream stands."""
        return {"inner": self._inner.state_dict(), "n_items": self._n_items}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._inner.load_state_dict(state["inner"])
        self._n_items, self._n_known = state["n_items"], 0
        self.finished.clear()
        self._update()
