"""The user's own coefficient fields, read from a file with samples along the first axis.

Formats: ``.npy``, ``.npz``, HDF5 (``.h5``, ``.hdf5``), MATLAB ``.mat`` (through scipy up to version
7, through h5py for 7.3, whose reversed axes are put back) and ``.pt`` (tensors only, never code).
``.npy`` and HDF5 are read row by row, the others whole. A file's points are taken as the centres of
equal cells of the unit box; nothing is resampled, and no flag gets a value, unless asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import NonNegativeInt, PositiveFloat

from simlab.core.config import nearest
from simlab.core.errors import ConfigError, DependencyError
from simlab.problems.fields import Draw, fields

__all__ = ["FileFields", "resample"]

_HDF5 = (".h5", ".hdf5", ".hdf")
_FORMATS = (".npy", ".npz", *_HDF5, ".mat", ".pt", ".pth")
_CHUNK_BYTES = 64 * 2**20


@fields.register("file")
class FileFields:
    """Fields from a file: sample ``i`` is row ``start + i``, whatever the seed.

    Attributes
    ----------
    file : Path
        Absolute, or relative to the current directory.
    dataset : str
        Name of the array inside the file; may be left out when the file holds only one.
    resample : {"", "nearest", "linear", "area"}
        How to bring the file's grid to the family's, when they differ: value at the nearest centre,
        interpolation between centres, or average over the new cell. "" refuses.
    phase_values : (float, float), optional
        Coefficients of the flags false and true (0 and 1); needed for boolean data.
    start : int
        Rows to skip.
    """

    file: Path
    dataset: str = ""
    resample: Literal["", "nearest", "linear", "area"] = ""
    phase_values: tuple[PositiveFloat, PositiveFloat] | None = None
    start: NonNegativeInt = 0

    kind: ClassVar[str]
    parameters: ClassVar[tuple[str, ...]] = ()

    def draw(
        self, shape: tuple[int, ...], n: int, seed: int, start: int = 0, name: str = "a"
    ) -> list[Draw]:
        """Return rows ``self.start + start ..``, checked, on the grid ``shape``.

        Raises
        ------
        ConfigError
            When the file has not got them, or has values that are not positive and finite.
        """
        with _opened(self.file, self.dataset) as stack:
            self._check_layout(stack, shape)
            first = self.start + start
            if first + n > stack.shape[0]:
                raise ConfigError(
                    f"{stack.name}: holds {stack.shape[0]} fields, but {first + n} are asked for; "
                    f"there are enough for n = {max(stack.shape[0] - self.start, 0)} samples"
                )
            rows = self._values(stack, first, first + n)
        if rows.shape[1:] != shape:
            rows = resample(rows, shape, self.resample or "nearest")
        return [Draw(row) for row in rows]

    def contains(self, values: np.ndarray, parameters: Mapping[str, float]) -> bool:
        """Return whether every value is positive and finite."""
        return bool(np.all(np.isfinite(values)) and np.all(values > 0))

    def validate(self, shape: tuple[int, ...]) -> None:
        """Read every row once, so that a bad value stops the job before work starts."""
        with _opened(self.file, self.dataset) as stack:
            self._check_layout(stack, shape)
            if self.start >= stack.shape[0]:
                raise ConfigError(
                    f"{stack.name}: start = {self.start} skips all {stack.shape[0]} fields"
                )
            rows = max(1, _CHUNK_BYTES // (8 * prod(stack.shape[1:])))
            for first in range(self.start, stack.shape[0], rows):
                self._values(stack, first, min(first + rows, stack.shape[0]))

    def _check_layout(self, stack: _Stack, shape: tuple[int, ...]) -> None:
        if stack.dtype.kind not in "biuf":
            raise ConfigError(f"{stack.name}: holds {stack.dtype}, expected real numbers")
        if len(stack.shape) != len(shape) + 1:
            hint = "; save it with a first axis of length 1" if stack.shape == shape else ""
            raise ConfigError(
                f"{stack.name}: has shape {stack.shape}, expected (samples, "
                f"{', '.join(map(str, shape))}){hint}"
            )
        if 0 in stack.shape:
            raise ConfigError(f"{stack.name}: is empty, its shape is {stack.shape}")
        if stack.shape[1:] != shape and not self.resample:
            raise ConfigError(
                f"{stack.name}: fields of shape {stack.shape[1:]} on a grid of {shape}; change the "
                'number of cells, or say resample = "nearest", "linear" or "area"'
            )
        if stack.dtype.kind == "b" and self.phase_values is None:
            raise ConfigError(
                f"{stack.name}: holds true/false flags, not coefficients; give "
                "phase_values = [value where false, value where true]"
            )

    def _values(self, stack: _Stack, first: int, last: int) -> np.ndarray:
        """Return rows as positive, finite float64, shape (rows, *file grid)."""
        raw = stack.read(first, last)
        if self.phase_values is not None:
            flags = (raw == 0) | (raw == 1)
            _refuse(stack, first, raw, flags, "phase_values are given, so it must be 0 or 1")
            return np.where(raw == 1, self.phase_values[1], self.phase_values[0])
        values = np.array(raw, dtype=np.float64, order="C")
        _refuse(stack, first, values, np.isfinite(values), "coefficients must be finite")
        reason = "coefficients must be positive"
        if np.all((values == 0) | (values == 1)):
            reason += "; for flags give phase_values = [value where 0, value where 1]"
        _refuse(stack, first, values, values > 0, reason)
        return values


def resample(
    values: np.ndarray, shape: tuple[int, ...], method: Literal["nearest", "linear", "area"]
) -> np.ndarray:
    """Bring cell values on the unit box from one grid to another, axis by axis.

    Parameters
    ----------
    values : ndarray, shape (n, *old)
    shape : tuple of int
        The new grid.
    method : {"nearest", "linear", "area"}
        ``linear`` is constant beyond the outermost centres; ``area`` keeps the integral.

    Returns
    -------
    ndarray, shape (n, *shape), float64, within the range of ``values``
    """
    values = np.asarray(values, dtype=np.float64)
    for axis, new in enumerate(shape, start=1):
        old = values.shape[axis]
        if old != new:
            moved = np.moveaxis(values, axis, 0)
            flat = _weights(old, new, method) @ moved.reshape(old, -1)
            values = np.moveaxis(flat.reshape(new, *moved.shape[1:]), 0, axis)
    return np.ascontiguousarray(values)


def _weights(old: int, new: int, method: str) -> Any:
    """Sparse matrix, shape (new, old), whose rows are averages."""
    from scipy import sparse

    centres = (np.arange(new) + 0.5) * old / new - 0.5  # in units of old cells, 0 = first centre
    if method == "nearest":
        column = np.clip(np.floor(centres + 0.5).astype(int), 0, old - 1)
        return sparse.csr_array((np.ones(new), (np.arange(new), column)), shape=(new, old))
    if method == "linear":
        centres = np.clip(centres, 0, old - 1)
        left = np.minimum(np.floor(centres).astype(int), max(old - 2, 0))
        right = np.minimum(left + 1, old - 1)
        part = centres - left
        rows = np.concatenate([np.arange(new)] * 2)
        entries = np.concatenate([1 - part, part])
        return sparse.csr_array((entries, (rows, np.concatenate([left, right]))), shape=(new, old))
    edges = np.arange(new + 1) * old / new
    cells = np.arange(old)
    overlap = np.minimum(edges[1:, None], cells + 1) - np.maximum(edges[:-1, None], cells)
    overlap = np.maximum(overlap, 0)
    return sparse.csr_array(overlap / overlap.sum(axis=1, keepdims=True))


def _refuse(
    stack: _Stack, first: int, values: np.ndarray, accepted: np.ndarray, reason: str
) -> None:
    """Raise ConfigError naming the first value that is not accepted."""
    if not accepted.all():
        where = np.unravel_index(int(np.argmin(accepted)), values.shape)
        cell = ", ".join(str(int(i)) for i in where[1:])
        raise ConfigError(
            f"{stack.name}: sample {first + int(where[0])} holds {values[where].item()!r} at cell "
            f"({cell}); {reason}"
        )


@dataclass(frozen=True)
class _Stack:
    """An array in a file: its full name, shape, type and a reader of rows ``first .. last - 1``."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[int, int], np.ndarray]


@contextmanager
def _opened(path: Path, dataset: str) -> Iterator[_Stack]:
    """Open one array of a file for reading; what goes wrong becomes a ConfigError."""
    if not path.is_file():
        what = "is not a file" if path.exists() else "no such file"
        raise ConfigError(f"{path}: {what} (current directory {Path.cwd()})")
    if path.suffix.lower() not in _FORMATS:
        raise ConfigError(f"{path}: cannot tell its format; known: {', '.join(_FORMATS)}")
    with ExitStack() as cleanup:
        try:
            stack = _open(path, dataset, cleanup)
        except (ConfigError, DependencyError):
            raise
        except Exception as error:  # parsers of foreign bytes raise anything
            text = " ".join(str(error).split())[:200]
            raise ConfigError(f"{path}: cannot be read: {type(error).__name__}: {text}") from error
        yield stack


def _open(path: Path, dataset: str, cleanup: ExitStack) -> _Stack:
    suffix = path.suffix.lower()
    if suffix == ".npy":
        if dataset:
            raise ConfigError(f"{path}: a .npy file holds one array; leave dataset out")
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        return _Stack(str(path), array.shape, array.dtype, lambda i, j: array[i:j])
    if suffix in _HDF5 or _is_matlab_hdf5(path):
        return _open_hdf5(path, dataset, cleanup)
    whole = _whole(path.resolve(), dataset, path.stat().st_mtime_ns)
    name = f"{path}, dataset {dataset!r}" if dataset else str(path)
    return _Stack(name, whole.shape, whole.dtype, lambda i, j: whole[i:j])


def _is_matlab_hdf5(path: Path) -> bool:
    if path.suffix.lower() != ".mat":
        return False
    import h5py

    return bool(h5py.is_hdf5(path))


def _open_hdf5(path: Path, dataset: str, cleanup: ExitStack) -> _Stack:
    import h5py

    file = cleanup.enter_context(h5py.File(path, "r"))
    names: list[str] = []
    file.visititems(lambda name, item: names.append(name) if hasattr(item, "dtype") else None)
    key = _chosen(path, dataset, names)
    item, name = file[key], f"{path}, dataset {key!r}"
    if path.suffix.lower() != ".mat":
        return _Stack(name, item.shape, item.dtype, lambda i, j: item[i:j])
    is_logical = item.attrs.get("MATLAB_class") == b"logical"
    dtype = np.dtype(bool) if is_logical else item.dtype
    # MATLAB stores the first axis fastest, so h5py shows the axes reversed.
    return _Stack(name, item.shape[::-1], dtype, lambda i, j: item[..., i:j].astype(dtype).T)


@lru_cache(maxsize=2)
def _whole(path: Path, dataset: str, modified: int) -> np.ndarray:
    """Read an array of a format that cannot be read in part; kept while the file is unchanged."""
    suffix = path.suffix.lower()
    if suffix == ".npz":
        with np.load(path, allow_pickle=False) as archive:
            return np.asarray(archive[_chosen(path, dataset, archive.files)])
    if suffix == ".mat":
        from scipy import io

        classes = {name: kind for name, _, kind in io.whosmat(path)}
        name = _chosen(path, dataset, classes)
        array = np.asarray(io.loadmat(path, variable_names=[name])[name])
        return array.astype(bool) if classes[name] == "logical" else array
    try:
        import torch
    except ImportError as error:
        raise DependencyError(
            f"{path}: reading it needs torch ({error}); pip install torch"
        ) from None
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(loaded, Mapping):
        tensors = {key: item for key, item in loaded.items() if isinstance(item, torch.Tensor)}
        loaded = tensors[_chosen(path, dataset, tensors)]
    elif dataset:
        raise ConfigError(f"{path}: holds one unnamed tensor; leave dataset out")
    if loaded.is_floating_point():
        loaded = loaded.double()
    return np.asarray(loaded.numpy(force=True))


def _chosen(path: Path, dataset: str, names: Iterable[str]) -> str:
    """Return the dataset to read, or raise ConfigError that lists what there is."""
    known = [name for name in names if not str(name).startswith("#")]
    if dataset in known:
        return dataset
    if not known:
        raise ConfigError(f"{path}: holds no array")
    listed = ", ".join(sorted(map(str, known)))
    if dataset:
        hint = nearest(dataset, map(str, known)) if len(known) > 1 else ""
        hint = hint if "did you mean" in hint else ""
        raise ConfigError(f"{path}: no dataset {dataset!r}{hint}; it holds {listed}")
    if len(known) > 1:
        raise ConfigError(f"{path}: holds several arrays, choose one with dataset: {listed}")
    return known[0]
