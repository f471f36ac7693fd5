"""How windows over time are cut out of steps: the numbers behind one-step networks.

The states u_1, ..., u_T of a trajectory are stored at t_1, ..., t_T; ``schema.initial`` says where
u_0, the state at t_0 = t_1 - dt, is found in a sample. A window (u_k; u_{k+1}, ..., u_{k+m}) is an
item of another schema, with the inputs of the first and ``<field>_now``, with the outputs
``<field>_next1`` to ``<field>_next<m>``, at the times t_k. What only says where a trajectory begins
is no input of it: u_now does. Without ``initial`` windows begin at u_1 and all inputs stay.

Networks learn the change u_{k+j} - u_k (``FieldSpec.after``), normalised by its own mean and
deviation: with a small dt the state hardly changes, and a network that had to give it whole would
spend itself on copying.

Imports no torch: a case is checked with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from simlab.core.errors import ConfigError
from simlab.learn.encoding import Encoding
from simlab.learn.settings import TrainSettings
from simlab.store.schema import Schema

__all__ = ["WindowLayout", "learned_schema", "paired_schema"]


def paired_schema(schema: Schema, ahead: int) -> Schema:
    """Return the schema of windows of a step and the ``ahead`` steps after it.

    Raises
    ------
    ConfigError
        When trajectories are shorter than that.
    """
    return WindowLayout(schema, ahead).schema


def learned_schema(settings: TrainSettings, schema: Schema) -> Schema:
    """Return the schema of the items that settings train on: of steps, or of windows.

    Raises
    ------
    ConfigError
        When data of this schema, or the network, do not go with one-step training.
    """
    if not settings.ahead:
        return schema
    where = f"train.ahead = {settings.ahead}: schema {schema.name!r}"
    lost = [spec.name for spec in Encoding(schema).outputs if spec.name not in schema.initial]
    if lost:
        raise ConfigError(
            f"{where} does not say in which state {', '.join(lost)} begins, so no trajectory could "
            "be predicted step by step; give it in Schema.initial, or leave train.ahead = 0"
        )
    if getattr(settings.operator, "marches", False):
        raise ConfigError(
            f"{where}: operator {settings.operator.kind!r} marches in time by itself, from the "
            "input fields to the time asked for; leave train.ahead = 0, or choose another operator"
        )
    steps = np.diff(schema.times)
    if len(steps) and not np.allclose(steps, steps[0], rtol=1e-6, atol=0.0):
        raise ConfigError(
            f"{where} has stored times {steps.min():g} to {steps.max():g} apart; one network for "
            "all steps needs equal ones: store at equal times, or leave train.ahead = 0"
        )
    return paired_schema(schema, settings.ahead)


class WindowLayout:
    """Windows of a schema, ``ahead`` steps long.

    Window ``k`` begins with the state ``k`` steps after the initial one; after the first stored one
    where the schema does not say what is initial.

    Attributes
    ----------
    schema : Schema
        Of the windows.
    encoding, steps : Encoding
        Rows of windows, and rows of steps.
    has_start : bool
        Whether the first window begins with the initial state.
    """

    def __init__(self, schema: Schema, ahead: int) -> None:
        if not 1 <= ahead < len(schema.times):
            raise ConfigError(
                f"windows of {ahead} steps ahead need trajectories of at least {ahead + 1} steps; "
                f"{schema.name!r} has {len(schema.times)}"
            )
        self.ahead, self.steps = ahead, Encoding(schema)
        outputs = self.steps.outputs
        self.has_start = all(spec.name in schema.initial for spec in outputs)
        used = self._find_start(schema) if self.has_start else set()
        now = [replace(spec, name=f"{spec.name}_now", role="input") for spec in outputs]
        later = [
            replace(spec, name=f"{spec.name}_next{k}", after=f"{spec.name}_now")
            for k in range(1, ahead + 1)
            for spec in outputs
        ]
        kept = [spec for spec in schema.inputs if spec.name not in used]
        times = schema.times
        if self.has_start:
            times = (float(2 * times[0] - times[1]), *times)
        self.schema = replace(
            schema,
            fields=tuple(replace(spec, resampling=None) for spec in (*kept, *now, *later)),
            times=tuple(times[:-ahead]),
            parameters={n: unit for n, unit in schema.parameters.items() if n not in used},
            mesh=None,
            initial={},
        )
        self.encoding = Encoding(self.schema)
        n = self.steps.n_points
        stays = [np.array([name not in used for name in self.steps.names], dtype=bool)]
        for spec in schema.inputs:
            stays.append(np.full(self.steps.channels(spec) * n, spec.name not in used))
        self._kept = np.flatnonzero(np.concatenate(stays))

    def _find_start(self, schema: Schema) -> set[str]:
        """Note where in a condition the initial state stands; return the names of what it takes."""
        steps = self.steps
        at = {name: np.array([place]) for place, name in enumerate(steps.names)}
        begin = steps.n_parameters
        for spec in schema.inputs:
            size = steps.channels(spec) * steps.n_points
            at[spec.name] = np.arange(begin, begin + size)
            begin += size
        places, values = [], []
        used: set[str] = set()
        for spec in steps.outputs:
            source, size = schema.initial[spec.name], steps.channels(spec) * steps.n_points
            names = (source,) if isinstance(source, str) else source
            if isinstance(names, tuple):
                used.update(names)
                found = np.concatenate([at[name] for name in names])
                places.append(np.broadcast_to(found, size))
                values.append(np.zeros(size))
            else:
                places.append(np.full(size, -1))
                values.append(np.full(size, names))
        self._places = np.concatenate(places)
        self._values = np.concatenate(values).astype(np.float32)
        return used

    def start(self, conditions: np.ndarray) -> np.ndarray:
        """Return the initial states of samples, shape (B, C_out * points), float32.

        Parameters
        ----------
        conditions : ndarray, shape (B, condition_size)
            Of the steps.
        """
        if not conditions.shape[1]:
            return np.tile(self._values, (len(conditions), 1))
        return np.where(self._places >= 0, conditions[:, self._places], self._values)

    def condition(self, conditions: np.ndarray, states: np.ndarray) -> np.ndarray:
        """Return what windows tell a network but the time, shape (B, condition_size of windows).

        Parameters
        ----------
        conditions : ndarray, shape (B, condition_size of steps)
        states : ndarray, shape (B, C_out * points)
            With which the windows begin.
        """
        return np.concatenate([conditions[:, self._kept], states], axis=1)

    def containing(self, step: int) -> range:
        """Return the windows that hold a stored step."""
        first = step + self.has_start
        return range(max(0, first - self.ahead), min(first + 1, self.encoding.n_times))

    def steps_of(self, window: int) -> range:
        """Return the stored steps that a window holds."""
        first = window - self.has_start
        return range(max(0, first), first + self.ahead + 1)

    def row(self, window: int, rows: Sequence[np.ndarray]) -> np.ndarray:
        """Return a window, shape (row_size,), of the rows of its steps."""
        size = self.steps.condition_size
        begin = size + self.steps.n_time
        condition = rows[0][None, :size]
        if self.has_start and window == 0:
            state, later = self.start(condition), rows
        else:
            state, later = rows[0][None, begin:], rows[1:]
        made = self.condition(condition, state)[0]
        time = np.array(self.schema.times[window : window + 1], np.float32)[: self.encoding.n_time]
        return np.concatenate([made, time, *(row[begin:] for row in later)])

    def begins(self) -> list[int]:
        """Return the windows that together make all states after the initial one, in order.

        They lie end to end; the last one overlaps when ``ahead`` does not divide the number of
        steps.
        """
        last = self.steps.n_times - self.ahead
        return [min(k, last) for k in range(0, self.steps.n_times, self.ahead)]
