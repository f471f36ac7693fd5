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
from simlab.core.errors import SchemaError, StoreError
from simlab.core.metrics import relative_l2, summary
from simlab.core.runs import publish, software
from simlab.core.samples import Sample, Trajectory
from simlab.learn.encoding import Encoding, Ranges
from simlab.learn.networks import ScaledNetwork
from simlab.learn.settings import TrainSettings
from simlab.store.schema import Schema

__all__ = ["Model"]

_FORMAT = 1
_CHUNK = 64


class Model:
    """A network for one schema; untrained when made.

    Parameters
    ----------
    settings : TrainSettings
        Its operator and seed decide the initial weights.
    schema : Schema

    Attributes
    ----------
    network : ScaledNetwork
    ranges : Ranges
        What the training data covered.
    validation : dict of str to float, optional
        Quantiles of the relative L2 error on validation trajectories, and their number ``n``.
    """

    def __init__(self, settings: TrainSettings, schema: Schema) -> None:
        self.settings, self.schema = settings, schema
        self.encoding = Encoding(schema)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.network = ScaledNetwork(settings.operator.build(schema), self.encoding)
        self.ranges = Ranges.empty(self.encoding)
        self.validation: dict[str, float] | None = None

    def __repr__(self) -> str:
        n = sum(p.numel() for p in self.network.parameters())
        return f"Model({self.settings.operator!r}, schema={self.schema.name!r}, {n} weights)"

    def predict(self, samples: Sequence[Sample]) -> dict[str, np.ndarray]:
        """Return output fields by name, each of shape (n_samples, T, *grid), float32."""
        n_times = self.encoding.n_times
        times = np.asarray(self.schema.times)
        parts: list[dict[str, np.ndarray]] = []
        for group in _groups(samples, max(1, _CHUNK // n_times)):
            conditions = np.stack([self.encoding.condition(sample) for sample in group])
            query = self.encoding.query(
                np.repeat(conditions, n_times, axis=0), np.tile(times, len(group))
            )
            chunks = [self._forward(query[i : i + _CHUNK]) for i in range(0, len(query), _CHUNK)]
            fields = self.encoding.decode(np.concatenate(chunks))
            parts.append(
                {name: v.reshape(len(group), n_times, *v.shape[1:]) for name, v in fields.items()}
            )
        if not parts:
            empty = {spec.name: self.schema.field_shape(spec) for spec in self.encoding.outputs}
            return {n: np.zeros((0, n_times, *s), dtype=np.float32) for n, s in empty.items()}
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def estimate(self, samples: Sequence[Sample]) -> np.ndarray:
        """Return the validated 95 % quantile of the error, shape (n_samples,).

        It is inf outside the range of the training data, and where nothing was validated.
        """
        if self.validation is None:
            return np.full(len(samples), np.inf)
        inside = [
            self.ranges.contains(self.encoding.features(self.encoding.condition(sample)))
            for sample in samples
        ]
        return np.where(inside, self.validation["p95"], np.inf)

    def errors(self, trajectories: Iterable[Trajectory]) -> np.ndarray:
        """Return relative L2 errors over space and time, shape (n,), float64.

        One per trajectory: the largest over its fields, those whose truth vanishes left out.
        """
        found: list[np.ndarray] = []
        for group in _groups(trajectories, max(1, _CHUNK // self.encoding.n_times)):
            predictions = self.predict([trajectory.sample for trajectory in group])
            worst = np.zeros(len(group))
            for name, prediction in predictions.items():
                truth = np.stack([trajectory.outputs[name] for trajectory in group])
                worst = np.fmax(worst, relative_l2(prediction, truth))
            found.append(worst)
        return np.concatenate(found) if found else np.zeros(0)

    def validate(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        """Measure the error on trajectories that were never trained on, and keep its quantiles."""
        errors = self.errors(trajectories)
        self.validation = summary(errors) | {"n": float(len(errors))}
        return summary(errors)

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
            tensors = torch.load(directory / "model.pt", weights_only=True)
        except Exception as error:  # a torn file makes torch raise almost anything
            raise StoreError(f"{directory} holds no model that can be read: {error}") from error
        if facts.get("format") != _FORMAT:
            raise StoreError(
                f"{directory}: model format {facts.get('format')}, this version reads {_FORMAT}"
            )
        model = cls(build(TrainSettings, facts["settings"]), Schema.from_json(facts["schema"]))
        try:
            model.load_tensors(tensors)
        except RuntimeError as error:
            raise StoreError(f"{directory}: weights do not fit the network: {error}") from error
        bounds = [_bounds(facts["ranges"][name]) for name in ("lower", "upper")]
        model.ranges = Ranges(*bounds)
        model.validation = facts["validation"]
        return model

    def _forward(self, query: np.ndarray) -> np.ndarray:
        """Evaluate rows without outputs, shape (B, ...), in evaluation mode without gradients."""
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
