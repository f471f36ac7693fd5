"""PDEBench views: derived files that show sealed data the way PDEBench's loaders expect it.

Four layouts, of which the schema chooses:

========  ==========  =============================================================================
layout    file        content
========  ==========  =============================================================================
darcy     ``.hdf5``   stationary, 2-D: ``nu`` (B, X, Y), ``tensor`` (B, 1, X, Y)
scalar    ``.hdf5``   1-D in time, one scalar: ``tensor`` (B, T, X), ``t-coordinate`` (T + 1)
flow      ``.hdf5``   in time: ``density``, ``pressure``, ``Vx``, ``Vy``, ``Vz`` (B, T, *grid)
groups    ``.h5``     all else: ``0000/data`` (T, *grid, V), ``0000/grid/x``, ``y``, ``z``, ``t``
========  ==========  =============================================================================

PDEBench's ``FNODatasetSingle`` reads the ``.hdf5`` files and takes its test samples from the front;
``FNODatasetMult`` reads ``.h5`` and takes them from the end. Each file is ordered accordingly, and
its attribute ``test_ratio`` is the ratio with which the loader's cut falls between our splits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import h5py
import numpy as np

from simlab.core.config import nearest
from simlab.core.errors import ConfigError
from simlab.store.schema import FieldSpec, Schema
from simlab.store.shards import field_path
from simlab.store.splits import SPLITS
from simlab.store.views import TEXT, draft, places, show

if TYPE_CHECKING:
    from simlab.store.store import SnapshotStore

__all__ = ["LAYOUTS", "layout_of", "pdebench"]

LAYOUTS = ("darcy", "scalar", "flow", "groups")
_VELOCITY = "velocity"


def pdebench(
    store: SnapshotStore,
    *,
    layout: str = "auto",
    nu: str | None = None,
    tensor: str | None = None,
) -> Path:
    """Make the PDEBench view of a campaign; return its path.

    Parameters
    ----------
    layout : {"auto", "darcy", "scalar", "flow", "groups"}
    nu : str, optional
        Input field shown as ``nu``; needed when there are several scalar ones (darcy).
    tensor : str, optional
        Output field shown as ``tensor``; needed when there are several (darcy, scalar).

    Raises
    ------
    ConfigError
        When the campaign does not have this layout.
    """
    schema = store.schema
    if layout == "auto":
        layout = layout_of(schema, tensor)
    if layout not in LAYOUTS:
        raise ConfigError(f"view pdebench: no layout {layout!r}{nearest(layout, LAYOUTS)}")
    if layout == "groups":
        return _groups(store)
    if layout == "darcy":
        fields = _darcy(schema, nu, tensor)
    else:
        fields = _scalar(schema, tensor) if layout == "scalar" else _flow(schema)
    rows, counts = places(store, SPLITS[::-1])
    with draft(store, f"pdebench_{schema.name}.hdf5") as (file, path):
        for name, (spec, component) in fields.items():
            show(file, name, store, spec, rows, component)
        for axis, letter in zip(schema.axes, "xyz", strict=False):
            file[f"{letter}-coordinate"] = np.asarray(axis.coordinates, dtype=np.float32)
        if layout != "darcy":
            times = np.asarray(schema.times)
            edges = np.append(times, 2 * times[-1] - times[-2])
            file["t-coordinate"] = edges.astype(np.float32)
        _say(file, layout, counts)
        file.attrs["test_ratio"] = (counts.get("test", 0) + 0.5) / len(rows)
    return path


def layout_of(schema: Schema, tensor: str | None = None) -> str:
    """Return the layout that fits a schema: the most specific one that leaves nothing out.

    (Darcy shows the scalar fields, as ever.)
    """
    scalars = [spec for spec in _on_grid(schema.outputs) if spec.order == 0]
    given = [spec for spec in _on_grid(schema.inputs) if spec.order == 0]
    if schema.n_dims == 2 and len(schema.times) == 1 and given and scalars:
        return "darcy"
    if len(schema.times) > 1:
        if _velocities(schema) and {"density", "pressure"} <= {spec.name for spec in scalars}:
            return "flow"
        outputs = _on_grid(schema.outputs)
        if schema.n_dims == 1 and scalars and (tensor is not None or len(outputs) == 1):
            return "scalar"
    return "groups"


_Fields = dict[str, tuple[FieldSpec, int | None]]


def _darcy(schema: Schema, nu: str | None, tensor: str | None) -> _Fields:
    if schema.n_dims != 2 or len(schema.times) != 1:
        raise _misfit(schema, "darcy", "a stationary 2-D campaign")
    return {
        "nu": (_pick(schema.inputs, nu, "nu"), None),
        "tensor": (_pick(schema.outputs, tensor, "tensor"), None),
    }


def _scalar(schema: Schema, tensor: str | None) -> _Fields:
    if schema.n_dims != 1 or len(schema.times) < 2:
        raise _misfit(schema, "scalar", "a 1-D campaign in time")
    return {"tensor": (_pick(schema.outputs, tensor, "tensor"), None)}


def _flow(schema: Schema) -> _Fields:
    velocities = _velocities(schema)
    if len(schema.times) < 2 or not velocities:
        raise _misfit(
            schema, "flow", "times, and the outputs density, pressure and velocity (or Vx, ...)"
        )
    found: _Fields = {
        name: (_pick(schema.outputs, name, name), None) for name in ("density", "pressure")
    }
    return found | velocities


def _velocities(schema: Schema) -> _Fields:
    """Return Vx, Vy and Vz: scalar fields of these names, or the components of a vector."""
    outputs = {spec.name: spec for spec in _on_grid(schema.outputs)}
    names = [f"V{letter}" for letter in "xyz"[: schema.n_dims]]
    if all(name in outputs and outputs[name].order == 0 for name in names):
        return {name: (outputs[name], None) for name in names}
    vector = outputs.get(_VELOCITY)
    if vector is None or vector.order != 1:
        return {}
    return {name: (vector, number) for number, name in enumerate(names)}


def _groups(store: SnapshotStore) -> Path:
    """Make the grouped layout: one group per trajectory, all grid outputs as channels."""
    schema = store.schema
    specs = _on_grid(schema.outputs)
    if not specs:
        raise _misfit(schema, "groups", "an output field on the grid")
    rows, counts = places(store, SPLITS)
    sizes = {shard.name: len(shard.traj) for shard in store.catalogue.live_shards}
    width = max(4, len(str(len(rows) - 1)))
    with draft(store, f"pdebench_{schema.name}.h5") as (file, path):
        grid = file.create_group(f"{0:0{width}d}/grid")
        for axis, letter in zip(schema.axes, "xyz", strict=False):
            grid[letter] = np.asarray(axis.coordinates, dtype=np.float32)
        grid["t"] = np.asarray(schema.times, dtype=np.float32)
        for number, (name, row) in enumerate(rows):
            group = file.require_group(f"{number:0{width}d}")
            if number:
                group["grid"] = grid  # a hard link
            _channels(group, schema, specs, name, row, sizes[name])
            shard = store.files.get(name)
            group.attrs["traj_id"] = int(shard.traj[row])
            group.attrs.update(
                dict(zip(schema.parameters, shard.parameters[row].tolist(), strict=True))
            )
        _say(file, "groups", counts)
        file.attrs["channels"] = np.array([n for spec in specs for n in _parts(schema, spec)], TEXT)
        file.attrs["test_ratio"] = (counts.get("test", 0) - 0.5) / len(rows)
    return path


def _channels(
    group: h5py.Group,
    schema: Schema,
    specs: Sequence[FieldSpec],
    shard: str,
    row: int,
    n_rows: int,
) -> None:
    """Make ``data`` (T, *grid, V) of one trajectory; tensors take one channel per component."""
    widths = [schema.n_dims**spec.order for spec in specs]
    n_times = len(schema.times)
    layout = h5py.VirtualLayout((n_times, *schema.shape, sum(widths)), dtype=np.float32)
    at = 0
    for spec, width in zip(specs, widths, strict=True):
        source = h5py.VirtualSource(
            f"../data/{shard}",
            field_path(spec),
            (n_rows, n_times, *schema.field_shape(spec)),
            dtype=np.float32,
        )
        layout[..., at : at + width] = source[row]
        at += width
    group.create_virtual_dataset("data", layout, fillvalue=np.nan)


def _parts(schema: Schema, spec: FieldSpec) -> list[str]:
    names = [spec.name]
    for _ in range(spec.order):
        names = [f"{name}_{axis.name}" for name in names for axis in schema.axes]
    return names


def _say(file: h5py.File, layout: str, counts: dict[str, int]) -> None:
    file.attrs["simlab_view"] = f"pdebench {layout}"
    file.attrs.update({f"n_{name}": count for name, count in counts.items()})


def _on_grid(specs: Iterable[FieldSpec]) -> list[FieldSpec]:
    return [spec for spec in specs if spec.location == "grid"]


def _pick(specs: Iterable[FieldSpec], name: str | None, what: str) -> FieldSpec:
    """Return the field that is named, or the only scalar one on the grid."""
    scalars = [spec for spec in _on_grid(specs) if spec.order == 0]
    found = [spec for spec in scalars if name in (None, spec.name)]
    if len(found) != 1:
        raise ConfigError(
            f"view pdebench: {what} must be one scalar field, given {name!r}; "
            f"there are: {', '.join(spec.name for spec in scalars) or 'none'}"
        )
    return found[0]


def _misfit(schema: Schema, layout: str, needs: str) -> ConfigError:
    return ConfigError(
        f"view pdebench: layout {layout} needs {needs}; {schema.name} has {schema.n_dims} "
        f"dimensions, {len(schema.times)} stored times and the outputs "
        f"{', '.join(spec.name for spec in schema.outputs)}"
    )
