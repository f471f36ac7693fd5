"""Pictures of fields: data galleries, and truth beside prediction beside error.

Every function takes data and optional axes and returns the axes it drew on. Figures are made
without pyplot, so nothing is shown, no back end is chosen and nothing stays behind; matplotlib is
imported on first use. One-dimensional fields are lines, two-dimensional ones images in the plane of
the first two axes, three-dimensional ones their middle slices; vector and tensor fields are shown
by their magnitude. Colour scales are symmetric about zero where the sign matters, logarithmic where
a positive input spans more than two decades, and all are readable to the colour-blind.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import numpy as np

from simlab.core.errors import SchemaError
from simlab.core.samples import Trajectory
from simlab.store.schema import FieldSpec, Schema

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize

__all__ = ["COLOURS", "Comparison", "gallery", "new_axes", "panels", "show", "styled", "views"]

P = ParamSpec("P")
R = TypeVar("R")

# Okabe and Ito, ordered so that neighbours differ in lightness too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INK = "#1f2933"
_LONGEST_NAME = 24
_STYLE: dict[Any, Any] = {
    "font.size": 9.0,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#9aa5b1",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.labelsize": 9.0,
    "grid.color": "#d9dfe5",
    "grid.linewidth": 0.6,
    "xtick.color": "#52606d",
    "ytick.color": "#52606d",
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "legend.frameon": True,
    "legend.framealpha": 0.8,
    "legend.edgecolor": "none",
    "legend.fancybox": False,
    "legend.fontsize": 8.0,
    "lines.linewidth": 1.6,
    "axes.formatter.limits": (-3, 4),
    "axes.formatter.use_mathtext": True,
}


def styled(function: Callable[P, R]) -> Callable[P, R]:
    """Draw with our style, whatever the user's own settings are, and leave those alone."""

    @wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        import matplotlib
        from cycler import cycler

        with matplotlib.rc_context({**_STYLE, "axes.prop_cycle": cycler(color=COLOURS)}):
            return function(*args, **kwargs)

    return wrapper


@styled
def new_axes(
    n_rows: int = 1, n_columns: int = 1, size: tuple[float, float] = (4.4, 3.2), **grid: Any
) -> np.ndarray:
    """Return axes on a new figure, shape (n_rows, n_columns); ``size`` in inches is of each."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(n_columns * size[0], n_rows * size[1]), layout="constrained")
    return figure.subplots(n_rows, n_columns, squeeze=False, gridspec_kw=grid or None)


@dataclass(frozen=True)
class View:
    """One look at a trajectory: which stored time, and which axis a 3-D slice is normal to."""

    step: int
    normal: int = -1
    label: str = ""


@dataclass(frozen=True, eq=False)
class Comparison:
    """A test sample with its prediction.

    Attributes
    ----------
    label : str
        Shown at the left of the row, e.g. ``"median"``.
    prediction : mapping of str to ndarray, shape (T, *grid)
    """

    label: str
    trajectory: Trajectory
    prediction: Mapping[str, np.ndarray]


def views(schema: Schema) -> list[View]:
    """Return what to look at: first, middle and last time; or the three middle planes in 3-D."""
    n_times = len(schema.times)
    if n_times > 1:
        steps = sorted({0, n_times // 2, n_times - 1})
        return [View(step, label=f"t = {schema.times[step]:.3g}") for step in steps]
    if schema.n_dims == 3:
        names = [axis.name for axis in schema.axes]
        middle = [axis.coordinates[len(axis.coordinates) // 2] for axis in schema.axes]
        return [View(0, k, f"{names[k]} = {middle[k]:.3g}") for k in (2, 1, 0)]
    return [View(0)]


def can_show(schema: Schema, spec: FieldSpec) -> bool:
    """Whether there is a picture for the field: any grid field, and vertex fields in the plane."""
    if spec.location == "grid":
        return schema.n_dims <= 3
    return schema.mesh is not None and schema.n_dims == 2 and len(_triangles(schema)) > 0


@styled
def show(
    values: np.ndarray,
    schema: Schema,
    spec: FieldSpec,
    *,
    axis: Axes | None = None,
    norm: Normalize | None = None,
    colours: str | None = None,
    normal: int = -1,
    bar: bool = True,
    title: str = "",
) -> Axes:
    """Draw one field at one time.

    Parameters
    ----------
    values : ndarray, shape (*grid), (*grid, D) or (n_vertices,)
    schema, spec : Schema, FieldSpec
        Where the values live, their name and units.
    axis : Axes, optional
    norm, colours : Normalize and str, optional
        Colour scale and map; chosen from the values when not given.
    normal : int
        For 3-D, the axis the middle slice is normal to.
    bar : bool
        Draw a colour bar.

    Returns
    -------
    Axes
    """
    values = _magnitude(np.asarray(values, dtype=np.float64), spec)
    axis = new_axes()[0, 0] if axis is None else axis
    chosen_norm, chosen_colours = _scale([values], spec)
    norm, colours = norm or chosen_norm, colours or chosen_colours
    if spec.location == "vertex":
        from matplotlib.tri import Triangulation

        points = schema.mesh.points if schema.mesh is not None else np.zeros((0, 2))
        image: Any = axis.tripcolor(
            Triangulation(points[:, 0], points[:, 1], _triangles(schema)), values,
            norm=norm, cmap=colours, shading="gouraud", rasterized=True,
        )  # fmt: skip
        axis.margins(0)
        plane = [0, 1]
    elif schema.n_dims == 1:
        axis.plot(schema.axes[0].coordinates, values)
        axis.set_xlabel(_with_units(schema.axes[0].name, schema.axes[0].units))
        axis.set_ylabel(_name(spec))
        axis.set_title(title)
        axis.grid(True)
        return axis
    elif schema.n_dims <= 3:
        plane = [k for k in range(schema.n_dims) if schema.n_dims == 2 or k != normal % 3]
        if schema.n_dims == 3:
            values = np.take(values, schema.shape[normal] // 2, axis=normal % 3)
        edges = [_edges(schema.axes[k].coordinates) for k in plane]
        if all(np.allclose(np.diff(e), e[1] - e[0], rtol=1e-3) for e in edges):
            extent = (edges[0][0], edges[0][-1], edges[1][0], edges[1][-1])
            image = axis.imshow(
                values.T, origin="lower", extent=extent, norm=norm, cmap=colours,
                interpolation="nearest", aspect="auto",
            )  # fmt: skip
        else:
            image = axis.pcolormesh(*edges, values.T, norm=norm, cmap=colours, rasterized=True)
    else:
        raise SchemaError(f"field {spec.name!r}: no picture in {schema.n_dims} dimensions")
    axis.set_aspect("equal" if _is_roundish(schema, plane) else "auto")
    for setter, k in zip((axis.set_xlabel, axis.set_ylabel), plane, strict=True):
        setter(_with_units(schema.axes[k].name, schema.axes[k].units))
    axis.spines[:].set_visible(False)
    axis.set_title(title)
    if bar:
        made = axis.figure.colorbar(image, ax=axis, shrink=0.84, pad=0.02, aspect=18)
        made.outline.set_visible(False)
        if spec.units not in ("", "1"):
            made.set_label(_mathtext(spec.units))
    return axis


@styled
def panels(
    comparisons: Sequence[Comparison],
    schema: Schema,
    field: str,
    *,
    axes: np.ndarray | None = None,
) -> np.ndarray:
    """Draw input, truth, prediction and error, one row per sample and view.

    Truth and prediction share the truth's colour scale; the error, prediction minus truth, has its
    own, symmetric about zero. In 1-D truth and prediction share one axis.

    Parameters
    ----------
    comparisons : sequence of Comparison
    schema : Schema
    field : str
        Output field.
    axes : ndarray of Axes, optional
        Shape (n_comparisons * n_views, n_columns).

    Returns
    -------
    ndarray of Axes
    """
    spec = _spec(schema, field)
    inputs = [item for item in schema.inputs if can_show(schema, item)]
    looks = views(schema)
    flat = schema.n_dims == 1 and spec.location == "grid"
    titles = [_title(item) for item in inputs]
    titles += [f"{_title(spec)}: truth and prediction"] if flat else [
        f"{_title(spec)}: truth", "prediction"
    ]  # fmt: skip
    titles.append("prediction - truth")
    if axes is None:
        axes = new_axes(
            len(comparisons) * len(looks), len(titles), (3.5, 2.4) if flat else (2.9, 2.2)
        )
    truths = [_magnitude(item.trajectory.outputs[field], spec) for item in comparisons]
    is_signed = _is_signed(truths)
    shown = replace(spec, order=0)
    for k, (item, look) in enumerate((c, v) for c in comparisons for v in looks):
        row = iter(axes[k])
        for source in inputs:
            axis = next(row)
            if look.step > looks[0].step:  # inputs do not change in time
                axis.set_axis_off()
                continue
            values = item.trajectory.sample.fields[source.name]
            show(values, schema, source, axis=axis, normal=look.normal)
        truth = _magnitude(item.trajectory.outputs[field][look.step], spec)
        guess = _magnitude(np.asarray(item.prediction[field][look.step]), spec)
        if flat:
            axis = next(row)
            show(truth, schema, shown, axis=axis)
            axis.plot(schema.axes[0].coordinates, guess, "--", color=COLOURS[1])
            axis.lines[0].set_label("truth")
            axis.lines[1].set_label("prediction")
            axis.legend()
        else:
            norm, colours = _scale([truth], shown, is_signed)
            for values in (truth, guess):
                show(
                    values, schema, shown, axis=next(row), norm=norm, colours=colours,
                    normal=look.normal,
                )  # fmt: skip
        norm, colours = _scale([guess - truth], shown, symmetric=True)
        show(
            guess - truth, schema, shown, axis=next(row), norm=norm, colours=colours,
            normal=look.normal,
        )  # fmt: skip
        name = item.label if look == looks[0] else ""
        label = "\n".join(text for text in (name, look.label) if text)
        first = _leading(axes[k])
        first.set_ylabel("\n".join([label, first.get_ylabel()]).strip())
    _tidy(axes, titles, is_flat=flat, keep_x=schema.n_dims == 3 and len(schema.times) == 1)
    return axes


@styled
def gallery(
    trajectories: Sequence[Trajectory], schema: Schema, *, axes: np.ndarray | None = None
) -> np.ndarray:
    """Draw a few samples of the data: a column each, inputs above outputs, one scale per row.

    Outputs in time appear at the first, middle and last stored time, in 3-D at the middle slice
    normal to the last axis. In 1-D all samples share one axis per field.

    Returns
    -------
    ndarray of Axes
        Shape (n_rows, n_samples), or (1, n_rows) in 1-D.
    """
    rows = [(spec, View(0)) for spec in schema.inputs if can_show(schema, spec)]
    looks = views(schema) if len(schema.times) > 1 else [View(0)]
    for spec in schema.outputs:
        if can_show(schema, spec):
            rows += [(spec, look) for look in looks]
    flat = schema.n_dims == 1
    if axes is None:
        size = (3.6, 2.6) if flat else (2.0, 1.75)
        axes = new_axes(*((1, len(rows)) if flat else (len(rows), len(trajectories))), size)
    for k, (spec, look) in enumerate(rows):
        name = "\n".join(text for text in (_title(spec), look.label) if text)
        data = [_field(trajectory, spec)[look.step] for trajectory in trajectories]
        signed = _is_signed([_field(trajectory, spec) for trajectory in trajectories])
        norm, colours = _scale([_magnitude(values, spec) for values in data], spec, signed)
        for j, values in enumerate(data):
            axis = axes[0, k] if flat else axes[k, j]
            show(values, schema, spec, axis=axis, norm=norm, colours=colours, bar=False)
        if flat:
            axes[0, k].set_title(name)
            continue
        image = axes[k, 0].images or axes[k, 0].collections
        made = axes[k, 0].figure.colorbar(image[0], ax=list(axes[k]), pad=0.01, aspect=14)
        made.outline.set_visible(False)
        if spec.units not in ("", "1"):
            made.set_label(_mathtext(spec.units))
        axes[k, 0].set_ylabel(f"{name}\n{axes[k, 0].get_ylabel()}")
    if not flat:
        _tidy(axes, [_sample_title(trajectory) for trajectory in trajectories], is_flat=False)
        for axis in axes[0]:
            axis.title.set(fontsize=7.5, fontweight="normal")
    return axes


def _field(trajectory: Trajectory, spec: FieldSpec) -> np.ndarray:
    """Return a field at all times, (T, ...); an input has one time, which serves for all."""
    if spec.role == "input":
        return trajectory.sample.fields[spec.name][np.newaxis]
    return trajectory.outputs[spec.name]


def _spec(schema: Schema, name: str) -> FieldSpec:
    for spec in schema.fields:
        if spec.name == name:
            return spec
    raise SchemaError(
        f"no field {name!r} in {schema.name}; it has {', '.join(s.name for s in schema.fields)}"
    )


def _magnitude(values: np.ndarray, spec: FieldSpec) -> np.ndarray:
    """Return a scalar field: the values, or the Euclidean norm over the trailing tensor axes."""
    trailing = tuple(range(values.ndim - spec.order, values.ndim))
    return np.sqrt(np.sum(np.square(values), axis=trailing)) if spec.order else values


def _range(values: Sequence[np.ndarray]) -> tuple[float, float]:
    finite = np.concatenate([item[np.isfinite(item)].ravel() for item in values])
    return (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)


def _is_signed(values: Sequence[np.ndarray]) -> bool:
    """Whether both signs are there to a degree that matters."""
    low, high = _range(values)
    return low < 0 < high and min(-low, high) > 0.2 * max(-low, high)


def _scale(
    values: Sequence[np.ndarray], spec: FieldSpec, symmetric: bool | None = None
) -> tuple[Normalize, str]:
    """Return colour scale and map: symmetric where the sign matters, log for wide inputs."""
    from matplotlib.colors import LogNorm, Normalize

    low, high = _range(values)
    if symmetric is None:
        symmetric = _is_signed(values)
    if symmetric:
        bound = max(-low, high) or 1.0
        return Normalize(-bound, bound), "RdBu_r"
    colours = "cividis" if spec.role == "input" else "viridis"
    if spec.role == "input" and low > 0 and high > 100 * low:
        return LogNorm(low, high), colours
    return Normalize(low, high if high > low else low + 1.0), colours


def _edges(coordinates: Sequence[float]) -> np.ndarray:
    """Return the borders between points, and as far beyond the outer ones, shape (n + 1,)."""
    points = np.asarray(coordinates, dtype=np.float64)
    if len(points) == 1:
        return points[0] + np.array([-0.5, 0.5])
    middle = 0.5 * (points[1:] + points[:-1])
    return np.concatenate([[2 * points[0] - middle[0]], middle, [2 * points[-1] - middle[-1]]])


def _triangles(schema: Schema) -> np.ndarray:
    """Return the corner triangles of a plane mesh, shape (n, 3); quadrilaterals are cut in two."""
    found = [np.zeros((0, 3), dtype=np.int64)]
    for kind, cells in (schema.mesh.cells if schema.mesh is not None else {}).items():
        if kind.startswith("triangle"):
            found.append(cells[:, :3])
        elif kind.startswith("quad"):
            found += [cells[:, [0, 1, 2]], cells[:, [0, 2, 3]]]
    return np.concatenate(found)


def _is_roundish(schema: Schema, plane: Sequence[int]) -> bool:
    """Whether true proportions still leave a picture: sides within a factor of four, same units."""
    sides = [np.ptp(schema.axes[k].coordinates) or 1.0 for k in plane]
    same = len({schema.axes[k].units for k in plane}) == 1
    return bool(same and max(sides) <= 4 * min(sides))


def _name(spec: FieldSpec) -> str:
    name = _title(spec)
    return _with_units(f"|{name}|" if spec.order else name, spec.units)


def _title(spec: FieldSpec) -> str:
    """Return the name to show: the long one unless it is too long for a picture."""
    is_short = 0 < len(spec.long_name) <= _LONGEST_NAME
    return spec.long_name if is_short else spec.name.replace("_", " ")


def _with_units(name: str, units: str) -> str:
    return name if units in ("", "1") else f"{name} [{_mathtext(units)}]"


def _mathtext(units: str) -> str:
    """Raise exponents: ``m^2 s^-1``."""
    return re.sub(r"\^([-+]?\d+)", r"$^{\1}$", units)


def _sample_title(trajectory: Trajectory) -> str:
    sample = trajectory.sample
    words = [f"{name} = {value:.3g}" for name, value in list(sample.parameters.items())[:3]]
    return "\n".join([f"sample {sample.index}", *words])


def _tidy(axes: np.ndarray, titles: Sequence[str], *, is_flat: bool, keep_x: bool = False) -> None:
    """Keep column titles on the first row and tick labels on the outer axes only."""
    for (i, j), axis in np.ndenumerate(axes):
        axis.set_title(titles[j] if i == 0 else "")
        if i < len(axes) - 1 and not keep_x:
            _blank(axis.xaxis, is_flat)
        if axis is not _leading(axes[i]) and not is_flat:
            _blank(axis.yaxis, is_flat)


def _blank(line: Any, keep_ticks: bool) -> None:
    """Take the words off an axis line, and off images the ticks too."""
    line.set_label_text("")
    line.set_tick_params(labelbottom=False, labelleft=False)
    line.set_visible(keep_ticks)


def _leading(row: np.ndarray) -> Any:
    """Return the first axis of a row that shows anything."""
    return next(axis for axis in row if axis.axison)
