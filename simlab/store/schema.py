"""The schema of a campaign: grid, times, fields, parameters, boundaries and mesh."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

import numpy as np

from simlab.core.errors import SchemaError
from simlab.core.samples import Sample

__all__ = ["Axis", "Boundary", "FieldSpec", "Mesh", "Resampling", "Schema"]


_BoundaryKind = Literal["periodic", "wall", "open"]
_ATTRIBUTES = {
    "dataset_name",
    "grid_type",
    "n_spatial_dims",
    "n_trajectories",
    "simulation_parameters",
    "resampled",
    "Conventions",
    "history",
}


@dataclass(frozen=True)
class Axis:
    """One axis of the structured grid, with the points where values live (centres or nodes)."""

    name: str
    coordinates: tuple[float, ...]
    units: str = "1"


@dataclass(frozen=True)
class Resampling:
    """How a grid field came from one on the vertices.

    Attributes
    ----------
    source : str
        The field on the vertices.
    method : str
        In words, for whoever reads the data.
    inside : str
        Input field that is 1 where the grid field has values and 0 elsewhere; empty: everywhere.
    """

    source: str
    method: str
    inside: str = ""


@dataclass(frozen=True)
class FieldSpec:
    """One field.

    Attributes
    ----------
    role : {"input", "output"}
        Inputs are given by the sample and constant in time; outputs are solved for at every stored
        time.
    order : int
        Tensor order: 0 scalar, 1 vector, 2 tensor (trailing axes of length ``n_dims``).
    location : {"grid", "vertex"}
        On the structured grid, or on the vertices of the schema's mesh (outputs only).
    resampling : Resampling, optional
        Of an output on the grid: how it was made from one on the vertices. Shards then say so,
        with an estimate of the error.
    after : str, optional
        Of an output on the grid: the input field of the same order that it is the later state of.
        Networks then learn the difference.
    """

    name: str
    role: Literal["input", "output"] = "output"
    order: int = 0
    units: str = "1"
    long_name: str = ""
    location: Literal["grid", "vertex"] = "grid"
    resampling: Resampling | None = None
    after: str | None = None


@dataclass(frozen=True)
class Boundary:
    """Boundary condition of both ends of an axis, in The Well's words."""

    axis: str
    kind: _BoundaryKind = "wall"


@dataclass(frozen=True, eq=False)
class Mesh:
    """Unstructured mesh: ``points`` (n, d) float64 and connectivity by meshio cell type."""

    points: np.ndarray
    cells: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Schema:
    """What every trajectory of a campaign looks like.

    Attributes
    ----------
    name : str
        Dataset name.
    axes : tuple of Axis
        Structured grid, first axis slowest (``indexing="ij"``).
    fields : tuple of FieldSpec
    times : tuple of float
        Stored times; ``(0.0,)`` for a stationary problem.
    parameters : mapping of str to str
        Scalar parameters that vary between samples, with their units.
    constants : mapping of str to float
        Scalars that do not vary.
    boundaries : tuple of Boundary
    mesh : Mesh, optional
        When fields live on vertices; the grid fields are then resampled from it.
    initial : mapping of str to str, float or tuple of str
        Where the state one step before the first stored one is found, for every output that has
        such a state: the name of an input field of the same order, or of a parameter that holds
        everywhere; names of parameters, one per grid point; or a number that holds everywhere.
        Those inputs are taken to say nothing else of a trajectory.
    """

    name: str
    axes: tuple[Axis, ...]
    fields: tuple[FieldSpec, ...]
    times: tuple[float, ...] = (0.0,)
    parameters: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, float] = field(default_factory=dict)
    boundaries: tuple[Boundary, ...] = ()
    mesh: Mesh | None = None
    initial: Mapping[str, str | float | tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [spec.name for spec in self.fields]
        if len(set(names)) != len(names):
            raise SchemaError(f"schema {self.name}: two fields of one name in {names}")
        taken = [*names, *self.parameters, *self.constants]
        clash = sorted({name for name in taken if taken.count(name) > 1})
        if clash:
            raise SchemaError(
                f"schema {self.name}: {', '.join(clash)} names both a field and a scalar"
            )
        if not self.outputs:
            raise SchemaError(f"schema {self.name}: no output field")
        faults = [*self._wrong_names(), *self._wrong_values()]
        if faults:  # found now, not when all is computed and a shard is to be written
            raise SchemaError(f"schema {self.name}: {'; '.join(faults)}")
        if self.mesh is None and any(spec.location == "vertex" for spec in self.fields):
            raise SchemaError(f"schema {self.name}: fields on vertices need a mesh")
        for spec in self.fields:
            self._check_resampling(spec)
            self._check_after(spec)
        for name, source in self.initial.items():
            self._check_initial(name, source)

    def _wrong_names(self) -> Iterator[str]:
        axes = [axis.name for axis in self.axes]
        names = [*(spec.name for spec in self.fields), *self.parameters, *self.constants, *axes]
        for name in names:
            if name in ("", ".") or "/" in name or "\0" in name:
                yield f"{name!r}: a name is not empty or '.', and holds no '/' and no zero byte"
        if "time" in axes or len(set(axes)) < len(axes):
            yield f"axes {', '.join(axes)}: each has another name, and none is called 'time'"
        for name in names:
            if name.endswith(".delta") and name.removesuffix(".delta") in names:
                yield f"{name!r}: statistics of a field's steps have that name"
        for name in self.constants:
            if name in _ATTRIBUTES or name.startswith("simlab_"):
                yield f"constant {name!r}: shards have an attribute of that name"
        for number, boundary in enumerate(self.boundaries):
            if boundary.axis not in axes or boundary in self.boundaries[:number]:
                yield f"boundary of {boundary.axis!r}: no such axis, or given twice"
            if boundary.kind not in get_args(_BoundaryKind):
                yield f"boundary {boundary.kind!r}: it is {', '.join(get_args(_BoundaryKind))}"

    def _wrong_values(self) -> Iterator[str]:
        numbers = {f"axis {axis.name!r}": axis.coordinates for axis in self.axes}
        for what, values in {**numbers, "times": self.times}.items():
            if not len(values) or not np.all(np.isfinite(values)):
                yield f"{what}: at least one number, all of them finite"
        for name, value in self.constants.items():
            if not math.isfinite(value):
                yield f"constant {name!r} is {value}"
        for spec in self.fields:
            if spec.order not in (0, 1, 2):
                yield f"field {spec.name!r} is of order {spec.order}; 0, 1 and 2 are kept"
            if spec.location == "grid" and not self.axes:
                yield f"field {spec.name!r} is on a grid without axes"
        if self.mesh is not None and not len(self.mesh.points):
            yield "the mesh has no points"

    def _check_after(self, spec: FieldSpec) -> None:
        if spec.after is None:
            return
        given = {item.name: item for item in self.inputs}.get(spec.after)
        is_output = (spec.role, spec.location) == ("output", "grid")
        if not is_output or given is None or given.order != spec.order:
            raise SchemaError(
                f"schema {self.name}: {spec.name!r} comes after {spec.after!r}; that takes an "
                "output on the grid and an input field of the same order"
            )

    def _check_initial(self, name: str, source: str | float | tuple[str, ...]) -> None:
        found = {spec.name: spec for spec in self.fields}
        spec = found.get(name)
        is_known = spec is not None and (spec.role, spec.location) == ("output", "grid")
        order = spec.order if spec is not None else 0
        if isinstance(source, tuple):
            is_known &= len(source) == math.prod(self.shape) and set(source) <= set(self.parameters)
        elif isinstance(source, str) and source not in self.parameters:
            given = found.get(source)
            is_known &= given is not None and given.role == "input" and given.order == order
        if not is_known:
            raise SchemaError(
                f"schema {self.name}: initial = {{{name!r}: {source!r}}}: expected an output on "
                "the grid, and an input field of its order, a parameter, one parameter per grid "
                "point, or a number"
            )

    def _check_resampling(self, spec: FieldSpec) -> None:
        said = spec.resampling
        if said is None:
            return
        found = {item.name: item for item in self.fields}
        source, inside = found.get(said.source), found.get(said.inside)
        if (spec.role, spec.location) != ("output", "grid") or (
            source is None or (source.location, source.order) != ("vertex", spec.order)
        ):
            raise SchemaError(
                f"schema {self.name}: {spec.name!r} is resampled from {said.source!r}; that takes "
                "an output on the grid and one on the vertices, of the same order"
            )
        if said.inside and (inside is None or inside.role != "input" or inside.order):
            raise SchemaError(f"schema {self.name}: {said.inside!r} is no scalar input field")

    @property
    def shape(self) -> tuple[int, ...]:
        """Points of the structured grid along each axis."""
        return tuple(len(axis.coordinates) for axis in self.axes)

    @property
    def n_dims(self) -> int:
        """Number of space dimensions."""
        return len(self.axes)

    @property
    def inputs(self) -> tuple[FieldSpec, ...]:
        """Input fields."""
        return tuple(spec for spec in self.fields if spec.role == "input")

    @property
    def outputs(self) -> tuple[FieldSpec, ...]:
        """Output fields, grid and vertex."""
        return tuple(spec for spec in self.fields if spec.role == "output")

    def field_shape(self, spec: FieldSpec) -> tuple[int, ...]:
        """Shape of one field at one time."""
        if spec.location == "vertex":
            assert self.mesh is not None
            base: tuple[int, ...] = (len(self.mesh.points),)
        else:
            base = self.shape
        return base + (self.n_dims,) * spec.order

    @property
    def values_per_sample(self) -> int:
        """Stored numbers per trajectory: inputs once, outputs at every stored time."""
        repeats = {"input": 1, "output": len(self.times)}
        return sum(repeats[s.role] * math.prod(self.field_shape(s)) for s in self.fields)

    def check_sample(self, sample: Sample) -> None:
        """Raise SchemaError unless the sample has all parameters and input fields, finite."""
        missing = [name for name in self.parameters if name not in sample.parameters]
        if missing:
            raise SchemaError(f"sample {sample.index}: no parameter {', '.join(missing)}")
        for name in self.parameters:
            if not math.isfinite(sample.parameters[name]):
                value = sample.parameters[name]
                raise SchemaError(f"sample {sample.index}: parameter {name!r} is {value}")
        for spec in self.inputs:
            self.check_field(spec, sample.fields.get(spec.name), f"sample {sample.index}")

    def check_field(self, spec: FieldSpec, values: np.ndarray | None, where: str) -> None:
        """Raise SchemaError unless ``values`` has the field's shape at one time and is finite."""
        if values is None:
            raise SchemaError(f"{where}: field {spec.name!r} is missing")
        if values.shape != self.field_shape(spec):
            raise SchemaError(
                f"{where}: field {spec.name!r} has shape {values.shape}, "
                f"expected {self.field_shape(spec)}"
            )
        bad = int(np.size(values) - np.count_nonzero(np.isfinite(values)))
        if bad:
            raise SchemaError(f"{where}: field {spec.name!r} has {bad} values that are not finite")

    def to_json(self) -> dict[str, Any]:
        """Return plain values; :meth:`from_json` gives the schema back."""
        plain: dict[str, Any] = {
            "name": self.name,
            "times": [float(time) for time in self.times],
            "parameters": dict(self.parameters),
            "constants": {name: float(value) for name, value in self.constants.items()},
            "axes": [
                {
                    "name": axis.name,
                    "coordinates": [float(place) for place in axis.coordinates],
                    "units": axis.units,
                }
                for axis in self.axes
            ],
            "fields": [_plain(item) for item in self.fields],
            "boundaries": [_plain(item) for item in self.boundaries],
        }
        if self.mesh is not None:
            plain["mesh"] = {
                "points": self.mesh.points.tolist(),
                "cells": {kind: cells.tolist() for kind, cells in self.mesh.cells.items()},
            }
        if self.initial:  # stores made before do not have it
            plain["initial"] = dict(self.initial)
        return plain

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Schema:
        """Build a schema from :meth:`to_json`'s values."""
        mesh = plain.get("mesh")
        return cls(
            name=plain["name"],
            axes=tuple(Axis(a["name"], tuple(a["coordinates"]), a["units"]) for a in plain["axes"]),
            fields=tuple(_field(item) for item in plain["fields"]),
            times=tuple(plain["times"]),
            parameters=dict(plain["parameters"]),
            constants=dict(plain["constants"]),
            boundaries=tuple(Boundary(**item) for item in plain["boundaries"]),
            mesh=mesh
            and Mesh(
                np.asarray(mesh["points"], dtype=np.float64),
                {kind: np.asarray(cells, dtype=np.int64) for kind, cells in mesh["cells"].items()},
            ),
            initial={
                name: tuple(source) if isinstance(source, list) else source
                for name, source in plain.get("initial", {}).items()
            },
        )


def _plain(item: Any) -> dict[str, Any]:
    """Return a field or boundary as a table; schemas made before do not name resampling."""
    return {name: value for name, value in asdict(item).items() if value is not None}


def _field(plain: Mapping[str, Any]) -> FieldSpec:
    found = dict(plain)
    said = found.pop("resampling", None)
    return FieldSpec(**found, resampling=Resampling(**said) if said else None)
