"""The record format of segments: how one writer's log looks byte by byte.

A segment is a sequence of records. A record is a header of 64 bytes, its payload, and zeros up to a
multiple of eight. All numbers are little-endian::

    magic "SLW1" | version u16 | field u16 | traj u64 | attempt u32 | step u32 | time f64
    | nbytes u64 | dtype u8 | ndim u8 | flags u16 | shape 4 x u32 | crc32 u32

``crc32`` covers the payload, then the first 60 bytes of the header. The low byte of ``flags`` is
the kind; bit 8 says that the values were cast on their way in. Field records (INPUT, OUTPUT) count
only together with the record that commits them (BEGIN, STEP): a *group* is what is written by one
call and either counts whole or not at all. Reading stops before the first record that is torn.

Header and checksum are those of every version; the version says what the payloads mean. A STEP of
version 2 tells how the step was solved. Its solver is a number: a SOLVER record, once per solver
and segment, gives the words. Version 1 had iterations, residual and wall seconds only; it is read,
not written.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Literal

import numpy as np

from simlab.core.errors import SchemaError, StoreError
from simlab.core.reports import Provenance
from simlab.store import files

__all__ = [
    "HEADER_BYTES",
    "Group",
    "Kind",
    "Record",
    "SolverNames",
    "has_record_after",
    "pack",
    "pack_field",
    "pack_step",
    "scan",
    "scan_bytes",
    "step_bytes",
]

_HEADER = struct.Struct("<4sHHQIIdQBBH4II")
_CRC = struct.Struct("<I")
_MAGIC = b"SLW1"
_VERSION = 2
_VERSIONS = (1, _VERSION)
_CAST = 0x100
_BLOCK = 1 << 18
_PEEK = 1 << 12
_MOST = 1 << 23
_DTYPES: dict[int, np.dtype] = {1: np.dtype("<f4"), 2: np.dtype("<f8")}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}

Payloads = Literal["skip", "raw", "check", "keep"]

_STEP = struct.Struct("<qqqqiIdd")
_STEP_1 = struct.Struct("<Qdd")

HEADER_BYTES = _HEADER.size


class Kind(IntEnum):
    """What a record is."""

    HEAD = 1  # first record of a segment; JSON
    INPUT = 2  # values of an input field; committed by BEGIN
    BEGIN = 3  # a trajectory begins; JSON
    OUTPUT = 4  # values of an output field at one step; committed by STEP
    STEP = 5  # one step is complete; how it was solved
    END = 6  # a trajectory ends, done or failed; JSON
    CLOSE = 7  # nothing follows in this segment; JSON
    SOLVER = 8  # the words of a solver that STEPs after it name by number; JSON


_KINDS = {int(kind): kind for kind in Kind}


@dataclass(slots=True)
class Record:
    """One record as read. ``crc`` is that of the payload alone, None when it was not checked."""

    kind: Kind
    field: int
    traj: int
    attempt: int
    step: int
    time: float
    nbytes: int
    dtype: np.dtype | None
    shape: tuple[int, ...]
    is_cast: bool
    payload_at: int
    crc: int | None = None
    payload: bytes | memoryview | None = None
    version: int = _VERSION

    def json(self) -> dict[str, Any]:
        """Return the payload of a JSON record."""
        plain: dict[str, Any] = json.loads(bytes(self.payload or b"{}"))
        return plain

    def values(self) -> np.ndarray:
        """Return the payload of a field record, in the record's shape."""
        assert self.payload is not None
        return np.frombuffer(self.payload, dtype=self.dtype).reshape(self.shape)


class SolverNames:
    """The solvers of one segment, numbered in the order of their SOLVER records."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._words: list[str] = []

    def find(self, solver: str) -> tuple[int, list[bytes | memoryview]]:
        """Return the number of a solver, and the record it still needs, empty if it has one."""
        number = self._numbers.get(solver, len(self._words))
        is_new = number == len(self._words)
        return number, pack(Kind.SOLVER, body={"solver": solver})[0] if is_new else []

    def add(self, solver: str) -> None:
        """Take a solver whose record is in the segment."""
        if solver not in self._numbers:
            self._numbers[solver] = len(self._words)
            self._words.append(solver)

    def take(self, record: Record) -> None:
        """Take a SOLVER record that was read."""
        self.add(record.json()["solver"])

    def provenance(self, record: Record) -> Provenance:
        """Return what a STEP record of this segment says, in either version."""
        assert record.payload is not None
        if record.version == 1:
            iterations, residual, _ = _STEP_1.unpack(record.payload)
            return Provenance(iterations=iterations, true_relres=residual)
        order, its, applies, pc_applies, chain, solver, relres, seconds = _STEP.unpack(
            record.payload
        )
        words = self._words[solver]
        return Provenance(order, chain, its, applies, pc_applies, relres, seconds, words)


@dataclass(slots=True)
class Group:
    """A committing record with the field records before it, and where they lie in the file.

    ``block`` is a piece of the file that holds them, where they were asked for as bytes, and
    ``block_at`` where it lies. Neighbours share theirs.
    """

    commit: Record
    begin: int
    end: int
    fields: list[Record] = field(default_factory=list)
    block: memoryview | None = None
    block_at: int = 0


def pack(
    kind: Kind,
    traj: int = 0,
    attempt: int = 0,
    step: int = 0,
    time: float = 0.0,
    body: bytes | Mapping[str, Any] = b"",
) -> tuple[list[bytes | memoryview], int]:
    """Return the buffers of a committing record, and its CRC."""
    if not isinstance(body, bytes):
        body = json.dumps(body, separators=(",", ":")).encode()
    return _pack(kind, 0, traj, attempt, step, time, memoryview(body), 0, (), 0)


def pack_step(
    traj: int, attempt: int, step: int, time: float, solve: Provenance, solver: int
) -> tuple[list[bytes | memoryview], int]:
    """Return the buffers of a STEP record, and its CRC. ``solver`` is the number of the solver.

    Raises
    ------
    SchemaError
        When a count is not an integer of 64 bits (the chain: 32 bits).
    """
    try:
        body = _STEP.pack(
            solve.order,
            solve.iterations,
            solve.operator_applies,
            solve.pc_applies,
            solve.chain,
            solver,
            solve.true_relres,
            solve.seconds,
        )
    except struct.error as error:
        raise SchemaError(f"trajectory {traj}, step {step}: {error} in {solve}") from None
    return pack(Kind.STEP, traj, attempt, step, time, body)


def pack_field(
    kind: Kind,
    number: int,
    traj: int,
    attempt: int,
    step: int,
    time: float,
    values: np.ndarray,
    is_cast: bool,
) -> tuple[list[bytes | memoryview], int]:
    """Return the buffers of a field record, and its CRC. ``values`` is contiguous, at most 4-D."""
    payload = values.reshape(-1).data.cast("B")
    code = _CODES[values.dtype]
    flags = _CAST if is_cast else 0
    return _pack(kind, number, traj, attempt, step, time, payload, code, values.shape, flags)


def _pack(
    kind: Kind,
    number: int,
    traj: int,
    attempt: int,
    step: int,
    time: float,
    payload: memoryview,
    dtype: int,
    shape: tuple[int, ...],
    flags: int,
) -> tuple[list[bytes | memoryview], int]:
    lengths = (*shape, 0, 0, 0, 0)[:4]
    head = _HEADER.pack(
        _MAGIC,
        _VERSION,
        number,
        traj,
        attempt,
        step,
        time,
        len(payload),
        dtype,
        len(shape),
        flags | kind,
        *lengths,
        0,
    )[:60]
    crc = zlib.crc32(head, zlib.crc32(payload))
    return [head, _CRC.pack(crc), payload, bytes(-len(payload) % 8)], crc


def step_bytes(lengths: Iterable[int]) -> int:
    """Return the bytes of a step in a segment whose fields have values of so many bytes each."""
    return sum(HEADER_BYTES + n + -n % 8 for n in (*lengths, _STEP.size))


class _Window:
    """Reads of a file through blocks, so that small records cost few system calls.

    What is handed out lies in its block and keeps it alive. Large blocks cost least, but what is
    read and not taken is read again by the next call: the ``wanted`` bytes come as one block, or as
    few, before others of a usual size.
    """

    def __init__(self, fd: int, end: int, wanted: int = 0) -> None:
        self._fd, self._end, self._wanted = fd, end, wanted
        self._at = 0
        self._block = memoryview(b"")

    def read(self, offset: int, size: int) -> memoryview:
        start = offset - self._at
        if start < 0 or start + size > len(self._block):
            if self._block and start > len(self._block):  # a jump over values that nobody wants
                n = _PEEK
            else:
                n = min(self._wanted, _MOST) if self._wanted > 0 else _BLOCK
                self._wanted -= n
            room = np.empty(max(0, min(max(n, size), self._end - offset)), dtype=np.uint8).data
            self._block = room[: files.read_at(self._fd, room, offset)]
            self._at, start = offset, 0
        return self._block[start : start + size]

    def block(self, offset: int, size: int) -> tuple[memoryview, int]:
        """Return a block that holds some bytes, and where it lies."""
        self.read(offset, size)
        return self._block, self._at


class _Bytes:
    """The same over records in memory; what is handed out is not copied."""

    def __init__(self, data: memoryview) -> None:
        self._data = data

    def read(self, offset: int, size: int) -> memoryview:
        return self._data[offset : offset + size]

    def block(self, offset: int, size: int) -> tuple[memoryview, int]:
        return self._data, 0


def _read(window: _Window | _Bytes, offset: int, size: int, payloads: Payloads) -> Record | None:
    """Read the record at ``offset``; None when it is torn, damaged or not all there."""
    raw = window.read(offset, HEADER_BYTES)
    if len(raw) < HEADER_BYTES:
        return None
    magic, version, number, traj, attempt, step, time, nbytes, code, ndim, flags, *rest = (
        _HEADER.unpack(raw)
    )
    end = offset + HEADER_BYTES + nbytes + -nbytes % 8
    kind = flags & 0xFF
    if magic != _MAGIC or end > size or ndim > 4:
        return None
    if version not in _VERSIONS:
        crc = zlib.crc32(raw[:60], zlib.crc32(window.read(offset + HEADER_BYTES, nbytes)))
        if crc == rest[4]:
            raise StoreError(
                f"a segment has records of version {version}, this simlab reads "
                f"{_VERSIONS[0]} to {_VERSION}: use the simlab that wrote it, or a newer one"
            )
        return None  # damaged: its version says nothing
    if kind not in _KINDS or (code and code not in _DTYPES):
        return None
    record = Record(
        _KINDS[kind],
        number,
        traj,
        attempt,
        step,
        time,
        nbytes,
        _DTYPES.get(code),
        tuple(rest[:ndim]),
        bool(flags & _CAST),
        offset + HEADER_BYTES,
        version=version,
    )
    is_field = record.kind in (Kind.INPUT, Kind.OUTPUT)
    if is_field and payloads in ("skip", "raw"):
        return record
    payload = window.read(record.payload_at, nbytes)
    crc = zlib.crc32(payload)
    if len(payload) < nbytes or zlib.crc32(raw[:60], crc) != rest[4]:
        return None
    record.crc = crc
    if not is_field or payloads == "keep":
        record.payload = payload
    return record


def scan(
    fd: int, offset: int, size: int, payloads: Payloads = "check", wanted: int = 0
) -> Iterator[Group]:
    """Yield the whole groups between ``offset`` and ``size``.

    Parameters
    ----------
    payloads : {"skip", "raw", "check", "keep"}
        Values of fields: jump over them, jump but hand out the block that holds each group with its
        values unchecked, check their CRC, or check and hand them out.
    wanted : int
        About how many bytes the caller will take, if known; that much is read at a time.
    """
    return _groups(_Window(fd, size, wanted), offset, size, payloads)


def scan_bytes(data: bytes | memoryview) -> Iterator[Group]:
    """Yield the whole groups in some bytes of a segment; values are checked and not copied."""
    view = memoryview(data)
    return _groups(_Bytes(view), 0, len(view), "keep")


def _groups(
    window: _Window | _Bytes, offset: int, size: int, payloads: Payloads
) -> Iterator[Group]:
    begin, fields = offset, []
    while (record := _read(window, offset, size, payloads)) is not None:
        offset = record.payload_at + record.nbytes + -record.nbytes % 8
        if record.kind in (Kind.INPUT, Kind.OUTPUT):
            fields.append(record)
            continue
        block, at = window.block(begin, offset - begin) if payloads == "raw" else (None, 0)
        yield Group(record, begin, offset, fields, block, at)
        begin, fields = offset, []


def has_record_after(fd: int, offset: int, size: int) -> bool:
    """Return whether a good committing record lies after ``offset``.

    If so, what lies at ``offset`` is damaged, not merely torn.
    """
    window = _Window(fd, size)
    step = 1 << 20
    for start in range(offset + 8, size, step):
        room = bytearray(step + 3)
        block = room[: files.read_at(fd, memoryview(room), start)]
        at = block.find(_MAGIC)
        while at >= 0:
            aligned = (start + at) % 8 == 0
            record = _read(window, start + at, size, "check") if aligned else None
            if record is not None and record.payload is not None:
                return True
            at = block.find(_MAGIC, at + 1)
    return False
