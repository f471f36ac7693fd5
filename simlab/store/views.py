"""Views: derived files of virtual datasets, which hold no values, only where they are.

Sources are named relative to the view, so a campaign can be moved as a whole. Where a source is
missing a view reads NaN, never zero; :func:`verify_view` says so before anyone trains on it. Views
can be deleted and made again at any time. :func:`master` shows all shards as one;
:mod:`.pdebench` has the layouts of PDEBench's loaders.

The Well's loader opens files in a way that does not find the sources of virtual datasets, and would
read the fill value without a word: give it the shards.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np

from simlab.core.errors import StoreError
from simlab.store import files
from simlab.store.drafts import Draft
from simlab.store.schema import FieldSpec
from simlab.store.shards import field_path
from simlab.store.splits import SPLITS
from simlab.store.storage import stored_dtype

if TYPE_CHECKING:
    from simlab.store.store import SnapshotStore

__all__ = ["TEXT", "draft", "master", "places", "show", "verify_view"]

TEXT = h5py.string_dtype()
_Place = tuple[str, int]


def places(store: SnapshotStore, order: Sequence[str]) -> tuple[list[_Place], dict[str, int]]:
    """Return shard and row of every sealed trajectory by split and id, and how many a split has.

    Raises
    ------
    StoreError
        When nothing is sealed.
    """
    splits = {name: store.split(name) for name in order if name in store.fractions}
    found = [place for split in splits.values() for place in split.places()]
    if not found:
        raise StoreError(f"{store.path}: nothing is sealed yet; run `simlab store seal --final`")
    return found, {name: len(split) for name, split in splits.items()}


@contextmanager
def draft(store: SnapshotStore, name: str) -> Iterator[tuple[h5py.File, Path]]:
    """Write a view under another name and rename it when it is whole; gives the file and path."""
    path = store.path / "views" / name
    unfinished = path.with_name(f".{name}.{files.process_id()}")
    with files.reported(path):
        path.parent.mkdir(exist_ok=True)
        fd = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            room = Draft(fd)
            with h5py.File(room, "w", libver=("v110", "v110")) as file:
                file.attrs["simlab_campaign"] = store.uuid
                yield file, path
            room.finish()
            files.rename(unfinished, path)
        finally:
            os.close(fd)
            files.unlink(unfinished)


def show(
    file: h5py.File,
    dataset: str,
    store: SnapshotStore,
    spec: FieldSpec,
    rows: Sequence[_Place],
    component: int | None = None,
) -> h5py.Dataset:
    """Make a virtual dataset (B, [T,] *grid, ...) of one field; ``component`` picks of a vector."""
    shape = store.schema.field_shape(spec)
    time = (len(store.schema.times),) if spec.role == "output" else ()
    dtype = stored_dtype(spec)
    shown = shape if component is None else shape[:-1]
    layout = h5py.VirtualLayout((len(rows), *time, *shown), dtype=dtype)
    sizes = {shard.name: len(shard.traj) for shard in store.catalogue.live_shards}
    for at, name, first, count in _runs(rows):
        source = h5py.VirtualSource(
            f"../data/{name}", field_path(spec), (sizes[name], *time, *shape), dtype=dtype
        )
        block = slice(first, first + count)
        layout[at : at + count] = source[block if component is None else (block, ..., component)]
    return file.create_virtual_dataset(dataset, layout, fillvalue=np.nan)


def master(store: SnapshotStore) -> Path:
    """Make ``views/master.h5``, all sealed trajectories as one file; return its path.

    Fields have the names and shapes they have in shards, with all trajectories along the first
    axis, train before valid before test and as they lie in their shards. ``simlab/traj_id`` and
    ``simlab/split`` say which is which, ``simlab/parameters`` has their exact parameters.
    """
    schema = store.schema
    found, counts = places(store, SPLITS)
    ends = np.cumsum([0, *counts.values()])
    rows = [place for a, b in pairwise(ends) for place in sorted(found[a:b])]
    with draft(store, "master.h5") as (file, path):
        file.attrs["dataset_name"] = schema.name
        file.attrs["simlab_view"] = "master"
        file.attrs.update({f"n_{name}": count for name, count in counts.items()})
        file["dimensions/time"] = np.asarray(schema.times, dtype=np.float32)
        for axis in schema.axes:
            file[f"dimensions/{axis.name}"] = np.asarray(axis.coordinates, dtype=np.float32)
            file[f"dimensions/{axis.name}"].attrs["units"] = axis.units
        file["dimensions"].attrs["spatial_dims"] = np.array([a.name for a in schema.axes], TEXT)
        for spec in schema.fields:
            made = show(file, field_path(spec), store, spec, rows)
            made.attrs.update({"units": spec.units, "long_name": spec.long_name or spec.name})
        shards = {name: store.files.get(name) for name in dict.fromkeys(n for n, _ in rows)}
        file["simlab/traj_id"] = np.array([shards[name].traj[row] for name, row in rows])
        file["simlab/split"] = np.repeat(np.array(list(counts), TEXT), list(counts.values()))
        parameters = np.array([shards[name].parameters[row] for name, row in rows])
        file["simlab/parameters"] = parameters
        file["simlab/parameters"].attrs["names"] = np.array(list(schema.parameters), TEXT)
    return path


def verify_view(store: SnapshotStore, path: Path) -> list[str]:
    """Return what is wrong with a view of whatever layout, one line each; nothing when it is good.

    Every source must be a shard that counts, as long as it was sealed. Of each, one row of every
    field is read directly and through the view; both must be equal and have the CRC that was
    sealed.
    """
    store.catalogue.refresh()
    problems: dict[str, None] = {}
    try:
        with h5py.File(path, "r") as file:
            if file.attrs.get("simlab_campaign") != store.uuid:
                return [f"{path}: not a view of {store.path}; make it again"]
            check = _Check(store, path)
            virtual: list[h5py.Dataset] = []
            file.visititems(
                lambda _, item: virtual.append(item) if _is_virtual(item) else None,
            )
            if not virtual:
                return [f"{path}: shows nothing; make it again"]
            for dataset in virtual:
                problems |= dict.fromkeys(check.dataset(dataset))
    except (OSError, KeyError, ValueError) as error:
        problems[f"{path}: cannot be read ({error}); make it again"] = None
    return list(problems)


def _is_virtual(item: Any) -> bool:
    return isinstance(item, h5py.Dataset) and item.is_virtual


class _Check:
    """Holds the datasets of one view against the shards they show, each field of a shard once."""

    def __init__(self, store: SnapshotStore, path: Path) -> None:
        self._store = store
        self._path = path
        self._shards = {shard.name: shard for shard in store.catalogue.live_shards}
        self._checked: set[tuple[str, ...]] = set()

    def dataset(self, dataset: h5py.Dataset) -> Iterator[str]:
        for mapped in dataset.virtual_sources():
            source = Path(os.path.normpath(self._path.parent / mapped.file_name))
            name = f"{source.parent.name}/{source.name}"
            fault = self._source(name, source)
            if fault:
                yield f"{self._path.name}: source data/{name} {fault}"
                continue
            group, _, column = dataset.name.rpartition("/")
            key = (name, mapped.dset_name, column if group == "" else "")
            if key not in self._checked:
                self._checked.add(key)
                fault = self._values(dataset, mapped, source)
                if fault:
                    yield f"{self._path.name}: {dataset.name.strip('/')} {fault} data/{name}"

    def _source(self, name: str, source: Path) -> str:
        if not source.is_file():
            return "is missing"
        if name not in self._shards:
            return "does not count any more; make the view again"
        size = source.stat().st_size
        sealed = self._shards[name].n_bytes
        return "" if size == sealed else f"has {size} bytes, {sealed} were sealed"

    def _values(self, dataset: h5py.Dataset, mapped: Any, source: Path) -> str:
        low, high = mapped.src_space.get_select_bounds()
        first, last = mapped.vspace.get_select_bounds()
        where = [slice(a, b + 1) for a, b in zip(first, last, strict=True)]
        if high[0] > low[0]:  # several rows: then the first axis of the view is that of rows
            where[0] = slice(first[0], first[0] + 1)
        with h5py.File(source, "r") as shard:
            row = np.ascontiguousarray(shard[mapped.dset_name][low[0]])
            steps, crcs = _sealed(shard, mapped.dset_name.rpartition("/")[2], low[0], row)
        if [zlib.crc32(step.data) for step in steps] != crcs:
            return "shows what was not sealed:"
        direct = row[tuple(slice(a, b + 1) for a, b in zip(low[1:], high[1:], strict=True))]
        through = dataset[tuple(where)]
        if through.size != direct.size or not np.array_equal(through.reshape(-1), direct.ravel()):
            return "is not what lies in"
        return ""


def _sealed(
    shard: h5py.File, field: str, row: int, values: np.ndarray
) -> tuple[list[np.ndarray], list[int]]:
    """Return the steps of a row of one field and their CRCs."""
    for name in ("crc32", "input_crc32"):
        crcs = shard["simlab"][name]
        fields = list(crcs.attrs["fields"])
        if field in fields:
            steps = list(values) if name == "crc32" else [values]
            return steps, crcs[row][..., fields.index(field)].reshape(-1).tolist()
    raise KeyError(field)


def _runs(rows: Sequence[_Place]) -> Iterator[tuple[int, str, int, int]]:
    """Join neighbours: yields position in the view, shard, first row in it, number of rows."""
    start = 0
    for at in range(1, len(rows) + 1):
        name, row = rows[at - 1]
        if at == len(rows) or rows[at] != (name, row + 1):
            yield start, rows[start][0], rows[start][1], at - start
            start = at
