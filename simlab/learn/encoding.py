"""From samples and fields to rows of numbers, and back.

One row is what one training item is stored as, float32, flat::

    parameters (P) | input fields (C_in * points) | time (N_t) | outputs (C_out * points)

in physical units. Components of vectors and tensors are channels. ``N_t`` is 0 when the schema has
a single time. Normalisation happens inside the model (:class:`simlab.learn.networks.ScaledNetwork`)
with statistics of a pilot, so rows never change when it is fixed, and never drift.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from simlab.core.errors import ConfigError, SchemaError
from simlab.core.samples import Sample, Trajectory
from simlab.store.schema import FieldSpec, Schema

__all__ = ["Encoding", "Normaliser", "Parts", "Ranges", "Statistics"]


class Parts(NamedTuple):
    """Views of rows.

    ``parameters`` (B, P), ``fields`` (B, C_in, *grid), ``time`` (B, N_t), ``outputs``
    (B, C_out, *grid).
    """

    parameters: np.ndarray
    fields: np.ndarray
    time: np.ndarray
    outputs: np.ndarray


class Encoding:
    """The layout of rows for one schema.

    Raises
    ------
    ConfigError
        When the schema has no output field on the grid.
    """

    def __init__(self, schema: Schema) -> None:
        self.schema = schema
        self.names = tuple(schema.parameters)
        self.outputs = tuple(spec for spec in schema.outputs if spec.location == "grid")
        if not self.outputs:
            raise ConfigError(
                f"schema {schema.name!r} has no output field on the grid, so there is nothing a "
                "network could learn"
            )
        self.n_points = math.prod(schema.shape)
        self.n_parameters = len(self.names)
        self.n_inputs = sum(self.channels(spec) for spec in schema.inputs)
        self.n_outputs = sum(self.channels(spec) for spec in self.outputs)
        self.n_times = len(schema.times)
        self.base = self._find_base()
        self.n_time = int(self.n_times > 1)
        self.condition_size = self.n_parameters + self.n_inputs * self.n_points
        self.row_size = self.condition_size + self.n_time + self.n_outputs * self.n_points

    def _find_base(self) -> np.ndarray | None:
        """Return the input channel that each output channel comes after, -1 for none, or None."""
        begins, n = {}, 0
        for spec in self.schema.inputs:
            begins[spec.name] = n
            n += self.channels(spec)
        found: list[int] = []
        for spec in self.outputs:
            begin = -1 if spec.after is None else begins[spec.after]
            found += [begin + (begin >= 0) * k for k in range(self.channels(spec))]
        return np.array(found) if max(found) >= 0 else None

    def learned(self, parts: Parts) -> np.ndarray:
        """Return what a network is to give, (B, C_out, *grid): changes of what comes after."""
        if self.base is None:
            return parts.outputs
        before = np.where(
            (self.base >= 0).reshape(-1, *(1,) * self.schema.n_dims),
            parts.fields[:, self.base],
            np.float32(0.0),
        )
        return np.asarray(parts.outputs - before)

    @property
    def columns(self) -> list[str]:
        """Names of what :class:`Statistics` has columns of: a field's once for every channel."""
        specs = (*self.schema.inputs, *self.outputs)
        return [*self.names, *(spec.name for spec in specs for _ in range(self.channels(spec)))]

    def channels(self, spec: FieldSpec) -> int:
        """Return how many channels a field takes."""
        return int(self.schema.n_dims**spec.order)

    def condition(self, sample: Sample) -> np.ndarray:
        """Return parameters and input fields of a sample, shape (condition_size,), float32."""
        missing = [name for name in self.names if name not in sample.parameters]
        missing += [spec.name for spec in self.schema.inputs if spec.name not in sample.fields]
        if missing:
            raise SchemaError(f"sample {sample.index}: {', '.join(missing)} not given")
        parts = [np.array([sample.parameters[name] for name in self.names], dtype=np.float32)]
        parts += [
            self._flat(spec, sample.fields[spec.name], f"sample {sample.index}")
            for spec in self.schema.inputs
        ]
        return np.concatenate(parts)

    def row(
        self, condition: np.ndarray, time: float, outputs: Mapping[str, np.ndarray]
    ) -> np.ndarray:
        """Return one training item, shape (row_size,), float32."""
        times = [np.array([time], dtype=np.float32)] if self.n_time else []
        flat = [
            self._flat(spec, outputs[spec.name], f"output at time {time:g}")
            for spec in self.outputs
        ]
        return np.concatenate([condition, *times, *flat])

    def rows(self, trajectory: Trajectory) -> np.ndarray:
        """Return all items of a trajectory, shape (T, row_size)."""
        condition = self.condition(trajectory.sample)
        steps = range(len(trajectory.times))
        return np.stack([self.step(trajectory, condition, step) for step in steps])

    def step(self, trajectory: Trajectory, condition: np.ndarray, step: int) -> np.ndarray:
        """Return one item of a trajectory whose condition is known, shape (row_size,)."""
        fields = {spec.name: trajectory.outputs[spec.name][step] for spec in self.outputs}
        return self.row(condition, float(trajectory.times[step]), fields)

    def split(self, rows: np.ndarray) -> Parts:
        """Return views of rows of shape (B, row_size)."""
        b, grid = len(rows), self.schema.shape
        start = self.condition_size + self.n_time
        return Parts(
            rows[:, : self.n_parameters],
            rows[:, self.n_parameters : self.condition_size].reshape(b, self.n_inputs, *grid),
            rows[:, self.condition_size : start],
            rows[:, start:].reshape(b, self.n_outputs, *grid),
        )

    def query(self, conditions: np.ndarray, times: np.ndarray) -> np.ndarray:
        """Return rows without their outputs, shape (B, condition_size + N_t), float32.

        Parameters
        ----------
        conditions : ndarray, shape (B, condition_size)
        times : ndarray, shape (B,)
        """
        columns = [conditions, times[:, None].astype(np.float32)][: 1 + self.n_time]
        return np.concatenate(columns, axis=1)

    def decode(self, channels: np.ndarray) -> dict[str, np.ndarray]:
        """Return fields by name, shape (B, *grid) or (B, *grid, D, ...), of (B, C_out, *grid)."""
        fields, start = {}, 0
        for spec in self.outputs:
            stop = start + self.channels(spec)
            values = np.moveaxis(channels[:, start:stop], 1, -1)
            fields[spec.name] = np.ascontiguousarray(
                values.reshape(len(channels), *self.schema.field_shape(spec))
            )
            start = stop
        return fields

    def field_channels(self) -> list[slice]:
        """Return which output channels belong to each output field."""
        stops = np.cumsum([self.channels(spec) for spec in self.outputs]).tolist()
        return [slice(a, b) for a, b in zip([0, *stops[:-1]], stops, strict=True)]

    def features(self, condition: np.ndarray) -> np.ndarray:
        """Return parameters, then mean, minimum and maximum of each input channel, float64."""
        fields = condition[self.n_parameters :].reshape(self.n_inputs, self.n_points)
        parameters = condition[: self.n_parameters].astype(np.float64)
        if not self.n_inputs:
            return parameters
        mean = fields.mean(axis=1, dtype=np.float64)
        return np.concatenate([parameters, mean, fields.min(axis=1), fields.max(axis=1)])

    def _flat(self, spec: FieldSpec, values: np.ndarray, where: str) -> np.ndarray:
        expected = self.schema.field_shape(spec)
        values = np.asarray(values, dtype=np.float32)
        if values.shape != expected:
            raise SchemaError(
                f"{where}: field {spec.name!r} has shape {values.shape}, expected {expected}"
            )
        if not spec.order:
            return values.reshape(-1)
        return np.moveaxis(values.reshape(self.n_points, -1), 0, 1).reshape(-1)


@dataclass
class Statistics:
    """Sums over rows, one column per parameter, input channel and learned channel, float64."""

    count: np.ndarray
    total: np.ndarray
    square: np.ndarray

    @classmethod
    def of(cls, encoding: Encoding, rows: np.ndarray) -> Statistics:
        """Return the sums over rows of shape (B, row_size)."""
        parts = encoding.split(rows)
        columns = [parts.parameters[..., None], parts.fields, encoding.learned(parts)]
        flat = [a.reshape(*a.shape[:2], math.prod(a.shape[2:])).astype(np.float64) for a in columns]
        count = [np.full(a.shape[1], a.shape[0] * a.shape[2], dtype=np.float64) for a in flat]
        return cls(
            np.concatenate(count),
            np.concatenate([a.sum(axis=(0, 2)) for a in flat]),
            np.concatenate([np.square(a).sum(axis=(0, 2)) for a in flat]),
        )

    @classmethod
    def merged(cls, parts: Sequence[Statistics]) -> Statistics:
        """Return the sums over all rows of several statistics."""
        return cls(*(sum(getattr(p, n) for p in parts) for n in ("count", "total", "square")))


@dataclass(frozen=True, eq=False)
class Normaliser:
    """Mean and standard deviation per channel, fixed once; columns as in :class:`Statistics`."""

    mean: np.ndarray
    std: np.ndarray

    @classmethod
    def fit(cls, statistics: Statistics) -> Normaliser:
        """Return mean and standard deviation; a constant channel keeps the scale 1."""
        mean = statistics.total / statistics.count
        variance = np.maximum(statistics.square / statistics.count - mean**2, 0.0)
        std = np.sqrt(variance)
        floor = 1e-6 * np.maximum(np.abs(mean), 1e-300)
        return cls(mean, np.where(std > floor, std, 1.0))

    @classmethod
    def identity(cls, encoding: Encoding) -> Normaliser:
        """Return the normaliser that changes nothing: what a model has before its pilot."""
        n = encoding.n_parameters + encoding.n_inputs + encoding.n_outputs
        return cls(np.zeros(n), np.ones(n))


class Ranges:
    """Smallest and largest :meth:`Encoding.features` seen in training.

    Parameters
    ----------
    lower, upper : ndarray, shape (n_features,)
    """

    MARGIN = 0.05

    def __init__(self, lower: np.ndarray, upper: np.ndarray) -> None:
        self.lower, self.upper = lower, upper

    @classmethod
    def empty(cls, encoding: Encoding) -> Ranges:
        """Return ranges that hold nothing yet."""
        n = encoding.n_parameters + 3 * encoding.n_inputs
        return cls(np.full(n, np.inf), np.full(n, -np.inf))

    def include(self, features: np.ndarray) -> None:
        """Widen the ranges by one sample."""
        np.minimum(self.lower, features, out=self.lower)
        np.maximum(self.upper, features, out=self.upper)

    def contains(self, features: np.ndarray) -> bool:
        """Return whether a sample lies inside, give or take 5 % of the width."""
        margin = self.MARGIN * (self.upper - self.lower)
        inside = (features >= self.lower - margin) & (features <= self.upper + margin)
        return bool(np.all(inside))
