"""Values of sealed shards by their place in the file, past HDF5: what the loader reads with.

HDF5 takes about 100 microseconds to read a small window, most of it bookkeeping. A sealed shard
never changes, so where its values lie is asked once: the byte offset of a contiguous dataset, or of
every chunk of a chunked one whose only filter is a checksum. From then on values are copied
straight out of a memory map. Datasets laid out otherwise (compressed, chunked within a step) are
read through h5py.

The checksums HDF5 would look at are replaced by the shard's own: the CRC-32 of every stored step,
looked at when a process reads that step for the first time.
"""

from __future__ import annotations

import math
import mmap
import os
import threading
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from simlab.core.errors import StoreError
from simlab.store.schema import FieldSpec, Schema
from simlab.store.shards import field_path

__all__ = ["MAX_HANDLES", "ShardReader", "n_open"]

MAX_HANDLES = 64
"""Shards a process keeps open for its loaders."""


@dataclass(eq=False)
class _Layout:
    """Where the values of one field lie.

    Rows and steps are cut into pieces of ``piece`` = (rows, steps) that are stored in one go;
    ``offsets[i, j]`` is the first byte of such a piece. None when only HDF5 can tell. An input is
    a field of one step, one without a row of its own (``has_rows`` false) a field of one row.

    Attributes
    ----------
    crcs : ndarray of uint32, shape (B, T)
    seen : bytearray of B * T
        1 where the CRC was looked at.
    """

    path: str
    dtype: np.dtype
    shape: tuple[int, ...]
    has_rows: bool
    has_steps: bool
    n_steps: int
    piece: tuple[int, int]
    offsets: np.ndarray | None
    crcs: np.ndarray
    seen: bytearray

    def __post_init__(self) -> None:
        self.step_bytes = self.dtype.itemsize * math.prod(self.shape)


@dataclass(eq=False)
class _Handle:
    """An open shard: a map of its bytes, or the file where a layout is not plain."""

    bytes: mmap.mmap | None = None
    file: h5py.File | None = None
    datasets: dict[str, h5py.Dataset] = field(default_factory=dict)


class _Pool:
    """The most recently used handles of this process; nothing is taken across a fork."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.handles: OrderedDict[Path, _Handle] = OrderedDict()
        self.lock = threading.Lock()

    def get(self, path: Path, n_bytes: int, is_plain: bool) -> _Handle:
        if self.pid != os.getpid():
            self.__init__()  # type: ignore[misc]
        with self.lock:
            handle = self.handles.get(path)
            if handle is None:
                handle = self.handles[path] = _opened(path, n_bytes, is_plain)
                while len(self.handles) > MAX_HANDLES:  # closed when its last reader lets go
                    self.handles.popitem(last=False)
            self.handles.move_to_end(path)
        return handle


_pool = _Pool()


def n_open() -> int:
    """Return how many shards this process keeps open for its loaders."""
    return len(_pool.handles) if _pool.pid == os.getpid() else 0


def _opened(path: Path, n_bytes: int, is_plain: bool) -> _Handle:
    try:
        if not is_plain:
            return _Handle(file=h5py.File(path, "r"))
        with open(path, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if size != n_bytes:  # reading a map past the end of its file would kill the process
                raise StoreError(
                    f"{path} has {size} bytes, sealed were {n_bytes}; run `simlab store verify`"
                )
            return _Handle(bytes=mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
    except StoreError:
        raise
    except OSError as error:
        raise StoreError(f"{path}: cannot be read ({error}); run `simlab store verify`") from error


class ShardReader:
    """One sealed shard: its small columns in memory, its fields by place.

    Parameters
    ----------
    path : Path
    schema : Schema
    n_bytes : int
        Size of the file when it was sealed.
    check : bool
        Hold every step against its CRC when it is read for the first time.

    Attributes
    ----------
    traj : ndarray of int64, shape (B,)
    parameters : ndarray of float64, shape (B, P)
    """

    def __init__(self, path: Path, schema: Schema, n_bytes: int, *, check: bool = True) -> None:
        self.path = path
        self._n_bytes = n_bytes
        self._check = check
        try:
            with h5py.File(path, "r") as file:
                log = file["simlab"]
                self.traj = log["traj_id"][:].astype(np.int64)
                self.parameters: np.ndarray = log["parameters"][:]
                self._layouts: dict[str, _Layout] = {}
                for column, specs in (
                    ("input_crc32", schema.inputs),
                    ("crc32", schema.outputs),
                ):
                    crcs = log[column][:]
                    for number, spec in enumerate(specs):
                        data = file[field_path(spec)]
                        self._layouts[spec.name] = _layout(data, spec, crcs[..., number])
        except (OSError, KeyError, ValueError, IndexError) as error:
            raise StoreError(
                f"{path}: cannot be read ({error}); run `simlab store verify`"
            ) from error
        self._is_plain = all(item.offsets is not None for item in self._layouts.values())

    @property
    def is_mapped(self) -> bool:
        """Whether values come out of a memory map rather than through h5py."""
        return self._is_plain

    def n_steps(self, name: str) -> int:
        """Return how many steps a field has; one for an input."""
        return self._layouts[name].n_steps

    def read(self, name: str, row: int, first: int, out: np.ndarray) -> None:
        """Copy the steps ``first ...`` of one row into ``out``, shape (steps, *field).

        Raises
        ------
        StoreError
            When the file is damaged: its size or the CRC of a step is not what was sealed.
        """
        layout = self._layouts[name]
        last = first + len(out)
        if not 0 <= first <= last <= layout.n_steps:
            raise StoreError(f"{self.path}: {name!r} has steps 0 to {layout.n_steps - 1} only")
        handle = _pool.get(self.path, self._n_bytes, self._is_plain)
        if handle.bytes is None:
            self._read_through_hdf5(handle, layout, row, first, out)
        else:
            _copy(handle.bytes, layout, row if layout.has_rows else 0, first, out)
        if self._check:
            start = row * layout.n_steps
            if layout.seen.find(0, start + first, start + last) >= 0:
                self._compare(name, layout, row, first, out)

    def _read_through_hdf5(
        self, handle: _Handle, layout: _Layout, row: int, first: int, out: np.ndarray
    ) -> None:
        assert handle.file is not None
        key: list[Any] = [row] if layout.has_rows else []
        key += [slice(first, first + len(out))] if layout.has_steps else []
        try:
            data = handle.datasets.get(layout.path)
            if data is None:
                data = handle.datasets[layout.path] = handle.file[layout.path]
            out[...] = data[tuple(key)]
        except OSError as error:
            raise StoreError(
                f"{self.path}: {layout.path} cannot be read ({error}); "
                "run `simlab store verify --deep`"
            ) from error

    def _compare(
        self, name: str, layout: _Layout, row: int, first: int, values: np.ndarray
    ) -> None:
        for step in range(first, first + len(values)):
            place = row * layout.n_steps + step
            if layout.seen[place]:
                continue
            if (
                zlib.crc32(np.ascontiguousarray(values[step - first]).data)
                != layout.crcs[row, step]
            ):
                raise StoreError(
                    f"{self.path}: field {name!r}, row {row}, step {step} is not what was sealed; "
                    "run `simlab store verify --deep`"
                )
            layout.seen[place] = 1


def _layout(data: h5py.Dataset, spec: FieldSpec, crcs: np.ndarray) -> _Layout:
    """Ask once where a field's values lie."""
    flags: Mapping[str, Any] = data.attrs
    has_rows = bool(flags.get("sample_varying", True))
    has_steps = spec.role == "output"
    leading = has_rows + has_steps
    shape = data.shape[leading:]
    n_steps = data.shape[leading - 1] if has_steps else 1
    n_rows = data.shape[0] if has_rows else 1
    crcs = crcs.reshape(len(crcs), n_steps)
    chunks = data.chunks or data.shape
    piece = (chunks[0] if has_rows else 1, chunks[leading - 1] if has_steps else 1)
    offsets = None
    if chunks[leading:] == shape and _is_verbatim(data):
        offsets = _offsets(data, leading, has_rows, piece, n_rows, n_steps)
    return _Layout(
        field_path(spec),
        data.dtype,
        shape,
        has_rows,
        has_steps,
        n_steps,
        piece,
        offsets,
        crcs,
        bytearray(crcs.size),
    )


def _is_verbatim(data: h5py.Dataset) -> bool:
    """Return whether the values lie in this very file as they are."""
    plist = data.id.get_create_plist()
    filters = {plist.get_filter(i)[0] for i in range(plist.get_nfilters())}
    return (
        filters <= {h5py.h5z.FILTER_FLETCHER32}
        and not data.is_virtual
        and data.external is None
        and data.file.userblock_size == 0
    )


def _offsets(
    data: h5py.Dataset,
    leading: int,
    has_rows: bool,
    piece: tuple[int, int],
    n_rows: int,
    n_steps: int,
) -> np.ndarray | None:
    """Return the first byte of each piece, None when one is not on the disk."""
    if data.chunks is None:
        offset = data.id.get_offset()
        return None if offset is None else np.array([[offset]], dtype=np.int64)
    if not hasattr(data.id, "chunk_iter"):  # HDF5 before 1.12.3
        return None
    found = np.full((-(-n_rows // piece[0]), -(-n_steps // piece[1])), -1, dtype=np.int64)

    def note(chunk: Any) -> None:
        place = chunk.chunk_offset[:leading]
        i = place[0] // piece[0] if has_rows else 0
        j = place[-1] // piece[1] if leading > has_rows else 0
        found[i, j] = chunk.byte_offset

    data.id.chunk_iter(note)
    return None if (found < 0).any() else found


def _copy(source: mmap.mmap, layout: _Layout, row: int, first: int, out: np.ndarray) -> None:
    assert layout.offsets is not None
    i, r = divmod(row, layout.piece[0])
    done, wanted = 0, len(out)
    while done < wanted:
        j, t = divmod(first + done, layout.piece[1])
        n = min(wanted - done, layout.piece[1] - t)
        offset = layout.offsets.item(i, j) + (r * layout.piece[1] + t) * layout.step_bytes
        values: np.ndarray = np.ndarray((n, *layout.shape), layout.dtype, source, offset)
        out[done : done + n] = values
        done += n
