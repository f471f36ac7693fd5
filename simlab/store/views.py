"""PDEBench views: derived files that show sealed data the way PDEBench's loaders expect it.

A view is a virtual dataset: it holds no values, only where they are, relative to itself. Where a
source is missing it reads NaN, never zero; :func:`verify_pdebench` says so before anyone trains on
it. Views can be deleted and made again at any time.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import h5py
import numpy as np

from simlab.core.errors import ConfigError, StoreError
from simlab.store.schema import FieldSpec
from simlab.store.shards import field_path
from simlab.store.splits import SPLITS

if TYPE_CHECKING:
    from simlab.store.store import SnapshotStore

__all__ = ["pdebench", "verify_pdebench"]


def pdebench(store: SnapshotStore, *, nu: str | None = None, tensor: str | None = None) -> Path:
    """Make the PDEBench view of a stationary 2-D campaign (its Darcy layout); return its path.

    The file has ``nu`` (B, X, Y), ``tensor`` (B, 1, X, Y) and the coordinates. Rows are ordered
    test, valid, train, as PDEBench's loader takes its test samples from the front; the attributes
    ``n_test``, ``n_valid`` and ``n_train`` say how many there are.

    Parameters
    ----------
    nu, tensor : str, optional
        Names of the input and the output field; needed when the schema has several scalar ones.

    Raises
    ------
    ConfigError
        When the campaign does not have this layout.
    """
    schema = store.schema
    if schema.n_dims != 2 or len(schema.times) != 1:
        raise ConfigError(
            f"view pdebench: needs a stationary 2-D campaign, {schema.name} has {schema.n_dims} "
            f"dimensions and {len(schema.times)} stored times"
        )
    names = [name for name in reversed(SPLITS) if name in store.fractions]
    splits = [store.split(name) for name in names]
    rows = [place for split in splits for place in split.places()]
    if not rows:
        raise StoreError(f"{store.path}: nothing is sealed yet; run `simlab store seal --final`")
    path = store.path / "views" / f"pdebench_{schema.name}.hdf5"
    path.parent.mkdir(exist_ok=True)
    given = _pick(schema.inputs, nu, "nu")
    solved = _pick(schema.outputs, tensor, "tensor")
    draft = path.with_name(f".{path.name}")
    with h5py.File(draft, "w", libver=("v110", "v110")) as file:
        _virtual(file, "nu", store, given, rows)
        _virtual(file, "tensor", store, solved, rows)
        for axis in schema.axes:
            file[f"{axis.name}-coordinate"] = np.asarray(axis.coordinates, dtype=np.float32)
        for name, split in zip(names, splits, strict=True):
            file.attrs[f"n_{name}"] = len(split)
        file["simlab/shards"] = np.array([name for name, _ in rows], dtype=h5py.string_dtype())
        file["simlab/rows"] = np.array([row for _, row in rows])
        file["simlab/fields"] = np.array([given.name, solved.name], dtype=h5py.string_dtype())
    draft.replace(path)
    return path


def verify_pdebench(store: SnapshotStore, path: Path) -> list[str]:
    """Return what is wrong with a view: missing sources, or values that are not what was sealed.

    Reads one row of each shard through the view and holds it against the shard's own CRC.
    """
    problems = []
    try:
        with h5py.File(path, "r") as file:
            shards = file["simlab/shards"].asstr()[:]
            rows = file["simlab/rows"][:]
            given, solved = file["simlab/fields"].asstr()[:]
            for name in dict.fromkeys(shards.tolist()):
                at = int(np.flatnonzero(shards == name)[0])
                source = store.path / "data" / name
                if not source.is_file():
                    problems.append(f"{path.name}: source data/{name} is missing")
                    continue
                for dataset, field in (("nu", given), ("tensor", solved)):
                    found = zlib.crc32(np.ascontiguousarray(file[dataset][at]).data)
                    if found != _crc(source, field, int(rows[at])):
                        problems.append(f"{path.name}: {dataset}[{at}] is not what {name} holds")
    except (OSError, KeyError) as error:
        problems.append(f"{path}: cannot be read ({error}); make it again")
    return problems


def _crc(source: Path, field: str, row: int) -> int:
    with h5py.File(source, "r") as shard:
        for name in ("crc32", "input_crc32"):
            crcs = shard["simlab"][name]
            fields = list(crcs.attrs["fields"])
            if field in fields:
                return int(crcs[row].reshape(-1)[fields.index(field)])
    raise KeyError(field)


def _pick(specs: Iterable[FieldSpec], name: str | None, what: str) -> FieldSpec:
    """Return the field that is named, or the only scalar one on the grid."""
    scalars = [spec for spec in specs if spec.order == 0 and spec.location == "grid"]
    found = [spec for spec in scalars if name in (None, spec.name)]
    if len(found) != 1:
        raise ConfigError(
            f"view pdebench: {what} must be one scalar field, given {name!r}; "
            f"there are: {', '.join(spec.name for spec in scalars) or 'none'}"
        )
    return found[0]


def _virtual(
    file: h5py.File,
    dataset: str,
    store: SnapshotStore,
    spec: FieldSpec,
    rows: list[tuple[str, int]],
) -> None:
    shape = store.schema.field_shape(spec)
    time = (1,) if spec.role == "output" else ()
    layout = h5py.VirtualLayout((len(rows), *time, *shape), dtype=np.float32)
    sizes = {shard.name: len(shard.traj) for shard in store.catalogue.live_shards}
    for at, name, first, count in _runs(rows):
        source = h5py.VirtualSource(
            f"../data/{name}", field_path(spec), (sizes[name], *time, *shape), dtype=np.float32
        )
        layout[at : at + count] = source[first : first + count]
    file.create_virtual_dataset(dataset, layout, fillvalue=np.nan)


def _runs(rows: list[tuple[str, int]]) -> Iterator[tuple[int, str, int, int]]:
    """Join neighbours: yields position in the view, shard, first row in it, number of rows."""
    start = 0
    for at in range(1, len(rows) + 1):
        name, row = rows[at - 1]
        if at == len(rows) or rows[at] != (name, row + 1):
            yield start, rows[start][0], rows[start][1], at - start
            start = at
