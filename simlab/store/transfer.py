"""Data from elsewhere: files in The Well's format, and stores of an earlier format or profile.

Both go the way that solvers' data go, through a writer's segment and sealing: every value is
checked on its way, a crash leaves nothing half done, and calling again goes on. What is read is
never changed.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import h5py
import numpy as np

from simlab.core.errors import ConfigError, StoreError
from simlab.core.reports import Provenance
from simlab.core.samples import Sample
from simlab.store import shards
from simlab.store.schema import Axis, Boundary, FieldSpec, Schema
from simlab.store.shards import exact_path, field_path
from simlab.store.solves import of_shard
from simlab.store.splits import SPLITS
from simlab.store.storage import Storage

if TYPE_CHECKING:
    from simlab.store.segments import Writer
    from simlab.store.store import SnapshotStore

__all__ = ["adopt", "migrate", "n_trajectories", "schema_of"]

_log = logging.getLogger("simlab.store")
_PROVENANCE = (
    "order",
    "chain",
    "iterations",
    "operator_applies",
    "pc_applies",
    "true_relres",
    "seconds",
    "solver",
)


def n_trajectories(path: Path) -> int:
    """Return how many trajectories a file in The Well's format has."""
    with _opened(path) as file:
        return int(file.attrs["n_trajectories"])


def schema_of(path: Path) -> Schema:
    """Return the schema of a file in The Well's format.

    Raises
    ------
    ConfigError
        When it has what a store cannot keep; names every such thing.
    StoreError
        When it is not such a file.
    """
    with _opened(path) as file:
        dims = [str(name) for name in file["dimensions"].attrs["spatial_dims"]]
        faults = _faults(file, dims)
        if faults:
            raise ConfigError(faults, f"{path}: cannot be adopted")
        scalars = file["scalars"]
        swept = {name: bool(item.attrs["sample_varying"]) for name, item in scalars.items()}
        return Schema(
            str(file.attrs["dataset_name"]),
            tuple(
                Axis(
                    name,
                    tuple(file["dimensions"][name][:].astype(np.float64).tolist()),
                    str(file["dimensions"][name].attrs.get("units", "1")),
                )
                for name in dims
            ),
            tuple(_specs(file)),
            times=tuple(file["dimensions/time"][:].astype(np.float64).tolist()),
            parameters={
                name: str(scalars[name].attrs.get("units", "1")) for name in swept if swept[name]
            },
            constants={name: float(scalars[name][()]) for name in swept if not swept[name]},
            boundaries=tuple(
                Boundary(str(item.attrs["associated_dims"][0]), _kind(item))
                for item in file["boundary_conditions"].values()
            ),
        )


def adopt(store: SnapshotStore, path: Path, *, split: str | None = None) -> list[int]:
    """Take the trajectories of a file in The Well's format into a store; return their ids.

    They get the lowest ids that are free, one per row, and lie in new, sealed shards afterwards;
    where a row came from is in its provenance. Rows that were adopted before are left out. No
    other writer may be at work. Values that boundary conditions have are not kept.

    Parameters
    ----------
    split : {"train", "valid", "test"}, optional
        Take ids of this split only.

    Raises
    ------
    ConfigError
        When the file does not have the store's schema, or too few ids are free.
    """
    found = schema_of(path)
    faults = _mismatches(store.schema, found)
    if faults:
        raise ConfigError(faults, f"{path}: is not of this campaign")
    with open(path, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    store.refresh()
    have = _adopted(store, digest)
    rows = [row for row in range(n_trajectories(path)) if row not in have]
    taken = store.done() | set(store.failed())
    wanted = range(store.n) if split is None else store.ids(split).tolist()
    free = [traj for traj in wanted if traj not in taken]
    if len(free) < len(rows):
        raise ConfigError(
            f"{path}: has {len(rows)} trajectories, of the store's ids {len(free)} are free"
            f"{f' in {split}' if split else ''}; adopt it into a larger store"
        )
    ids = free[: len(rows)]
    with _opened(path) as file, store.writer() as writer:
        for traj, row in zip(ids, rows, strict=True):
            origin = {"adopted": {"file": path.name, "sha256": digest, "row": row}}
            _adopt_row(writer, store, file, traj, row, origin)
    store.seal(final=True)
    return ids


def migrate(
    store: SnapshotStore, target: str | Path, *, profile: str | None = None
) -> SnapshotStore:
    """Write a store's sealed data anew, in this format; the old store is left as it is.

    Ids, splits, samples, values and solves stay; attempts begin at 1 again. Every new field has
    the CRC that the old one had. Calling again goes on where a killed call was.

    Parameters
    ----------
    target : str or Path
        Directory of the new store.
    profile : str, optional
        Storage profile of the new store, if it is to be another one.

    Raises
    ------
    StoreError
        When the old store has data that are not sealed, or damaged.
    """
    if store.status().n_unsealed:
        raise StoreError(f"{store.path}: not all is sealed; run `simlab store seal --final` first")
    kept = store.storage
    new = type(store).create(
        target,
        store.schema,
        n=store.n,
        seed=store.seed,
        split=store.fractions,
        config=store.config,
        storage=Storage(profile or kept.profile, kept.float64),
    )
    new.recover()
    ended = new.done() | set(new.failed())
    places = {name: store.split(name).places() for name in store.fractions}
    wanted = {place for found in places.values() for place in found}
    with new.writer() as writer:
        for shard in store.catalogue.live_shards:
            is_failed = shard.split == "failed"
            rows = [
                row
                for row, traj in enumerate(shard.traj.tolist())
                if traj not in ended
                and ((shard.name, row) in wanted or (is_failed and _is_last(store, shard, row)))
            ]
            if rows:
                shards.inspect(store.path / "data" / shard.name, store.schema)
                _migrate_rows(writer, store, shard, rows)
                new.seal()
    left = [
        [traj, 1, reason]
        for traj, reason in store.failed().items()
        if traj not in new.failed() and traj not in new.done()
    ]
    new.seal(final=True)
    if left:
        new.manifest.append({"kind": "failed", "failed": left})
    _compare(store, new)
    return new


def _opened(path: Path) -> h5py.File:
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise StoreError(f"{path}: cannot be read ({error})") from error
    missing = [name for name in ("dataset_name", "n_trajectories") if name not in file.attrs]
    missing += [
        name
        for name in ("dimensions/time", "boundary_conditions", "scalars", "t0_fields")
        if name not in file
    ]
    if missing:
        file.close()
        raise StoreError(f"{path}: not in The Well's format, it has no {', '.join(missing)}")
    return file


def _faults(file: h5py.File, dims: list[str]) -> list[str]:
    """Return what a file has that a schema cannot say."""
    faults = []
    if file.attrs.get("grid_type", "cartesian") != "cartesian":
        faults.append(f"grid_type {file.attrs['grid_type']}; only cartesian grids are kept")
    for name in ("time", *dims):
        if file["dimensions"][name].ndim != 1:
            faults.append(f"dimensions/{name} varies; one grid and one set of times are kept")
    for name, item in file["scalars"].items():
        if item.attrs["time_varying"]:
            faults.append(f"scalars/{name} varies in time; scalars of a sample are kept")
    for name, item in file["boundary_conditions"].items():
        mask = item["mask"][()]
        ends = np.flatnonzero(mask).tolist() if mask.ndim == 1 else None
        if ends != [0, len(mask) - 1] or len(item.attrs["associated_dims"]) != 1:
            faults.append(f"boundary_conditions/{name}: only both ends of an axis are kept")
        elif np.isfinite(item["values"][()]).any():
            _log.warning("%s: values of boundary %s are not kept", file.filename, name)
    return faults


def _kind(boundary: h5py.Group) -> Literal["periodic", "wall", "open"]:
    kind = str(boundary.attrs["bc_type"]).lower()
    if kind not in ("periodic", "wall", "open"):
        raise ConfigError(f"{boundary.name}: unknown kind {kind!r}")
    return cast(Literal["periodic", "wall", "open"], kind)


def _specs(file: h5py.File) -> Iterator[FieldSpec]:
    for order in range(3):
        group = file.get(f"t{order}_fields", {})
        for name in group:
            attrs = group[name].attrs
            yield FieldSpec(
                name,
                "output" if attrs["time_varying"] else "input",
                order,
                str(attrs.get("units", "1")),
                str(attrs.get("long_name", "")),
            )


def _mismatches(schema: Schema, found: Schema) -> list[str]:
    faults = []
    if [axis.name for axis in schema.axes] != [axis.name for axis in found.axes] or not all(
        _same(a.coordinates, b.coordinates) for a, b in zip(schema.axes, found.axes, strict=False)
    ):
        faults.append(f"its grid {found.shape} is not the store's {schema.shape}")
    if not _same(schema.times, found.times):
        faults.append(f"its {len(found.times)} times are not the store's {len(schema.times)}")
    ours, theirs = (
        sorted(f"{spec.name} ({spec.role}, order {spec.order})" for spec in item.fields)
        for item in (schema, found)
    )
    if ours != theirs or any(spec.location == "vertex" for spec in schema.fields):
        faults.append(f"its fields {', '.join(theirs)} are not the store's {', '.join(ours)}")
    if set(schema.parameters) != set(found.parameters):
        faults.append(
            f"its swept scalars {', '.join(found.parameters) or 'none'} are not the store's "
            f"{', '.join(schema.parameters) or 'none'}"
        )
    constants = (
        {name: np.float32(value) for name, value in item.constants.items()}
        for item in (schema, found)
    )
    if next(constants) != next(constants):
        faults.append(f"its constants {found.constants} are not the store's {schema.constants}")
    return faults


def _same(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    """Return whether numbers are equal in single precision, that of The Well's files."""
    return np.array_equal(np.asarray(ours, np.float32), np.asarray(theirs, np.float32))


def _adopted(store: SnapshotStore, digest: str) -> set[int]:
    """Return the rows of a file that the store has already."""
    found = set()
    for split in (store.split(name) for name in store.fractions):
        for name, row in split.places():
            origin = _origin(store, name, row).get("adopted", {})
            if origin.get("sha256") == digest:
                found.add(int(origin["row"]))
    return found


def _origin(store: SnapshotStore, name: str, row: int) -> dict[str, Any]:
    text: Any = store.files.values(name, "simlab/trajectory_provenance", row)
    found: dict[str, Any] = json.loads(text)
    return found


def _adopt_row(
    writer: Writer,
    store: SnapshotStore,
    file: h5py.File,
    traj: int,
    row: int,
    origin: Mapping[str, Any],
) -> None:
    schema = store.schema
    values = {spec.name: _row_of(file, schema, spec, row) for spec in schema.fields}
    parameters = {name: float(file["scalars"][name][row]) for name in schema.parameters}
    inputs = {spec.name: values[spec.name] for spec in schema.inputs}
    writer.begin(Sample(traj, store.seed, parameters, inputs), provenance=origin)
    for step, time in enumerate(schema.times):
        writer.append(
            traj, step, time, {spec.name: values[spec.name][step] for spec in schema.outputs}
        )
    writer.finish(traj)


def _row_of(file: h5py.File, schema: Schema, spec: FieldSpec, row: int) -> np.ndarray:
    """Return one field of one trajectory on the whole grid, also where the file leaves axes out."""
    data = file[field_path(spec)]
    values = data[row] if data.attrs["sample_varying"] else data[()]
    lead = 1 if data.attrs["time_varying"] else 0
    for number, varies in enumerate(data.attrs["dim_varying"]):
        if not varies:
            values = np.expand_dims(values, lead + number)
    time = (len(schema.times),) if lead else ()
    return np.broadcast_to(values, (*time, *schema.field_shape(spec)))


def _is_last(store: SnapshotStore, shard: Any, row: int) -> bool:
    """Return whether a row of a shard of failures is the last attempt at its trajectory."""
    traj = int(shard.traj[row])
    is_done = store.catalogue.done_attempts[traj] > 0
    return not is_done and store.catalogue.failed[traj][0] == int(shard.attempt[row])


def _migrate_rows(writer: Writer, store: SnapshotStore, shard: Any, rows: list[int]) -> None:
    schema = store.schema
    path = exact_path if store.storage.float64 else field_path
    solves = of_shard(store.files, shard.name, np.asarray(rows)).reshape(len(rows), -1)
    for row, solved in zip(rows, solves, strict=True):
        traj = int(shard.traj[row])
        values = {
            spec.name: store.files.values(shard.name, path(spec), row) for spec in schema.fields
        }
        sample = store.files.sample(shard.name, row)
        inputs = {spec.name: values[spec.name] for spec in schema.inputs}
        origin = _origin(store, shard.name, row)
        origin["migrated"] = {"campaign": store.uuid, "attempt": int(shard.attempt[row])}
        writer.begin(Sample(traj, sample.seed, sample.parameters, inputs), provenance=origin)
        for step in range(shard.n_steps):
            fields = {spec.name: values[spec.name][step] for spec in schema.outputs}
            solve = Provenance(**{name: solved[name][step].item() for name in _PROVENANCE})
            writer.append(traj, step, schema.times[step], fields, solve=solve)
        if shard.split == "failed":
            writer.fail(traj, shard.reasons[row])
        else:
            writer.finish(traj)


def _compare(old: SnapshotStore, new: SnapshotStore) -> None:
    """Raise StoreError unless both stores hold the same trajectories with the same CRCs."""
    for name in SPLITS:
        ours, theirs = new.split(name), old.split(name)
        if not np.array_equal(ours.ids, theirs.ids):
            raise StoreError(f"{new.path}: {name} does not hold what {old.path} holds")
        pairs = zip(ours.ids.tolist(), ours.places(), theirs.places(), strict=True)
        for traj, here, there in pairs:
            for table in ("simlab/crc32", "simlab/input_crc32"):
                if not np.array_equal(
                    new.files.values(here[0], table, here[1]),
                    old.files.values(there[0], table, there[1]),
                ):
                    raise StoreError(f"{new.path}: trajectory {traj} is not what {old.path} holds")
