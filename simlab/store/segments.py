"""Writing: one writer's log, cut into segments that hold whole trajectories.

A trajectory lives in one segment. A segment past its size takes no new trajectories; once its last
one has ended it is closed and can be sealed. What ``begin``, ``append`` and ``finish`` have
returned from survives the death of the process at once (it is in the page cache); a helper thread
brings it to the disk within a second, off the hot path.
"""

from __future__ import annotations

import hashlib
import os
import struct
import threading
import time as clock
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from simlab.core.errors import SchemaError, StoreError
from simlab.core.reports import Provenance
from simlab.core.samples import Sample
from simlab.store import files
from simlab.store.records import Kind, SolverNames, pack, pack_field, pack_step
from simlab.store.schema import FieldSpec, Schema
from simlab.store.storage import Storage, stored_dtype

__all__ = ["SEGMENT_BYTES", "SUFFIX", "Writer", "stored_dtype"]

SEGMENT_BYTES = 64 << 20
SUFFIX = ".seg"
_SYNC_SECONDS = 1.0
_SYNC_BYTES = 64 << 20
_HEARTBEAT_SECONDS = 60.0
_UNKNOWN = Provenance()
_STORAGE = Storage()


@dataclass
class _Open:
    """A trajectory that has begun and not ended."""

    attempt: int
    segment: _Segment
    crcs: list[int]
    next_step: int = 0


@dataclass(eq=False)
class _Segment:
    """A segment being written."""

    path: Path
    fd: int
    size: int = 0
    unsynced: int = 0
    is_torn: bool = False  # there may be part of a group beyond size
    is_full: bool = False
    is_closed: bool = False
    open: set[int] = field(default_factory=set)
    solvers: SolverNames = field(default_factory=SolverNames)


class _Syncer:
    """The helper thread: syncs dirty segments, closes finished ones; keeps the first error."""

    def __init__(self) -> None:
        self.segments: list[_Segment] = []
        self.error: OSError | None = None
        self.wake = threading.Event()
        self._lock = threading.Lock()
        self._ended = False
        self._thread: threading.Thread | None = None

    def add(self, segment: _Segment) -> None:
        with self._lock:
            self.segments.append(segment)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="store-sync", daemon=True)
            self._thread.start()

    def flush(self) -> None:
        """Sync every dirty segment and close the finished ones."""
        with self._lock:
            for segment in list(self.segments):
                if segment.unsynced:
                    segment.unsynced = 0
                    files.sync(segment.fd)
                if segment.is_closed:
                    self.segments.remove(segment)
                    os.close(segment.fd)

    def stop(self) -> None:
        """End the thread and let go of the files, synced or not."""
        self._ended = True
        self.wake.set()
        with self._lock:
            for segment in self.segments:
                os.close(segment.fd)
            self.segments.clear()

    def _run(self) -> None:
        beat = clock.monotonic()
        while not self._ended:
            self.wake.wait(_SYNC_SECONDS)
            self.wake.clear()
            try:
                self.flush()
                if clock.monotonic() - beat > _HEARTBEAT_SECONDS:
                    beat = clock.monotonic()
                    with self._lock:
                        for segment in self.segments:
                            os.utime(segment.fd)
            except OSError as error:
                self.error = self.error or error


def _release(writer: str, syncer: _Syncer) -> None:
    syncer.stop()
    files.mark_alive(writer, False)


class Writer:
    """Appends trajectories to the store; one per process that writes. A context manager.

    Made by :meth:`simlab.store.store.SnapshotStore.writer`. Several trajectories may be open at
    once; no two writers may work on the same trajectory. Leaving the ``with`` block closes the
    segments; trajectories still open then are abandoned and begin again as a higher attempt.
    To be used by one thread.
    """

    def __init__(
        self,
        directory: Path,
        schema: Schema,
        *,
        n: int,
        campaign: str,
        split_of: Callable[[int], str],
        last_attempt: Callable[[int, str], int],
        segment_bytes: int = SEGMENT_BYTES,
        storage: Storage = _STORAGE,
    ) -> None:
        self.id = files.process_id()
        self._directory = directory
        self._schema = schema
        self._n = n
        self._campaign = campaign
        self._split_of = split_of
        self._last_attempt = last_attempt
        self._segment_bytes = segment_bytes
        self._storage = storage
        self._segments = 0
        self._current: _Segment | None = None
        self._open: dict[int, _Open] = {}
        self._attempts: dict[int, int] = {}
        self._pid = os.getpid()
        self._is_closed = False
        self._syncer = _Syncer()
        self._outputs = {spec.name: number for number, spec in enumerate(schema.outputs)}
        files.mark_alive(self.id, True)
        # when collected, or at exit while the helper thread still runs, without a closing record
        self._release = weakref.finalize(self, _release, self.id, self._syncer)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def begin(
        self,
        sample: Sample,
        attempt: int | None = None,
        *,
        provenance: Mapping[str, Any] | None = None,
    ) -> int:
        """Begin the trajectory ``sample.index``; return its attempt number.

        Parameters
        ----------
        sample : Sample
            Has all parameters and input fields of the schema; fields are stored as float32.
        attempt : int, optional
            Default: one more than the highest attempt in the store.
        provenance : mapping, optional
            Anything JSON can say about how this trajectory is made.
        """
        self._check_usable()
        traj = sample.index
        if not 0 <= traj < self._n:
            raise SchemaError(f"sample {traj}: the campaign has trajectories 0 to {self._n - 1}")
        if traj in self._open:
            raise StoreError(f"trajectory {traj} is open already; finish or fail it first")
        self._schema.check_sample(sample)
        previous = max(self._last_attempt(traj, self.id), self._attempts.get(traj, 0))
        attempt = previous + 1 if attempt is None else attempt
        if attempt <= previous:
            raise StoreError(
                f"trajectory {traj}: attempt {attempt} is not above attempt {previous} in the store"
            )
        body = {
            "index": traj,
            "seed": sample.seed,
            "parameters": {
                name: float(sample.parameters[name]) for name in self._schema.parameters
            },
            "split": self._split_of(traj),
            "provenance": dict(provenance or {}),
        }
        buffers, crcs = [], []
        for number, spec in enumerate(self._schema.inputs):
            values, is_cast = self._stored(spec, sample.fields[spec.name], f"sample {traj}")
            packed, crc = pack_field(Kind.INPUT, number, traj, attempt, 0, 0.0, values, is_cast)
            buffers += packed
            crcs.append(crc)
        packed, crc = pack(Kind.BEGIN, traj, attempt, body=body)
        segment = self._segment()
        self._write(segment, buffers + packed)
        segment.open.add(traj)
        self._attempts[traj] = attempt
        self._open[traj] = _Open(attempt, segment, [*crcs, crc])
        return attempt

    def append(
        self,
        traj: int,
        step: int,
        time: float,
        fields: Mapping[str, np.ndarray],
        *,
        solve: Provenance = _UNKNOWN,
    ) -> None:
        """Append one step; once this returns, the step survives the death of the process.

        Parameters
        ----------
        step : int
            0, 1, ... without gaps.
        time : float
            The schema's time of that step.
        fields : mapping of str to ndarray
            Every output field of the schema, and no other.
        solve : Provenance, optional
            How the step was solved.
        """
        state = self._state(traj)
        where = f"trajectory {traj}, step {step}"
        if step != state.next_step or step >= len(self._schema.times):
            raise SchemaError(
                f"{where}: expected step {state.next_step} of {len(self._schema.times)}"
            )
        expected = self._schema.times[step]
        if not abs(time - expected) <= 1e-6 * max(1.0, abs(expected)):
            raise SchemaError(f"{where}: time {time} is not the schema's {expected}")
        if fields.keys() != self._outputs.keys():
            raise SchemaError(
                f"{where}: fields {', '.join(fields)} given, {', '.join(self._outputs)} expected"
            )
        buffers, crcs = [], []
        for number, spec in enumerate(self._schema.outputs):
            values, is_cast = self._stored(spec, fields[spec.name], where)
            packed, crc = pack_field(
                Kind.OUTPUT, number, traj, state.attempt, step, time, values, is_cast
            )
            buffers += packed
            crcs.append(crc)
        solver, named = state.segment.solvers.find(solve.solver)
        packed, crc = pack_step(traj, state.attempt, step, time, solve, solver)
        self._write(state.segment, named + buffers + packed)
        state.segment.solvers.add(solve.solver)
        state.crcs += [*crcs, crc]
        state.next_step += 1

    def finish(self, traj: int) -> None:
        """End a trajectory that has all its steps."""
        state = self._state(traj)
        if state.next_step != len(self._schema.times):
            raise SchemaError(
                f"trajectory {traj} has {state.next_step} of {len(self._schema.times)} steps; "
                "append the others, or fail it"
            )
        self._end(traj, state, "done", "")

    def fail(self, traj: int, reason: str) -> None:
        """End a trajectory that could not be computed; it is kept apart from good data."""
        self._end(traj, self._state(traj), "failed", reason)

    def abandon(self, traj: int, reason: str) -> None:
        """End an attempt of which nothing is kept: the trajectory is to begin again, not failed."""
        self._end(traj, self._state(traj), "abandoned", reason)

    def sync(self) -> None:
        """Bring everything written so far to the disk, for instance before a checkpoint."""
        self._check_usable()
        with files.reported(self._directory):
            self._syncer.flush()

    def close(self) -> None:
        """Close all segments; they can be sealed from now on."""
        if self._is_closed:
            return
        try:
            for segment in list(self._syncer.segments):
                if not segment.is_closed:
                    self._close(segment)
            with files.reported(self._directory):
                self._syncer.flush()
        finally:
            self._is_closed = True
            self._release()

    def _check_usable(self) -> None:
        if self._is_closed or self._pid != os.getpid():
            raise StoreError(f"writer {self.id} is closed or belongs to another process")
        if self._syncer.error is not None:
            error = self._syncer.error
            raise StoreError(f"writer {self.id}: data could not be brought to disk: {error}")

    def _state(self, traj: int) -> _Open:
        self._check_usable()
        if traj not in self._open:
            raise StoreError(f"trajectory {traj} is not open; call begin first")
        return self._open[traj]

    def _stored(self, spec: FieldSpec, values: np.ndarray, where: str) -> tuple[np.ndarray, bool]:
        """Cast to the stored type, check, and merge axes so that four are enough."""
        given = np.asarray(values)
        if given.dtype.kind not in "biuf" or np.ma.is_masked(values):
            raise SchemaError(
                f"{where}: field {spec.name!r} has values of type {given.dtype}, or masked ones; "
                "real numbers are stored (of a complex field real and imaginary part, as two)"
            )
        dtype = stored_dtype(spec)
        with np.errstate(over="ignore", invalid="ignore"):
            shown = np.ascontiguousarray(given, dtype=dtype)
            total = shown.sum()  # not finite if any value is not
            kept = self._storage.record_dtype(spec)
            stored = shown if kept == dtype else np.ascontiguousarray(given, dtype=kept)
        if given.shape != self._schema.field_shape(spec) or not np.isfinite(total):
            self._schema.check_field(spec, given, where)
            if not np.all(np.isfinite(shown)):
                raise SchemaError(
                    f"{where}: field {spec.name!r} has values beyond {dtype.name}; rescale it"
                )
        if spec.order == 2:
            stored = stored.reshape(*stored.shape[:-2], -1)
        if stored.ndim > 4:
            stored = stored.reshape(*stored.shape[:3], -1)
        return stored, given.dtype != kept

    def _segment(self) -> _Segment:
        if self._current is None:
            path = self._directory / f"{self.id}.{self._segments:06d}{SUFFIX}"
            self._segments += 1
            with files.reported(path):
                self._current = self._new_segment(path)
        return self._current

    def _new_segment(self, path: Path) -> _Segment:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        segment = _Segment(path, fd)
        try:
            head = {"schema": "simlab-segment/2", "campaign": self._campaign, "writer": self.id}
            self._write(segment, pack(Kind.HEAD, body=head)[0])
            files.sync_directory(self._directory)
        except BaseException:
            os.close(fd)
            files.unlink(path)
            raise
        self._syncer.add(segment)
        return segment

    def _write(self, segment: _Segment, buffers: list[bytes | memoryview]) -> None:
        """Write one group: whole, or not at all."""
        try:
            if segment.is_torn:
                files.truncate(segment.fd, segment.size)
            segment.is_torn = True
            wrote = files.write_all(segment.fd, buffers)
            segment.is_torn = False
        except BaseException as error:
            with suppress(OSError):  # then before the next group
                files.truncate(segment.fd, segment.size)
                segment.is_torn = False
            if isinstance(error, OSError):
                raise StoreError(
                    f"{segment.path}: cannot write ({error.strerror}); nothing was kept of this "
                    "call, free space and repeat it"
                ) from error
            raise
        segment.size += wrote
        segment.unsynced += wrote
        if segment.unsynced > _SYNC_BYTES:
            self._syncer.wake.set()

    def _end(self, traj: int, state: _Open, status: str, reason: str) -> None:
        crcs = struct.pack(f"<{len(state.crcs)}I", *state.crcs)
        body = {
            "status": status,
            "reason": reason,
            "n_steps": state.next_step,
            "digest": hashlib.sha256(crcs).hexdigest(),
        }
        self._write(state.segment, pack(Kind.END, traj, state.attempt, body=body)[0])
        del self._open[traj]
        segment = state.segment
        segment.open.discard(traj)
        if segment.size >= self._segment_bytes:
            segment.is_full = True
            if self._current is segment:
                self._current = None
            if not segment.open:
                with suppress(StoreError):  # the end counts; close() tries again
                    self._close(segment)

    def _close(self, segment: _Segment) -> None:
        self._write(segment, pack(Kind.CLOSE, body={"is_full": segment.is_full})[0])
        segment.is_closed = True
        self._syncer.wake.set()
