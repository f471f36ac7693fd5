"""What one start of a campaign has to do, step by step: decide, order, walk, seal.

Every step is collective: all ranks of the campaign take it together, and may wait for each other
there. Within a walk they do not.
"""

from __future__ import annotations

import numpy as np

from simlab.core.comm import Group, agreement
from simlab.core.runs import RunDirectory
from simlab.linalg.ordering import Ordering
from simlab.pipeline.case import Case
from simlab.pipeline.chain import Chain
from simlab.pipeline.order import AS_DRAWN, Order, make_order, order_file, wanted_order
from simlab.pipeline.pilot import Decision, samples_of_a_pilot
from simlab.pipeline.static_space import shared_seed
from simlab.pipeline.stealing import Crew
from simlab.pipeline.tally import Tally
from simlab.store.store import SnapshotStore

__all__ = ["Work", "ended_in", "parts_of"]


def parts_of(store: SnapshotStore, shard: tuple[int, int]) -> list[np.ndarray]:
    """Return the ids of this call, solved or not: held-out splits first, then training samples."""
    index, count = shard
    parts = [np.sort(np.concatenate([store.ids("valid"), store.ids("test")])), store.ids("train")]
    return [part[part % count == index] for part in parts]


def ended_in(store: SnapshotStore) -> set[int]:
    """Return the ids that were solved or failed for good."""
    return store.done() | set(store.failed())


class Work:
    """What one start of a campaign has to do: decide, order, walk. Methods are collective."""

    def __init__(
        self,
        case: Case,
        run: RunDirectory,
        store: SnapshotStore,
        group: Group,
        shard: tuple[int, int],
        parts: list[np.ndarray],
        ended: set[int],
    ) -> None:
        self._case, self._run, self._store, self._group = case, run, store, group
        self._parts, self._ended, self._comm = parts, ended, group.parent
        self._order_file = order_file(run.path, shard)
        self.order = Order.drawn(parts)
        self._n_first = 0
        self.chain = Chain(case, run, store, group, self.order)

    def missing(self, ids: np.ndarray) -> np.ndarray:
        """Return those of some ids that have not ended."""
        return ids[~np.isin(ids, list(self._ended))]

    def prepare(self, crew: Crew, tally: Tally) -> None:
        """Make the static space, have the solver chosen, order the samples."""
        n = len(self.missing(self.order.path))
        if not n:
            return
        self.chain.n_systems = -(-n // self._group.n_groups) * self._case.family.steps
        decision = None
        if samples_of_a_pilot(self._case):
            decision = self._decide(crew, tally)
        if self._comm.bcast(self._run.stop_requested()):
            return
        solver = decision.solver if decision else self._case.solver
        with self.chain.clock("prepare"):
            seed = shared_seed(self._case, solver, self.chain.workspace, self._run, self._group)
        if decision is not None:
            self.chain.adopt(decision, seed)
        else:
            self.chain.seed = seed
        with self.chain.clock("order"):
            self._settle_order(wanted_order(self._case, solver))

    def _decide(self, crew: Crew, tally: Tally) -> Decision | None:
        """Return what ``auto`` has decided, now or in an earlier start of this run.

        None when every sample of the pilot failed; then each group goes on trying.

        The pilot's samples are the first ones as drawn, dealt out in turn, so that the place on the
        path that is stored with them stands whatever the order of the others will be.
        """
        n = samples_of_a_pilot(self._case)
        decision = None
        with agreement(self._comm):
            if self._comm.rank == 0:
                decision = Decision.read(self._run)
        decision = self._comm.bcast(decision)
        if decision is None:
            group = self._group
            ids = self.missing(self.order.path)[group.index :: group.n_groups][:n]
            tried = self.chain.walk(crew, ids, tally, lambda: self.chain.decision is not None)
            crew.gather()
            found = self._comm.allgather((tried, self.chain.decision))
            everybody = [index for tried, _ in found for index in tried]
            self._ended.update(everybody)
            self._n_first = 1 + max((self.order.place[index] for index in everybody), default=-1)
            decision = next((said for _, said in found if said is not None), None)
            with agreement(self._comm):
                if self._comm.rank == 0 and decision is not None:
                    decision.write(self._run)
        return decision

    def _settle_order(self, ordering: Ordering) -> None:
        """Read the run's order, or make it and keep it."""
        order = None
        with agreement(self._comm):
            if self._comm.rank == 0 and self._order_file.is_file():
                order = Order.load(self._order_file, self.order.path)
        if self._comm.bcast(order is not None):
            order = self._comm.bcast(order)
        else:
            order = make_order(self._case, ordering, self._parts, self._first(), self._comm)
            with agreement(self._comm):
                if self._comm.rank == 0 and order.kind != AS_DRAWN:
                    order.save(self._order_file)
        self.order = self.chain.order = order
        with agreement(self._comm):
            if self._comm.rank == 0:
                self._run.update(campaign={"order": order.kind, "path_over_drawn": order.ratio()})

    def _first(self) -> np.ndarray:
        """Return what has its place already: the pilot's samples, and others that have ended."""
        pilot, rest = np.split(self.order.path, [self._n_first])
        return np.concatenate([pilot, rest[np.isin(rest, list(self._ended))]])

    def walk(self, part: np.ndarray, crew: Crew, tally: Tally) -> None:
        """Solve what is missing of one part, then seal it."""
        chains = None
        if self._comm.rank == 0:
            chains = self.order.chains(self.missing(part), self._group.n_groups)
        chains = self._comm.bcast(chains)
        self.chain.walk(crew, chains[self._group.index], tally)
        self.chain.seal()
        crew.gather()
        with self.chain.clock("seal"), agreement(self._comm, asleep=True):
            if self._comm.rank == 0:
                self._store.seal(final=True)
