"""Sealed shards: immutable HDF5 files that The Well's loader reads as they are.

The Well's groups hold float32 fields, coordinates, scalars and boundary conditions; the group
``simlab`` holds what makes a row traceable and checkable (id, attempt, seed, exact parameters,
solver log, CRC of every stored field), ``mesh`` the fields on vertices. Chunks are whole steps of
64 KiB to 1 MiB with fletcher32. The root attribute ``n_trajectories`` is written last.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from simlab.core.errors import StoreError
from simlab.core.reports import Provenance
from simlab.store import files, solves
from simlab.store.records import Record
from simlab.store.schema import FieldSpec, Schema
from simlab.store.segments import stored_dtype
from simlab.store.stats import Moments

__all__ = ["READABLE", "SCHEMA", "Row", "field_path", "inspect", "write"]

SCHEMA = "simlab-store/2"
READABLE = ("simlab-store/1", SCHEMA)
_CHUNK_BYTES = 1 << 16
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


def write(
    path: Path,
    schema: Schema,
    rows: Sequence[Row],
    *,
    campaign: str,
    seed: int,
    config: Mapping[str, Any],
) -> None:
    """Write one shard; all rows have the same number of steps. The file is synced.

    The file is made in memory and written in one go: HDF5 cannot close a file on a disk that is
    full, and takes the process down at exit (seen with 2.0.0). So a shard costs twice its size in
    memory for a moment.
    """
    n_steps = len(rows[0].steps)
    n_bytes = sum(record.nbytes for row in rows for record in _records(row))
    page = 1 << 20 if n_bytes > 1 << 25 else 1 << 16
    with h5py.File(
        path,
        "w",
        driver="core",
        backing_store=False,
        block_size=1 << 22,
        libver=("v110", "v110"),
        fs_strategy="page",
        fs_page_size=page,
    ) as file:
        _write_header(file, schema, n_steps, rows, campaign)
        _write_log(file, schema, rows, config)
        _write_solves(file, rows, config, seed)
        for number, spec in enumerate(schema.inputs):
            records = [[row.inputs[number]] for row in rows]
            _write_field(file, schema, spec, rows, records)
        for number, spec in enumerate(schema.outputs):
            records = [[step[0][number] for step in row.steps] for row in rows]
            _write_field(file, schema, spec, rows, records)
        file.attrs["n_trajectories"] = len(rows)
        file.flush()
        image = file.id.get_file_image()
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        files.write_all(fd, [image])
        files.sync(fd)
    finally:
        os.close(fd)


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
                    _inspect_field(file, spec, crcs[..., number], n_rows, moments)
            line["moments"] = {name: item.to_json() for name, item in moments.items()}
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        raise StoreError(f"{path}: {error}") from error
    with open(path, "rb") as stream:
        line["sha256"] = hashlib.file_digest(stream, "sha256").hexdigest()
        line["bytes"] = os.fstat(stream.fileno()).st_size
    return line


def _records(row: Row) -> Iterator[Record]:
    yield from row.inputs
    for step in row.steps:
        yield from step[0]


def _write_header(
    file: h5py.File, schema: Schema, n_steps: int, rows: Sequence[Row], campaign: str
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
            "simlab_shard": Path(file.filename).stem,
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
    crcs = [[[record.crc for record in step[0]] for step in row.steps] for row in rows]
    input_crcs = [[record.crc for record in row.inputs] for row in rows]
    log = file.create_group("simlab")
    parameters = [[row.sample["parameters"][name] for name in schema.parameters] for row in rows]
    numbers = {segment: number for number, segment in enumerate(segments)}
    columns: dict[str, np.ndarray] = {
        "traj_id": np.array([row.traj for row in rows], dtype=np.uint64),
        "attempt": np.array([row.attempt for row in rows], dtype=np.uint32),
        "seed": np.array([row.sample["seed"] for row in rows], dtype=np.int64),
        "parameters": np.array(parameters, dtype=np.float64).reshape(len(rows), -1),
        "crc32": np.array(crcs, dtype=np.uint32),
        "input_crc32": np.array(input_crcs, dtype=np.uint32).reshape(len(rows), -1),
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
    log["crc32"].attrs["fields"] = _texts([spec.name for spec in schema.outputs])
    log["input_crc32"].attrs["fields"] = _texts([spec.name for spec in schema.inputs])
    log["parameters"].attrs["names"] = _texts(schema.parameters)


def _write_solves(
    file: h5py.File, rows: Sequence[Row], config: Mapping[str, Any], seed: int
) -> None:
    group = file.create_group("solve")
    columns, solvers = solves.columns([[step[1] for step in row.steps] for row in rows])
    for name, values in columns.items():
        _checked(group, name, values)
    group.attrs["solver"] = _texts(solvers)
    group.attrs["norm"] = solves.NORM
    group.attrs["seed"] = seed
    group.attrs.update(solves.settings(config))


def _write_field(
    file: h5py.File,
    schema: Schema,
    spec: FieldSpec,
    rows: Sequence[Row],
    records: Sequence[Sequence[Record]],
) -> None:
    """Write one field of all rows in blocks; ``records[b][t]`` says where its values are."""
    dtype = stored_dtype(spec)
    shape = schema.field_shape(spec)
    n_steps = len(records[0])
    step_bytes = dtype.itemsize * max(1, int(np.prod(shape)))
    per_chunk = max(1, _CHUNK_BYTES // step_bytes)
    time = (n_steps,) if spec.role == "output" else ()
    time_chunk = (min(n_steps, per_chunk),) if spec.role == "output" else ()
    row_chunk = min(len(rows), max(1, per_chunk // n_steps))
    data = file.create_dataset(
        field_path(spec),
        shape=(len(rows), *time, *shape),
        dtype=dtype,
        chunks=(row_chunk, *time_chunk, *shape),
        fletcher32=True,
    )
    data.attrs.update(_varying(sample=True, time=spec.role == "output"))
    data.attrs.update({"units": spec.units, "long_name": spec.long_name or spec.name})
    if spec.location == "grid":
        data.attrs["dim_varying"] = np.ones(schema.n_dims, dtype=bool)
    else:
        data.attrs["location"] = "vertex"
    if spec.order == 2:
        data.attrs.update({"symmetric": False, "antisymmetric": False})
    if any(record.is_cast for row in records for record in row):
        data.attrs["cast_to"] = dtype.name
    block = row_chunk * max(1, _BLOCK_BYTES // (step_bytes * n_steps * row_chunk))
    for first in range(0, len(rows), block):
        last = min(first + block, len(rows))
        values = np.empty((last - first, n_steps, *shape), dtype=dtype)
        for b in range(first, last):
            for t, record in enumerate(records[b]):
                os.preadv(rows[b].fd, [values[b - first, t]], record.payload_at)
        data[first:last] = values if time else values[:, 0]


def _inspect_field(
    file: h5py.File, spec: FieldSpec, crcs: np.ndarray, n_rows: int, moments: dict[str, Moments]
) -> None:
    """Check one field against its CRCs and add its moments."""
    data = file[field_path(spec)]
    if len(data) != n_rows or len(crcs) != n_rows:
        raise StoreError(f"field {spec.name!r} has {len(data)} rows, expected {n_rows}")
    is_output = spec.role == "output"
    row_bytes = data.dtype.itemsize * max(1, int(np.prod(data.shape[1:])))
    block = data.chunks[0] * max(1, _BLOCK_BYTES // (row_bytes * data.chunks[0]))
    for first in range(0, n_rows, block):
        values = data[first : first + block]
        steps = values if is_output else values[:, None]
        for b in range(len(steps)):
            for t in range(steps.shape[1]):
                expected = crcs[first + b, t] if is_output else crcs[first + b]
                if zlib.crc32(np.ascontiguousarray(steps[b, t]).data) != expected:
                    raise StoreError(
                        f"field {spec.name!r}, row {first + b}, step {t}: not what was sealed"
                    )
        _merge(moments, spec.name, Moments.of(values, spec.order))
        if is_output and values.shape[1] > 1:
            delta = np.subtract(values[:, 1:], values[:, :-1], dtype=np.float64)
            _merge(moments, f"{spec.name}.delta", Moments.of(delta, spec.order))


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
