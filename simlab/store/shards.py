"""Sealed shards: immutable HDF5 files that The Well's loader reads as they are.

The Well's groups hold float32 fields, coordinates, scalars and boundary conditions; the group
``simlab`` holds what makes a row traceable and checkable (id, attempt, seed, exact parameters,
solver log, CRC of every stored field), ``mesh`` the fields on vertices, ``simlab/f64`` the double
precision twins of a store that keeps them. Chunks, where the profile (:mod:`.storage`) has them,
are whole steps of 64 KiB to 1 MiB. The root attribute ``n_trajectories`` is written last.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from simlab.core.errors import StoreError
from simlab.core.reports import Provenance
from simlab.store import files, solves
from simlab.store.drafts import Draft
from simlab.store.records import Record
from simlab.store.resampling import state_resampling
from simlab.store.schema import FieldSpec, Schema
from simlab.store.stats import Moments
from simlab.store.storage import Storage, create_dataset, stored_dtype

__all__ = ["READABLE", "SCHEMA", "Row", "exact_path", "field_path", "inspect", "write"]

SCHEMA = "simlab-store/2"
READABLE = ("simlab-store/1", SCHEMA)
_CHUNK_BYTES = 1 << 16
_PAGE_BYTES = 1 << 12  # a chunk is a power of two and four bytes of checksum: it takes a page more
_BLOCK_BYTES = 1 << 22
_TEXT = h5py.string_dtype()


@dataclass(eq=False)
class Row:
    """One ended trajectory in a segment: what becomes one row of a shard.

    Attributes
    ----------
    fd : int
        Open segment, from which the values are read.
    inputs : list of Record
        One per input field of the schema.
    steps : list of (list of Record, Provenance)
        Per step the output fields, and how it was solved.
    """

    traj: int
    attempt: int
    segment: str
    begin: int
    end: int
    sample: dict[str, Any]
    inputs: list[Record]
    steps: list[tuple[list[Record], Provenance]]
    fd: int
    status: str = "open"
    reason: str = ""


def field_path(spec: FieldSpec) -> str:
    """Return the dataset of a field inside a shard."""
    if spec.location == "vertex":
        return f"mesh/fields/{spec.name}"
    return f"t{spec.order}_fields/{spec.name}"


def exact_path(spec: FieldSpec) -> str:
    """Return the dataset of a field's values in double precision, where a store keeps them."""
    return field_path(spec) if spec.location == "vertex" else f"simlab/f64/{spec.name}"


def write(
    path: Path,
    schema: Schema,
    rows: Sequence[Row],
    *,
    campaign: str,
    seed: int,
    config: Mapping[str, Any],
    storage: Storage,
) -> None:
    """Write one shard; all rows have the same number of steps. The file is synced.

    HDF5 writes through a :class:`~simlab.store.drafts.Draft`, which a full disk does not upset.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        draft = Draft(fd)
        _write(draft, path.stem, schema, rows, campaign, seed, config, storage)
        draft.finish()
    finally:
        os.close(fd)


def _write(
    draft: Draft,
    name: str,
    schema: Schema,
    rows: Sequence[Row],
    campaign: str,
    seed: int,
    config: Mapping[str, Any],
    storage: Storage,
) -> None:
    n_steps = len(rows[0].steps)
    with h5py.File(
        draft,
        "w",
        libver=("v110", "v110"),
        fs_strategy="page",
        fs_page_size=_PAGE_BYTES,
    ) as file:
        _write_header(file, schema, n_steps, rows, campaign, name)
        file.attrs["simlab_profile"] = storage.profile
        _write_log(file, schema, rows, config)
        _write_solves(file, rows, config, seed)
        inputs = [[[row.inputs[i]] for row in rows] for i in range(len(schema.inputs))]
        outputs = [
            [[step[0][i] for step in row.steps] for row in rows] for i in range(len(schema.outputs))
        ]
        for role, specs, fields in (
            ("input_crc32", schema.inputs, inputs),
            ("crc32", schema.outputs, outputs),
        ):
            crcs = []
            for spec, records in zip(specs, fields, strict=True):
                crcs.append(_write_field(file, schema, spec, rows, records, storage, draft))
            given = [[[r.crc for r in row] for row in records] for records in fields]
            _write_crcs(file, role, specs, crcs, len(rows))
            if storage.float64:
                _write_crcs(file, f"f64_{role}", specs, given, len(rows))
        if schema.mesh is not None:
            paths = {spec.name: field_path(spec) for spec in schema.fields}
            state_resampling(file, schema, paths)
        file.attrs["n_trajectories"] = len(rows)


def inspect(path: Path, schema: Schema) -> dict[str, Any]:
    """Read a whole shard, hold it against its own CRCs, and return its manifest line.

    Raises
    ------
    StoreError
        When the file is incomplete or a value is not what was sealed.
    """
    try:
        with h5py.File(path, "r") as file:
            log = file["simlab"]
            n_rows = int(file.attrs["n_trajectories"])
            line: dict[str, Any] = {
                "kind": "shard",
                "n_steps": len(file["dimensions/time"]),
                "traj": log["traj_id"][:].tolist(),
                "attempt": log["attempt"][:].tolist(),
                "segments": list(log["segments"].asstr()[:]),
                "source": log["source"][:].tolist(),
                "begin": log["begin"][:].tolist(),
                "end": log["end"][:].tolist(),
                "reasons": list(log["reason"].asstr()[:]) if "reason" in log else [],
                "params": {
                    name: log["parameters"][:, i].tolist()
                    for i, name in enumerate(schema.parameters)
                },
            }
            moments: dict[str, Moments] = {}
            for role, specs in (("input_crc32", schema.inputs), ("crc32", schema.outputs)):
                crcs = log[role][:]
                for number, spec in enumerate(specs):
                    twin = None
                    if f"f64_{role}" in log and spec.location == "grid":
                        twin = file[exact_path(spec)], log[f"f64_{role}"][..., number]
                    _inspect_field(file, spec, crcs[..., number], n_rows, moments, twin)
            line["moments"] = {name: item.to_json() for name, item in moments.items()}
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        raise StoreError(f"{path}: {error}") from error
    with open(path, "rb") as stream:
        line["sha256"] = hashlib.file_digest(stream, "sha256").hexdigest()
        line["bytes"] = os.fstat(stream.fileno()).st_size
    return line


def _write_header(
    file: h5py.File, schema: Schema, n_steps: int, rows: Sequence[Row], campaign: str, name: str
) -> None:
    names = [axis.name for axis in schema.axes]
    file.attrs.update(
        {
            "dataset_name": schema.name,
            "grid_type": "cartesian",
            "n_spatial_dims": schema.n_dims,
            "simulation_parameters": _texts(schema.constants),
            "simlab_schema": SCHEMA,
            "simlab_campaign": campaign,
            "simlab_shard": name,
            "Conventions": "The Well",
            "history": f"sealed by simlab at {datetime.now(UTC).isoformat(timespec='seconds')}",
        }
    )
    file.attrs.update({name: float(value) for name, value in schema.constants.items()})
    if schema.mesh is not None:
        file.attrs["resampled"] = True
    dimensions = file.create_group("dimensions")
    dimensions.attrs["spatial_dims"] = _texts(names)
    _put(dimensions, "time", schema.times[:n_steps], time_varying=True)
    for axis in schema.axes:
        _put(dimensions, axis.name, axis.coordinates, units=axis.units)
    boundaries = file.create_group("boundary_conditions")
    for boundary in schema.boundaries:
        n_points = len(schema.axes[names.index(boundary.axis)].coordinates)
        group = boundaries.create_group(f"{boundary.axis}_{boundary.kind}")
        group.attrs.update(_varying(sample=False, time=False))
        group.attrs["bc_type"] = boundary.kind
        group.attrs["associated_dims"] = _texts([boundary.axis])
        group.attrs["associated_fields"] = _texts([])
        mask = np.zeros(n_points, dtype=bool)
        mask[[0, -1]] = True
        group["mask"] = mask
        group["values"] = np.full(np.count_nonzero(mask), np.nan, dtype=np.float32)
    scalars = file.create_group("scalars")
    scalars.attrs["field_names"] = _texts([*schema.parameters, *schema.constants])
    for name, units in schema.parameters.items():
        swept = [row.sample["parameters"][name] for row in rows]
        _put(scalars, name, swept, sample_varying=True, units=units)
    for name, value in schema.constants.items():
        _put(scalars, name, value)
    grid_fields = [spec for spec in schema.fields if spec.location == "grid"]
    for order in range(3):
        group = file.create_group(f"t{order}_fields")
        group.attrs["field_names"] = _texts([s.name for s in grid_fields if s.order == order])
    if schema.mesh is not None:
        file["mesh/points"] = np.asarray(schema.mesh.points, dtype=np.float64)
        for kind, cells in schema.mesh.cells.items():
            file[f"mesh/cells/{kind}"] = np.asarray(cells, dtype=np.int64)
        file.create_group("mesh/fields")


def _write_log(
    file: h5py.File, schema: Schema, rows: Sequence[Row], config: Mapping[str, Any]
) -> None:
    segments = sorted({row.segment for row in rows})
    log = file.create_group("simlab")
    parameters = [[row.sample["parameters"][name] for name in schema.parameters] for row in rows]
    numbers = {segment: number for number, segment in enumerate(segments)}
    columns: dict[str, np.ndarray] = {
        "traj_id": np.array([row.traj for row in rows], dtype=np.uint64),
        "attempt": np.array([row.attempt for row in rows], dtype=np.uint32),
        "seed": np.array([row.sample["seed"] for row in rows], dtype=np.int64),
        "parameters": np.array(parameters, dtype=np.float64).reshape(len(rows), -1),
        "source": np.array([numbers[row.segment] for row in rows], dtype=np.uint32),
        "begin": np.array([row.begin for row in rows], dtype=np.uint64),
        "end": np.array([row.end for row in rows], dtype=np.uint64),
    }
    for name, values in columns.items():
        _checked(log, name, values)
    log["segments"] = np.array(segments, dtype=_TEXT)
    if any(row.status == "failed" for row in rows):
        log["reason"] = np.array([row.reason for row in rows], dtype=_TEXT)
    log["provenance"] = json.dumps(dict(config))
    log["trajectory_provenance"] = np.array(
        [json.dumps(row.sample["provenance"]) for row in rows], dtype=_TEXT
    )
    log["parameters"].attrs["names"] = _texts(schema.parameters)


def _write_crcs(
    file: h5py.File, name: str, specs: Sequence[FieldSpec], crcs: Sequence[Any], n_rows: int
) -> None:
    """Write the CRCs of fields, each given as (B, T): (B, T, F) of outputs, (B, F) of inputs."""
    table = np.array(crcs, dtype=np.uint32)
    table = np.moveaxis(table, 0, -1) if specs else np.empty((n_rows, 0), dtype=np.uint32)
    if name.endswith("input_crc32"):
        table = table.reshape(n_rows, len(specs))
    _checked(file["simlab"], name, np.ascontiguousarray(table))
    file["simlab"][name].attrs["fields"] = _texts([spec.name for spec in specs])


def _write_solves(
    file: h5py.File, rows: Sequence[Row], config: Mapping[str, Any], seed: int
) -> None:
    group = file.create_group("solve")
    columns, solvers = solves.columns([[step[1] for step in row.steps] for row in rows])
    for name, values in columns.items():
        _checked(group, name, values)
    words = [solver.encode() for solver in solvers]
    fixed = h5py.string_dtype(length=max([1, *map(len, words)]))  # has a checksum
    group.attrs["solver"] = np.array(words, dtype=fixed)
    group.attrs["norm"] = solves.NORM
    group.attrs["seed"] = seed
    group.attrs.update(solves.settings(config))


def _write_field(
    file: h5py.File,
    schema: Schema,
    spec: FieldSpec,
    rows: Sequence[Row],
    records: Sequence[Sequence[Record]],
    storage: Storage,
    draft: Draft,
) -> list[list[int | None]]:
    """Write one field of all rows in blocks; ``records[b][t]`` says where its values are.

    Returns the CRCs of what was written, by row and step.
    """
    kept, dtype = storage.record_dtype(spec), stored_dtype(spec)
    shape = schema.field_shape(spec)
    n_steps = len(records[0])
    step_bytes = dtype.itemsize * max(1, int(np.prod(shape)))
    per_chunk = max(1, _CHUNK_BYTES // step_bytes)
    time = (n_steps,) if spec.role == "output" else ()
    time_chunk = (min(n_steps, per_chunk),) if spec.role == "output" else ()
    row_chunk = min(len(rows), max(1, per_chunk // n_steps))
    whole, chunks = (len(rows), *time, *shape), (row_chunk, *time_chunk, *shape)
    data = create_dataset(file, field_path(spec), whole, dtype, chunks, storage.profile)
    data.attrs.update(_varying(sample=True, time=spec.role == "output"))
    data.attrs.update({"units": spec.units, "long_name": spec.long_name or spec.name})
    if spec.location == "grid":
        data.attrs["dim_varying"] = np.ones(schema.n_dims, dtype=bool)
    else:
        data.attrs["location"] = "vertex"
    if spec.order == 2:
        data.attrs.update({"symmetric": False, "antisymmetric": False})
    if kept != dtype or any(record.is_cast for row in records for record in row):
        data.attrs["cast_to"] = dtype.name
    twin = None
    if kept != dtype:
        twin = create_dataset(file, exact_path(spec), whole, kept, chunks, storage.profile)
        twin.attrs["units"] = spec.units
    crcs: list[list[int | None]] = []
    block = row_chunk * max(1, _BLOCK_BYTES // (step_bytes * n_steps * row_chunk))
    room = np.empty((min(block, len(rows)), n_steps, *shape), dtype=kept)  # fresh memory is dear
    for first in range(0, len(rows), block):
        last = min(first + block, len(rows))
        values = room[: last - first]
        for b in range(first, last):
            for t, record in enumerate(records[b]):
                step = values[b - first, t].data.cast("B")
                if files.read_at(rows[b].fd, step, record.payload_at) < len(step):
                    raise StoreError(f"{rows[b].segment}: was cut while it was sealed")
        if twin is None:
            crcs += [[record.crc for record in row] for row in records[first:last]]
        else:
            twin[first:last] = values if time else values[:, 0]
            values = values.astype(dtype)
            crcs += [[zlib.crc32(step.data) for step in row] for row in values]
        data[first:last] = values if time else values[:, 0]
        draft.check()
    return crcs


def _inspect_field(
    file: h5py.File,
    spec: FieldSpec,
    crcs: np.ndarray,
    n_rows: int,
    moments: dict[str, Moments],
    twin: tuple[h5py.Dataset, np.ndarray] | None,
) -> None:
    """Check one field, and its twin in double precision, against the CRCs; add its moments."""
    data = file[field_path(spec)]
    if len(data) != n_rows or len(crcs) != n_rows:
        raise StoreError(f"field {spec.name!r} has {len(data)} rows, expected {n_rows}")
    is_output = spec.role == "output"
    row_bytes = data.dtype.itemsize * max(1, int(np.prod(data.shape[1:])))
    row_chunk = data.chunks[0] if data.chunks else 1
    block = row_chunk * max(1, _BLOCK_BYTES // (row_bytes * row_chunk))
    room = np.empty((min(block, n_rows), *data.shape[1:]), dtype=data.dtype)
    for first in range(0, n_rows, block):
        part = slice(first, min(first + block, n_rows))
        values = room[: part.stop - first]
        data.read_direct(values, part)
        _check_crcs(spec.name, values, crcs[part], first, is_output)
        if twin is not None:
            exact = twin[0][part]
            _check_crcs(f"f64/{spec.name}", exact, twin[1][part], first, is_output)
            if not np.array_equal(exact.astype(values.dtype), values):
                raise StoreError(f"field {spec.name!r} is not its double precision twin, rounded")
        _merge(moments, spec.name, Moments.of(values, spec.order))
        if is_output and values.shape[1] > 1:
            for row in values:
                _merge(moments, f"{spec.name}.delta", Moments.of_steps(row, spec.order))


def _check_crcs(
    name: str, values: np.ndarray, crcs: np.ndarray, first: int, is_output: bool
) -> None:
    """Raise StoreError unless every step of some rows, the first of them ``first``, has its CRC."""
    steps = values if is_output else values[:, None]
    for b, expected in enumerate(crcs.reshape(len(steps), -1).tolist()):
        for t, crc in enumerate(expected):
            if zlib.crc32(np.ascontiguousarray(steps[b, t]).data) != crc:
                raise StoreError(f"field {name!r}, row {first + b}, step {t}: not what was sealed")


def _merge(moments: dict[str, Moments], name: str, found: Moments) -> None:
    moments[name] = moments[name] + found if name in moments else found


def _put(
    group: h5py.Group,
    name: str,
    values: Any,
    *,
    sample_varying: bool = False,
    time_varying: bool = False,
    units: str = "1",
) -> None:
    _checked(group, name, np.asarray(values, dtype=np.float32))
    group[name].attrs.update(_varying(sample_varying, time_varying))
    group[name].attrs["units"] = units


def _checked(group: h5py.Group, name: str, values: np.ndarray) -> None:
    """Write a small dataset with a checksum, which HDF5 offers for chunks only."""
    if values.size:
        chunks = (min(len(values), 4096), *values.shape[1:]) if values.ndim else None
        group.create_dataset(name, data=values, chunks=chunks, fletcher32=chunks is not None)
    else:
        group[name] = values


def _varying(sample: bool, time: bool) -> dict[str, bool]:
    return {"sample_varying": sample, "time_varying": time}


def _texts(names: Any) -> np.ndarray:
    return np.array(list(names), dtype=_TEXT)
