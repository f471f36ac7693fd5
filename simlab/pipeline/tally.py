"""Progress of all groups at rank 0, carried by messages that nobody waits for."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from simlab.core.progress import Progress
from simlab.core.runs import RunDirectory
from simlab.store.store import SnapshotStore

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["Tally"]

_SEAL_SECONDS = 60.0
_REPORT_SECONDS = 1.0
_TAG = 7193


class Tally:
    """Counts of every group, shown and logged by rank 0; also seals finished segments in time.

    Collective on entry and on a clean exit only.
    """

    def __init__(
        self,
        comm: MPI.Comm,
        run: RunDirectory,
        total: int,
        before: int,
        ranks_per_group: int,
        max_failures: int,
    ) -> None:
        self._comm, self._run, self._total, self._before = comm, run, total, before
        self._ranks_per_group, self._max_failures = ranks_per_group, max_failures
        self._seen: dict[int, tuple[int, int, int, bool]] = {}
        self._requests: list[Any] = []
        self._start = self._last = self._sealed = time.perf_counter()
        self._mine = (0, 0, 0, False)
        self._progress = Progress("solving", total, enabled=comm.rank == 0)

    def __enter__(self) -> Tally:
        self._progress.__enter__()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:
            self._mine = (*self._mine[:3], True)
            self._send()
            while self._comm.rank == 0 and len(self._closed()) < self._comm.size:
                self._collect()
                time.sleep(0.01)
            for request in self._requests:
                request.wait()
            self._show()
        self._progress.__exit__(kind, error, trace)

    def report(self, done: int, failed: int, size: int) -> None:
        """Note what this group has done; sent at most once a second."""
        self._mine = (done, failed, size, False)
        now = time.perf_counter()
        if now - self._last >= _REPORT_SECONDS:
            self._last = now
            self._send()
            if self._comm.rank == 0:
                self._collect()
                self._show()

    def seal_if_due(self, store: SnapshotStore) -> None:
        """Seal finished segments once a minute, on rank 0."""
        if self._comm.rank == 0 and time.perf_counter() - self._sealed > _SEAL_SECONDS:
            store.seal()
            self._sealed = time.perf_counter()

    def _send(self) -> None:
        if self._comm.rank == 0:
            self._seen[0] = self._mine
        else:
            self._requests = [request for request in self._requests if not request.test()[0]]
            self._requests.append(self._comm.isend(self._mine, 0, _TAG))

    def _collect(self) -> None:
        for rank in range(1, self._comm.size):
            while self._comm.iprobe(rank, _TAG):
                self._seen[rank] = self._comm.recv(source=rank, tag=_TAG)

    def _closed(self) -> list[int]:
        return [rank for rank, state in self._seen.items() if state[3]]

    def _show(self) -> None:
        if self._comm.rank != 0:
            return
        roots = [state for rank, state in self._seen.items() if rank % self._ranks_per_group == 0]
        done, failed, size = (sum(state[item] for state in roots) for item in range(3))
        self._progress.update(done + failed, f"{failed} failed" if failed else "")
        spent = time.perf_counter() - self._start
        self._run.log_metric(
            "campaign",
            done=self._before + done,
            failed=failed,
            total=self._before + self._total,
            bytes=size,
            samples_per_s=done / spent if spent else 0.0,
        )
        if failed > self._max_failures:  # at the end too: no restart mends it
            self._run.request_stop()
