"""XDMF sidecars: small XML files through which ParaView opens sealed trajectories as they lie.

They name datasets inside the shards by hyperslab, with relative paths, so the campaign can be moved
as a whole. Structured grids are written as curvilinear ones with explicit points, in
``views/grid.h5``: the store's first axis is the slowest, XDMF's rectilinear one the fastest. In a
stationary campaign the trajectories take the place of time, so that the time slider walks through
samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree as XML

import numpy as np

from simlab.core.errors import ConfigError
from simlab.store import files
from simlab.store.schema import FieldSpec, Mesh
from simlab.store.shards import field_path
from simlab.store.views import draft

if TYPE_CHECKING:
    from simlab.store.store import SnapshotStore

__all__ = ["xdmf"]

_CELLS = {
    "vertex": (0, "Polyvertex", 1),
    "line": (1, "Polyline", 2),
    "triangle": (2, "Triangle", 3),
    "triangle6": (2, "Triangle_6", 6),
    "quad": (2, "Quadrilateral", 4),
    "tetra": (3, "Tetrahedron", 4),
    "tetra10": (3, "Tetrahedron_10", 10),
    "hexahedron": (3, "Hexahedron", 8),
    "wedge": (3, "Wedge", 6),
    "pyramid": (3, "Pyramid", 5),
}


def xdmf(
    store: SnapshotStore, split: str = "train", *, ids: Sequence[int] | None = None
) -> list[Path]:
    """Write sidecars for a split into ``views/``; return their paths.

    Stationary campaigns give one file, with one "time" per trajectory; others one file per
    trajectory. Fields on vertices go to a second file, on the mesh.

    Parameters
    ----------
    ids : sequence of int, optional
        Trajectories to show; default: all that are sealed.
    """
    chosen = store.split(split)
    asked = None if ids is None else set(ids)
    missing = sorted((asked or set()) - set(chosen.ids.tolist()))
    if missing:
        raise ConfigError(f"xdmf: trajectory {missing[0]} is not sealed in {split}")
    wanted = [
        (traj, place)
        for traj, place in zip(chosen.ids.tolist(), chosen.places(), strict=True)
        if asked is None or traj in asked
    ]
    n_rows = {shard.name: len(shard.traj) for shard in store.catalogue.live_shards}
    made = []
    schema = store.schema
    for location in ("grid", "vertex"):
        specs = [spec for spec in schema.fields if spec.location == location]
        if not specs or not wanted:
            continue
        suffix = "" if location == "grid" else "_mesh"
        if location == "grid":
            _write_grid(store)
        if len(schema.times) == 1:
            path = store.path / "views" / f"{split}{suffix}.xdmf"
            frames = [(float(traj), place, 0) for traj, place in wanted]
            made.append(_write(store, path, specs, frames, n_rows))
            continue
        for traj, place in wanted:
            path = store.path / "views" / f"{split}_t{traj:08d}{suffix}.xdmf"
            frames = [(time, place, step) for step, time in enumerate(schema.times)]
            made.append(_write(store, path, specs, frames, n_rows))
    return made


def _write(
    store: SnapshotStore,
    path: Path,
    specs: Sequence[FieldSpec],
    frames: Iterable[tuple[float, tuple[str, int], int]],
    n_rows: Mapping[str, int],
) -> Path:
    root = XML.Element("Xdmf", Version="3.0")
    domain = XML.SubElement(root, "Domain")
    series = XML.SubElement(
        domain,
        "Grid",
        Name=store.schema.name,
        GridType="Collection",
        CollectionType="Temporal",
    )
    on_mesh = specs[0].location == "vertex"
    for time, (name, row), step in frames:
        parent = series
        kinds = _top_cells(store.schema.mesh) if on_mesh and store.schema.mesh else [None]
        if len(kinds) > 1:
            parent = XML.SubElement(
                series, "Grid", Name="parts", GridType="Collection", CollectionType="Spatial"
            )
            XML.SubElement(parent, "Time", Value=repr(time))
        for kind in kinds:
            grid = XML.SubElement(parent, "Grid", Name=kind or "grid", GridType="Uniform")
            if len(kinds) == 1:
                XML.SubElement(grid, "Time", Value=repr(time))
            if kind is None:
                _structured(grid, store)
            else:
                _unstructured(grid, store, name, kind)
            for spec in specs:
                _attributes(grid, store, spec, name, n_rows[name], row, step)
    XML.indent(root)
    text = '<?xml version="1.0" ?>\n' + XML.tostring(root, encoding="unicode") + "\n"
    with files.reported(path):
        files.publish(path, text)
    return path


def _write_grid(store: SnapshotStore) -> None:
    """Write the points of the structured grid, padded to three coordinates."""
    schema = store.schema
    mesh = np.meshgrid(*(axis.coordinates for axis in schema.axes), indexing="ij")
    points = np.zeros((*schema.shape, 3), dtype=np.float32)
    points[..., : schema.n_dims] = np.stack(mesh, axis=-1)
    with draft(store, "grid.h5") as (file, _):
        file["points"] = points


def _structured(grid: XML.Element, store: SnapshotStore) -> None:
    shape = store.schema.shape if store.schema.n_dims > 1 else (*store.schema.shape, 1)
    kind = f"{len(shape)}DSMesh"
    XML.SubElement(grid, "Topology", TopologyType=kind, Dimensions=_words(shape))
    geometry = XML.SubElement(grid, "Geometry", GeometryType="XYZ")
    _hdf(geometry, "grid.h5:/points", (*store.schema.shape, 3), 4)


def _unstructured(grid: XML.Element, store: SnapshotStore, name: str, kind: str) -> None:
    mesh = store.schema.mesh
    assert mesh is not None
    _, word, n_nodes = _CELLS[kind]
    cells = np.asarray(mesh.cells[kind])
    topology = XML.SubElement(grid, "Topology", TopologyType=word, NumberOfElements=str(len(cells)))
    if word.startswith("Poly"):
        topology.set("NodesPerElement", str(n_nodes))
    _hdf(topology, f"../data/{name}:/mesh/cells/{kind}", cells.shape, 8, "Int")
    shape = np.shape(mesh.points)
    geometry = XML.SubElement(grid, "Geometry", GeometryType="XYZ"[: shape[1]])
    _hdf(geometry, f"../data/{name}:/mesh/points", shape, 8)


def _top_cells(mesh: Mesh) -> list[str]:
    """Return the cell types of the highest dimension."""
    unknown = sorted(set(mesh.cells) - set(_CELLS))
    if unknown:
        raise ConfigError(f"xdmf: cells of type {unknown[0]!r} are not supported")
    top = max(_CELLS[kind][0] for kind in mesh.cells)
    return [kind for kind in mesh.cells if _CELLS[kind][0] == top]


def _attributes(
    grid: XML.Element,
    store: SnapshotStore,
    spec: FieldSpec,
    name: str,
    n_rows: int,
    row: int,
    step: int,
) -> None:
    """Add one field: as a scalar, as a vector of three, or component by component."""
    schema = store.schema
    shape = schema.field_shape(spec)
    base = shape[: len(shape) - spec.order]
    lead: tuple[int, ...] = (n_rows,)
    start: tuple[int, ...] = (row,)
    if spec.role == "output":
        lead, start = (n_rows, len(schema.times)), (row, step)
    source = f"../data/{name}:/{field_path(spec)}"
    precision = 8 if spec.location == "vertex" else 4
    is_vector = spec.order == 1 and schema.n_dims == 3
    parts: list[tuple[str, tuple[int, ...]]] = [(spec.name, ())]
    if spec.order and not is_vector:
        letters = [axis.name for axis in schema.axes]
        parts = [
            (f"{spec.name}_{''.join(letters[k] for k in index)}", index)
            for index in np.ndindex(*shape[len(base) :])
        ]
    for label, component in parts:
        attribute = XML.SubElement(
            grid,
            "Attribute",
            Name=label,
            AttributeType="Vector" if is_vector else "Scalar",
            Center="Node",
        )
        count = (1,) * len(component) if component else shape[len(base) :]
        first = component or (0,) * len(count)
        slab = XML.SubElement(
            attribute,
            "DataItem",
            ItemType="HyperSlab",
            Type="HyperSlab",
            Dimensions=_words((*base, *(count if is_vector else ()))),
        )
        n_axes = len(lead) + len(shape)
        selection = XML.SubElement(slab, "DataItem", Dimensions=f"3 {n_axes}", Format="XML")
        selection.text = "  ".join(
            [
                _words((*start, *(0,) * len(base), *first)),
                _words((1,) * n_axes),
                _words(((1,) * len(lead)) + base + count),
            ]
        )
        _hdf(slab, source, (*lead, *shape), precision)


def _hdf(
    parent: XML.Element, where: str, shape: Sequence[int], precision: int, number: str = "Float"
) -> None:
    item = XML.SubElement(
        parent,
        "DataItem",
        Format="HDF",
        NumberType=number,
        Precision=str(precision),
        Dimensions=_words(shape),
    )
    item.text = where


def _words(numbers: Iterable[int]) -> str:
    return " ".join(str(int(number)) for number in numbers)
