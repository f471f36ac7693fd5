"""The order in which a campaign walks its samples: made once, kept in the run directory.

    as drawn    held-out splits, then training samples, by index
    ordered     the same two parts, each ordered by itself so that neighbours resemble each other

Splits follow from the index, so they are drawn before anything is sorted. Every rank reduces its
share of the samples to a row each; rank 0 makes keys of all rows, orders them, and writes
``order.npz``: ids along the path and their keys. A resumed campaign walks the same path, restricted
to what is missing. The position on it is stored with every sample.

What cannot be ordered comes first: samples solved before there was an order, those of the pilot
among them, then the training samples whose statistics the trainer waits for, which are the first
ones by index (:mod:`.pilot`, :mod:`simlab.learn.stream`). A sample without a key (not finite) ends
its part; the campaign will say what is wrong with it.

Cost: every sample is drawn once more and reduced (about as long as drawing it takes), then as
:mod:`simlab.linalg.ordering` says, on one rank while the others sleep.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from simlab.core.comm import agreement
from simlab.core.errors import ConfigError, StoreError
from simlab.linalg.ordering import KeyReduction, Ordering, cut, orderings, path_length
from simlab.linalg.system import LinearSolver
from simlab.pipeline.case import AS_DRAWN, Case
from simlab.problems.breed import Breed
from simlab.store import files

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["AS_DRAWN", "Order", "make_order", "order_file", "wanted_order"]

log = logging.getLogger("simlab.campaign")


@dataclass(frozen=True, eq=False)
class Order:
    """A path through the samples of a campaign, or of one part of a job array.

    Attributes
    ----------
    kind : str
        Kind of the ordering.
    path : ndarray of int64, shape (N,)
        Ids in the order of solving, solved ones included.
    keys : ndarray, shape (N, d), float32
        Key of every sample along the path; zeros where it has none. No columns when as drawn.
    """

    kind: str
    path: np.ndarray
    keys: np.ndarray

    @classmethod
    def drawn(cls, parts: Sequence[np.ndarray]) -> Order:
        """Return the order of the parts as they are."""
        path = np.concatenate(parts)
        return cls(AS_DRAWN, path, np.zeros((len(path), 0), dtype=np.float32))

    @cached_property
    def place(self) -> dict[int, int]:
        """Position of every id on the path."""
        return {index: position for position, index in enumerate(self.path.tolist())}

    def chains(self, ids: np.ndarray, n: int) -> list[np.ndarray]:
        """Cut what is to be walked of the path into ``n`` pieces of nearly equal length.

        Cuts move a little to where the path jumps anyway. Returns ``n`` arrays of ids, empty ones
        last when there are fewer ids.
        """
        places = np.flatnonzero(np.isin(self.path, ids))
        if not self.keys.shape[1]:
            return np.array_split(self.path[places], n)
        pieces = cut(self.keys[places], np.arange(len(places)), n)
        return [self.path[places[piece]] for piece in pieces]

    def ratio(self) -> float:
        """Return the length of the path over that of the samples as drawn; 1 when as drawn."""
        if not self.keys.shape[1]:
            return 1.0
        drawn = path_length(self.keys, np.argsort(self.path))
        return path_length(self.keys) / drawn if drawn else 1.0

    def save(self, path: Path) -> None:
        """Write the order; readers see the old file or the new one whole."""
        buffer = io.BytesIO()
        np.savez(buffer, kind=np.array(self.kind), path=self.path, keys=self.keys)
        with files.reported(path):
            files.publish(path, buffer.getvalue())

    @classmethod
    def load(cls, path: Path, ids: np.ndarray) -> Order:
        """Read an order of these ids.

        Raises
        ------
        StoreError
            When the file is damaged or belongs to other samples.
        """
        try:
            with np.load(path) as arrays:
                order = cls(str(arrays["kind"]), arrays["path"], arrays["keys"])
        except (OSError, ValueError, KeyError) as error:
            raise StoreError(
                f"{path}: cannot be read ({error}); delete it for a new order"
            ) from None
        if not np.array_equal(np.sort(order.path), np.sort(ids)) or len(order.keys) != len(ids):
            raise StoreError(f"{path}: is an order of other samples; delete it for a new one")
        return order


def order_file(run: Path, shard: tuple[int, int]) -> Path:
    """Return where the order of a run, or of part ``i`` of ``n`` of it, is kept."""
    index, count = shard
    return run / ("order.npz" if count == 1 else f"order-{index}of{count}.npz")


def wanted_order(case: Case, solver: LinearSolver) -> Ordering:
    """Return the ordering that a case asks for when this solver does the work."""
    if case.campaign.order != "auto":
        return orderings.build(case.campaign.order)
    is_known = not isinstance(case.campaign.sampler, Breed)  # what the samples will be
    wants = is_known and getattr(solver, "wants_order", False)
    return orderings.build("greedy" if wants else AS_DRAWN)


def make_order(
    case: Case,
    ordering: Ordering,
    parts: Sequence[np.ndarray],
    first: np.ndarray,
    comm: MPI.Comm,
) -> Order:
    """Order the samples of a campaign. Collective.

    Parameters
    ----------
    parts : sequence of ndarray of int
        Held-out ids, then training ids; the same on every rank.
    first : ndarray of int
        Ids that come first, as they are: solved, or about to be.

    Returns
    -------
    Order
        On rank 0; elsewhere one without keys.
    """
    if ordering.kind == AS_DRAWN:
        return Order.drawn(parts)
    *held_out, training = (part[~np.isin(part, first)] for part in parts)
    is_early = np.isin(training, _waited_for(case, parts[-1]))
    sections = [*held_out, training[is_early], training[~is_early]]
    reduction, rows = _rows(case, np.concatenate(sections), comm)
    order = Order.drawn(parts)
    with agreement(comm, asleep=True):
        if reduction is not None and rows is not None:
            order = _ordered(ordering, first, sections, reduction, rows)
            log.info(
                "order %s of %d samples: a path of %.2f times the length as drawn",
                order.kind,
                len(order.path),
                order.ratio(),
            )
    path = comm.bcast(order.path)
    return order if comm.rank == 0 else Order(ordering.kind, path, np.zeros((len(path), 0)))


def _ordered(
    ordering: Ordering,
    first: np.ndarray,
    sections: Sequence[np.ndarray],
    reduction: KeyReduction,
    rows: np.ndarray,
) -> Order:
    """Return the path of what comes first, then of every section ordered by itself."""
    ids = np.concatenate(sections)
    has_key = ~np.isnan(rows).all(axis=1) if rows.shape[1] else np.ones(len(ids), dtype=bool)
    made = reduction.keys(rows[has_key])
    keys = np.zeros((len(ids), made.shape[1]), dtype=np.float32)
    keys[has_key] = made
    walk = []
    for members in np.split(np.arange(len(ids)), np.cumsum([len(part) for part in sections])[:-1]):
        good = members[has_key[members]]
        if len(good):
            walk.append(good[ordering.order(keys[good])])
        walk.append(members[~has_key[members]])
    places = np.concatenate(walk)
    head = np.zeros((len(first), keys.shape[1]), dtype=np.float32)
    return Order(
        ordering.kind,
        np.concatenate([first, ids[places]]),
        np.concatenate([head, keys[places]]),
    )


def _waited_for(case: Case, training: np.ndarray) -> np.ndarray:
    """Return the training samples without which the trainer cannot begin."""
    return np.sort(training)[: case.train.pilot if case.train else 0]


def _rows(
    case: Case, ids: np.ndarray, comm: MPI.Comm
) -> tuple[KeyReduction | None, np.ndarray | None]:
    """Reduce every sample to a row; all rows on rank 0, shape (len(ids), width). Collective."""
    space, seed = case.space, case.campaign.seed
    reduction = None
    with agreement(comm):
        if comm.rank == 0 and len(ids):
            reduction = KeyReduction.of(space.sample(1, seed, int(ids[0]))[0])
    reduction = comm.bcast(reduction)
    if reduction is None:
        return None, None
    mine = np.array_split(ids, comm.size)[comm.rank]
    rows = np.full((len(mine), reduction.width), np.nan)
    with agreement(comm, asleep=True):
        for row, index in zip(rows, mine.tolist(), strict=True):
            try:
                row[:] = reduction.reduced(space.sample(1, seed, index)[0])
            except ConfigError as error:
                log.warning("sample %d has no place in the order: %s", index, error)
    counts = [len(part) * reduction.width for part in np.array_split(ids, comm.size)]
    everything = np.empty((len(ids), reduction.width)) if comm.rank == 0 else None
    comm.Gatherv(rows, None if everything is None else (everything, counts))
    return reduction, everything
