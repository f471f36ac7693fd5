"""A trained network with all it takes to use it: schema, scales, ranges, validated error.

model.pt      weights and scales, plain tensors, read with ``weights_only=True``
model.json    class, settings of the network, schema, ranges of the training data, validation
              quantiles, library versions
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from simlab.core.config import as_table, build
from simlab.core.errors import ConfigError, SchemaError, StoreError
from simlab.core.metrics import relative_l2, summary
from simlab.core.runs import publish, software
from simlab.core.samples import Sample, Trajectory
from simlab.learn import checkpoints
from simlab.learn.encoding import Encoding, Ranges
from simlab.learn.layout import WindowLayout, learned_schema
from simlab.learn.networks import ScaledNetwork
from simlab.learn.settings import TrainSettings
from simlab.store.schema import Schema

__all__ = ["Model"]

_FORMAT = 1
_CHUNK = 64
_POINTS = 2**20  # evaluated at once: what is between the layers takes a hundred times as many bytes
_STRETCHES = 8


class Model:
    """A network for one schema; untrained when made.

    Parameters
    ----------
    settings : TrainSettings
        Its operator and seed decide the initial weights; with ``ahead`` it is a one-step network.
    schema : Schema
        Of the trajectories.

    Attributes
    ----------
    encoding : Encoding
        Of what the network learns from: steps, or windows of a one-step network.
    network : ScaledNetwork
    ranges : Ranges
        What the training data covered.
    validation : dict of str to float, optional
        Quantiles of the relative L2 error on validation trajectories, and their number ``n``.
    one_step : dict of str to float, optional
        Those of the errors of their single states, each predicted from true ones.
    """

    def __init__(self, settings: TrainSettings, schema: Schema) -> None:
        self.settings, self.schema = settings, schema
        learned = learned_schema(settings, schema)
        self._layout = WindowLayout(schema, settings.ahead) if settings.ahead else None
        self._steps = Encoding(schema)
        self.encoding = self._steps if self._layout is None else self._layout.encoding
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.network = ScaledNetwork(settings.operator.build(learned), self.encoding)
        self.ranges = Ranges.empty(self.encoding)
        self.validation: dict[str, float] | None = None
        self.one_step: dict[str, float] | None = None

    def __repr__(self) -> str:
        n = sum(p.numel() for p in self.network.parameters())
        return f"Model({self.settings.operator!r}, schema={self.schema.name!r}, {n} weights)"

    def predict(self, samples: Sequence[Sample]) -> dict[str, np.ndarray]:
        """Return output fields by name, each of shape (n_samples, T, *grid), float32.

        A one-step network goes on from its own answers, all samples of a chunk at once.
        """
        march = self._at_all_times if self._layout is None else self._rollout
        groups = _groups(samples, self._together)
        return self._fields([march(self._conditions(group)) for group in groups])

    def predict_steps(self, trajectories: Iterable[Trajectory]) -> dict[str, np.ndarray]:
        """Return every stored state as a one-step network makes it from true ones.

        ``ahead`` states at a time, then the next ``ahead`` from the true last of these.

        Returns
        -------
        dict of str to ndarray, shape (n, T, *grid), float32

        Raises
        ------
        ConfigError
            When this network does not go by steps.
        """
        if self._layout is None:
            raise ConfigError("this network gives a state at any time at once: train.ahead is 0")
        made = []
        for group in _groups(trajectories, self._together):
            conditions = self._conditions([trajectory.sample for trajectory in group])
            truth = np.stack([self._steps.rows(trajectory) for trajectory in group])
            states = truth[:, :, self._steps.condition_size + self._steps.n_time :]
            made.append(self._teacher_forced(conditions, states))
        return self._fields(made)

    @property
    def _together(self) -> int:
        """Samples that are predicted at once: a rollout takes one step of all of them."""
        return (
            self._chunk if self._layout is not None else max(1, self._chunk // self._steps.n_times)
        )

    @property
    def _chunk(self) -> int:
        """Rows that are evaluated at once."""
        return max(1, min(_CHUNK, _POINTS // self.encoding.n_points))

    def _conditions(self, samples: Sequence[Sample]) -> np.ndarray:
        """Return what the samples bring, shape (n_samples, condition_size of steps)."""
        return np.stack([self._steps.condition(sample) for sample in samples])

    def _fields(self, made: list[np.ndarray]) -> dict[str, np.ndarray]:
        """Return fields by name of parts of shape (b, T, C_out, *grid)."""
        n_times, shape = self._steps.n_times, (self._steps.n_outputs, *self.schema.shape)
        made = made or [np.zeros((0, n_times, *shape), dtype=np.float32)]
        channels = np.concatenate(made).reshape(-1, *shape)
        return {
            name: values.reshape(-1, n_times, *values.shape[1:])
            for name, values in self._steps.decode(channels).items()
        }

    def _at_all_times(self, conditions: np.ndarray) -> np.ndarray:
        """Return states (b, T, C_out, *grid), each from the sample and its time."""
        b, times = len(conditions), np.asarray(self.schema.times)
        made = self._forward(np.repeat(conditions, len(times), axis=0), np.tile(times, b))
        return made.reshape(b, len(times), *made.shape[1:])

    def _rollout(self, conditions: np.ndarray) -> np.ndarray:
        """Return states (b, T, C_out, *grid), each made from the predicted one before."""
        layout, b = self._layout, len(conditions)
        assert layout is not None
        shape = (self._steps.n_outputs, *self.schema.shape)
        made = np.empty((b, self._steps.n_times, *shape), dtype=np.float32)
        for k in layout.begins():
            now = made[:, k - 1].reshape(b, -1) if k else layout.start(conditions)
            times = np.full(b, layout.schema.times[k])
            values = self._forward(layout.condition(conditions, now), times)
            made[:, k : k + layout.ahead] = values.reshape(b, layout.ahead, *shape)
        return made

    def _teacher_forced(self, conditions: np.ndarray, states: np.ndarray) -> np.ndarray:
        """Return states (b, T, C_out, *grid) made from the true ones (b, T, C_out * points)."""
        layout, b = self._layout, len(conditions)
        assert layout is not None
        before = np.concatenate([layout.start(conditions)[:, None], states], axis=1)
        begins = layout.begins()
        query = layout.condition(
            np.repeat(conditions, len(begins), axis=0),
            before[:, begins].reshape(b * len(begins), -1),
        )
        values = self._forward(query, np.tile(np.asarray(layout.schema.times)[begins], b))
        shape = (self._steps.n_outputs, *self.schema.shape)
        values = values.reshape(b, len(begins), layout.ahead, *shape)
        made = np.empty((b, self._steps.n_times, *shape), dtype=np.float32)
        for place, k in enumerate(begins):
            made[:, k : k + layout.ahead] = values[:, place]
        return made

    def estimate(self, samples: Sequence[Sample]) -> np.ndarray:
        """Return the validated 95 % quantile of the error, shape (n_samples,).

        It is inf outside the range of the training data, and where nothing was validated.
        """
        if self.validation is None:
            return np.full(len(samples), np.inf)
        if not len(samples):
            return np.zeros(0)
        conditions = self._conditions(samples)
        if self._layout is not None:
            conditions = self._layout.condition(conditions, self._layout.start(conditions))
        inside = [self.ranges.contains(self.encoding.features(given)) for given in conditions]
        return np.where(inside, self.validation["p95"], np.inf)

    def errors(self, trajectories: Iterable[Trajectory]) -> np.ndarray:
        """Return relative L2 errors over space and time, shape (n,), float64.

        One per trajectory: the largest over its fields, those whose truth vanishes left out.
        """
        found = [
            self._worst(self.predict([trajectory.sample for trajectory in group]), group, 1)
            for group in _groups(trajectories, self._together)
        ]
        return np.concatenate(found) if found else np.zeros(0)

    def step_errors(self, trajectories: Iterable[Trajectory]) -> np.ndarray:
        """Return relative L2 errors of :meth:`predict_steps` over space, shape (n, T), float64."""
        found = [
            self._worst(self.predict_steps(group), group, 2)
            for group in _groups(trajectories, self._together)
        ]
        return np.concatenate(found) if found else np.zeros((0, self._steps.n_times))

    def _worst(
        self, made: dict[str, np.ndarray], group: Sequence[Trajectory], n_kept: int
    ) -> np.ndarray:
        """Return the largest error over the fields, by the first ``n_kept`` axes."""
        errors = []
        for name, prediction in made.items():
            truth = np.stack([trajectory.outputs[name] for trajectory in group])
            errors.append(relative_l2(prediction, truth, n_kept=n_kept))
        return np.asarray(np.fmax.reduce([np.zeros_like(errors[0]), *errors]))

    def validate(self, trajectories: Sequence[Trajectory]) -> dict[str, dict[str, Any]]:
        """Measure the error on trajectories that were never trained on, and keep its quantiles.

        Returns
        -------
        dict of str to dict
            ``rel_l2``: quantiles over trajectories; of a one-step network over single states from
            true ones, and those over trajectories as ``rollout``. With several times ``by_time``:
            the same quantiles over the single states of (at most 8) equal stretches of time, a list
            each, and the first and last time of each as ``first`` and ``last``.
        """
        whole, single = [np.zeros(0)], [np.zeros((0, self._steps.n_times))]
        for group in _groups(trajectories, self._together):
            made = self.predict([trajectory.sample for trajectory in group])
            whole.append(self._worst(made, group, 1))
            single.append(self._worst(made, group, 2))
        errors = np.concatenate(whole)
        self.validation = summary(errors) | {"n": float(len(errors))}
        found: dict[str, dict[str, Any]] = {"rel_l2": summary(errors)}
        if self._layout is not None:
            self.one_step = summary(self.step_errors(trajectories))
            found = {"rel_l2": self.one_step, "rollout": summary(errors)}
        if self._steps.n_times > 1:
            found["by_time"] = self._by_time(np.concatenate(single))
        return found

    def _by_time(self, errors: np.ndarray) -> dict[str, list[float]]:
        """Return quantiles of errors (n, T) over stretches of time."""
        stretches = np.array_split(np.arange(errors.shape[1]), min(_STRETCHES, errors.shape[1]))
        times = self.schema.times
        parts = [summary(errors[:, stretch]) for stretch in stretches]
        return {
            "first": [times[stretch[0]] for stretch in stretches],
            "last": [times[stretch[-1]] for stretch in stretches],
            **{name: [part[name] for part in parts] for name in parts[0]},
        }

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return weights and scales by name.

        neuraloperator adds an entry ``_metadata`` that is no tensor and cannot be loaded again.
        """
        state = self.network.state_dict()
        return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}

    def load_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take over weights and scales."""
        self.network.load_state_dict(tensors)

    def save(self, directory: str | Path) -> None:
        """Write ``model.pt`` and ``model.json``; a crash leaves the files that were there."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        part = directory / f".model.pt.{os.getpid()}.part"
        with part.open("wb") as file:
            torch.save(self.tensors(), file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(directory / "model.pt")
        facts: dict[str, Any] = {
            "class": "NeuralSurrogate",
            "format": _FORMAT,
            "settings": as_table(self.settings),
            "schema": self.schema.to_json(),
            "ranges": {"lower": _finite(self.ranges.lower), "upper": _finite(self.ranges.upper)},
            "validation": self.validation,
            "one_step": self.one_step,
            "versions": software(),
        }
        publish(directory / "model.json", json.dumps(facts, indent=1))

    @classmethod
    def load(cls, directory: str | Path) -> Model:
        """Read what :meth:`save` wrote.

        Raises
        ------
        StoreError
            When the directory holds no model, or a broken one.
        """
        directory = Path(directory)
        try:
            facts = json.loads((directory / "model.json").read_text(encoding="utf-8"))
            tensors = checkpoints.read_tensors(directory / "model.pt")
        except (OSError, ValueError) as error:
            raise StoreError(f"{directory} holds no model that can be read: {error}") from error
        if not isinstance(facts, dict) or facts.get("format") != _FORMAT:
            known = facts.get("format") if isinstance(facts, dict) else None
            raise StoreError(f"{directory}: model format {known}, this version reads {_FORMAT}")
        try:
            model = cls(build(TrainSettings, facts["settings"]), Schema.from_json(facts["schema"]))
            bounds = [_bounds(facts["ranges"][name]) for name in ("lower", "upper")]
            model.validation = facts["validation"]
        except KeyError as error:
            raise StoreError(f"{directory}: model.json lacks {error}") from error
        try:
            model.load_tensors(tensors)
        except RuntimeError as error:
            raise StoreError(f"{directory}: weights do not fit the network: {error}") from error
        model.ranges = Ranges(*bounds)
        model.one_step = facts.get("one_step")
        return model

    def _forward(self, conditions: np.ndarray, times: np.ndarray) -> np.ndarray:
        """Evaluate rows (B, condition_size) at times (B,): (B, channels, *grid), no gradients."""
        query, n = self.encoding.query(conditions, times), self._chunk
        return np.concatenate([self._evaluate(query[i : i + n]) for i in range(0, len(query), n)])

    def _evaluate(self, query: np.ndarray) -> np.ndarray:
        n = self.encoding.condition_size
        shape = (len(query), self.encoding.n_inputs, *self.schema.shape)
        inputs = (
            query[:, : self.encoding.n_parameters],
            query[:, self.encoding.n_parameters : n].reshape(shape),
            query[:, n:],
        )
        self.network.eval()
        with torch.no_grad():
            made = self.network(*(torch.from_numpy(np.ascontiguousarray(a)) for a in inputs))
        values: np.ndarray = made.numpy()
        if values.shape[2:] != self.schema.shape:
            raise SchemaError(f"the network returned {values.shape}, expected {self.schema.shape}")
        return values


def _groups(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    stream = iter(items)
    while group := list(islice(stream, size)):
        yield group


def _finite(values: np.ndarray) -> list[float | None]:
    return [float(v) if np.isfinite(v) else None for v in values]


def _bounds(values: Sequence[float | None]) -> np.ndarray:
    """Undo :func:`_finite`: a bound that was never set holds nothing inside."""
    return np.array([np.nan if v is None else v for v in values], dtype=np.float64)
