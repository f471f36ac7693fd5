"""Read meshes that meshio knows (Gmsh 2.2 to 4.1, VTU, XDMF, MED, Medit, Abaqus, ...).

Triangles or tetrahedra become the cells; lines or triangles one dimension below become facets of
groups. Groups get their names from, in this order: cell sets, names that the format gives to tags
(Gmsh physical names, MED families), and the tags themselves as words (``"7"``); vertex sets name
the boundary facets whose vertices they hold. Curved (second-order) cells are taken straight-sided.

meshio prints, and ends the process, where it cannot read a file; here every fault of a file is one
ConfigError.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from simlab.core.config import nearest
from simlab.core.errors import ConfigError
from simlab.mesh.mesh import Mesh, make

__all__ = ["read"]

_CORNERS = {"line": 2, "triangle": 3, "tetra": 4}
_KINDS = {"line": 1, "line3": 1, "triangle": 2, "triangle6": 2, "tetra": 3, "tetra10": 3}
_TAGS = (  # meshio's cell data that number groups
    "gmsh:physical",
    "cell_tags",
    "medit:ref",
    "nastran:ref",
    "tetgen:ref",
    "ugrid:ref",
    "su2:tag",
    "netgen:index",
    "avsucd:material",
)
_PLANE = 1e-10  # largest height of a plane mesh over its extent


def read(path: str | Path) -> Mesh:
    """Read and check a mesh file. A file that did not change is read once per process.

    Raises
    ------
    ConfigError
        When the file is missing, cannot be read, or holds no usable mesh.
    """
    path = Path(path)
    if not path.is_file():
        suffixes = {path.suffix.lower()}
        beside = (
            [str(p) for p in sorted(path.parent.iterdir()) if p.suffix.lower() in suffixes]
            if path.parent.is_dir()
            else []
        )
        hint = nearest(str(path), beside) if beside else ""
        raise ConfigError(f"no mesh file {path}{hint}")
    status = path.stat()
    return _read(str(path), status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=8)
def _read(path: str, _changed: int, _size: int) -> Mesh:
    raw = _load(path)
    source = f"mesh {path}"
    kinds = {block.type for block in raw.cells}
    dim = max((block.dim for block in raw.cells), default=0)
    if dim < 2:
        raise ConfigError(
            f"{source}: no triangles and no tetrahedra (cells: {_listed(kinds)}); Gmsh saves only "
            "what is in a physical group: give the domain one too"
        )
    other = sorted(b.type for b in raw.cells if b.dim == dim and b.type not in _KINDS)
    if other:
        raise ConfigError(
            f"{source}: cells of type {_listed(other)}; only triangles and tetrahedra are "
            "supported: recombine nothing, or split them in the mesher"
        )
    points = np.asarray(raw.points, dtype=np.float64)
    if dim == 2 and points.shape[1] == 3:
        height = np.ptp(points[:, 2])
        if height > _PLANE * np.ptp(points[:, :2], axis=0).max():
            raise ConfigError(
                f"{source}: a surface in space (z varies by {height:.3g}); triangles must lie in a "
                "plane z = constant"
            )
        points = points[:, :2]

    cells, n_cells = [], 0
    groups: dict[int, dict[str, list[np.ndarray]]] = {dim: {}, dim - 1: {}}
    for number, block in enumerate(raw.cells):
        if block.type not in _KINDS or block.dim not in groups:
            continue
        corners = _CORNERS[block.type.rstrip("0123456789")]
        rows = np.asarray(block.data, dtype=np.int64)[:, :corners]
        for name, members in _names(raw, number, block.dim):
            found = members + n_cells if block.dim == dim else rows[members]
            groups[block.dim].setdefault(name, []).append(found)
        if block.dim == dim:
            cells.append(rows)
            n_cells += len(rows)
    return make(
        points,
        np.concatenate(cells),
        facet_groups={name: np.concatenate(parts) for name, parts in groups[dim - 1].items()},
        cell_groups={name: np.concatenate(parts) for name, parts in groups[dim].items()},
        point_groups={name: np.asarray(members) for name, members in raw.point_sets.items()},
        source=source,
    )


def _names(raw: Any, number: int, dim: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yield names and members (row numbers) of the groups that a block of cells has parts of."""
    for name, blocks in raw.cell_sets.items():
        members = blocks[number]
        if not name.startswith("gmsh:") and members is not None and len(members):
            yield name, np.asarray(members, dtype=np.int64)
    by_tag = {int(tag): [name] for name, (tag, of) in _physical(raw) if int(of) == dim}
    by_tag |= {int(tag): list(names) for tag, names in getattr(raw, "cell_tags", {}).items()}
    for key in _TAGS:
        if key not in raw.cell_data:
            continue
        values = np.asarray(raw.cell_data[key][number]).reshape(-1)
        for tag in np.unique(values).astype(np.int64).tolist():
            if tag == 0 and 0 not in by_tag:  # "no group" in all of these formats
                continue
            for name in by_tag.get(tag, [str(tag)]):
                yield name, np.flatnonzero(values == tag)


def _physical(raw: Any) -> list[tuple[str, np.ndarray]]:
    """Return Gmsh's physical names with their (tag, dimension)."""
    return [(name, entry) for name, entry in raw.field_data.items() if np.shape(entry) == (2,)]


def _load(path: str) -> Any:
    import meshio

    said = io.StringIO()
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(said),
            contextlib.redirect_stderr(said),
        ):
            warnings.simplefilter("ignore")
            return meshio.read(path)
    except (Exception, SystemExit) as error:
        words = [str(error)] if not isinstance(error, SystemExit) else []
        words += said.getvalue().split()
        text = " ".join(words).strip() or type(error).__name__
        if "cell data" in text.lower() and path.endswith(".msh"):
            text = text.rstrip(".") + "; save it without Mesh.SaveAll, or as MSH 2.2"
        raise ConfigError(f"cannot read mesh {path}: {text}") from None


def _listed(words: Any) -> str:
    return ", ".join(sorted(set(words))) or "none"
