"""How a campaign's values are laid out in its shards: profile and precision.

=========== ========================================================================================
profile     layout
=========== ========================================================================================
``default`` chunks of whole steps, a checksum (fletcher32) in each
``fast``    contiguous, allocated early: a reader may map the file and find every step by
            arithmetic; checksums are those of the manifest and of ``simlab/crc32``
``archive`` chunks as in ``default``, compressed by HDF5's own shuffle and gzip
=========== ========================================================================================

All three are read by whatever reads HDF5: no filter is used that HDF5 does not bring along.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np

from simlab.core.config import nearest
from simlab.core.errors import ConfigError
from simlab.store.schema import FieldSpec

__all__ = ["PROFILES", "Storage", "create_dataset", "stored_dtype"]

PROFILES = ("default", "fast", "archive")
_GZIP_LEVEL = 4


def stored_dtype(spec: FieldSpec) -> np.dtype:
    """Return the type a field is stored in: float32 on the grid (The Well's), float64 on meshes."""
    return np.dtype("<f8" if spec.location == "vertex" else "<f4")


@dataclass(frozen=True)
class Storage:
    """Settings of a store that say how values are kept; fixed when it is made.

    Attributes
    ----------
    profile : {"default", "fast", "archive"}
    float64 : bool
        Keep the values of grid fields in double precision beside The Well's float32.
    """

    profile: str = "default"
    float64: bool = False

    def __post_init__(self) -> None:
        if self.profile not in PROFILES:
            raise ConfigError(
                f"unknown storage profile {self.profile!r}{nearest(self.profile, PROFILES)}"
            )

    def record_dtype(self, spec: FieldSpec) -> np.dtype:
        """Return the type of a field's records in segments."""
        return np.dtype("<f8") if self.float64 else stored_dtype(spec)

    def bytes_per_value(self) -> int:
        """Bytes that one value on the grid takes in a shard."""
        return 12 if self.float64 else 4

    def to_json(self) -> dict[str, Any] | None:
        """Return plain values; None for the defaults, which stores made before do not name."""
        if self == Storage():
            return None
        return {"profile": self.profile, "float64": self.float64}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any] | None) -> Storage:
        """Read :meth:`to_json`'s values."""
        return cls(**(plain or {}))


def create_dataset(
    file: h5py.File,
    path: str,
    shape: tuple[int, ...],
    dtype: np.dtype,
    chunks: tuple[int, ...],
    profile: str,
) -> h5py.Dataset:
    """Make the dataset of a field; ``chunks`` is what a profile with chunks takes."""
    if profile == "fast":
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_layout(h5py.h5d.CONTIGUOUS)
        plist.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        plist.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        parent, _, name = path.rpartition("/")
        group = file.require_group(parent)
        space = h5py.h5s.create_simple(shape)
        kind = h5py.h5t.py_create(dtype)
        return h5py.Dataset(h5py.h5d.create(group.id, name.encode(), kind, space, plist))
    packed: dict[str, Any] = {}
    if profile == "archive":
        packed = {"compression": "gzip", "compression_opts": _GZIP_LEVEL, "shuffle": True}
    return file.create_dataset(
        path, shape=shape, dtype=dtype, chunks=chunks, fletcher32=True, **packed
    )
