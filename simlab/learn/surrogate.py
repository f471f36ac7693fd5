"""The neural surrogate: fit on trajectories, predict fields, say how far to trust them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from simlab.core.errors import ConfigError
from simlab.core.progress import Progress
from simlab.core.samples import Sample, Trajectory
from simlab.learn.model import Model
from simlab.learn.operators import Operator, operators
from simlab.learn.settings import TrainSettings
from simlab.learn.stream import MemoryStream
from simlab.learn.trainer import Observer, Trainer, shown_by
from simlab.store.schema import Axis, FieldSpec, Schema

__all__ = ["NeuralSurrogate"]

_HELD_OUT = 10
_FEWEST_TO_SPLIT = 20


class NeuralSurrogate:
    """A neural operator behind the surrogate protocol.

    With ``TrainSettings(ahead=1)`` it learns to go from one stored state to the next, and predicts
    a trajectory step by step from the initial state that the sample brings.

    Parameters
    ----------
    operator : Operator, str or mapping, optional
        The network, e.g. ``FNO(modes=12)``; that of ``train`` when left out.
    train : TrainSettings, optional
        How it is trained.

    Examples
    --------
    >>> model = NeuralSurrogate(FNO(modes=12)).fit(store.split("train"))    # doctest: +SKIP
    >>> model.predict([sample])["u"].shape                                  # doctest: +SKIP
    (1, 1, 64, 64)
    """

    def __init__(
        self, operator: Operator | str | None = None, train: TrainSettings | None = None
    ) -> None:
        train = train or TrainSettings()
        if operator is not None:
            train = replace(train, operator=operators.build(operator))
        self.train = train
        self._model: Model | None = None

    def __repr__(self) -> str:
        state = "not fitted" if self._model is None else repr(self._model)
        return f"NeuralSurrogate({self.train.operator!r}, {state})"

    @property
    def model(self) -> Model:
        """The trained model; :class:`ConfigError` before ``fit`` or ``load``."""
        if self._model is None:
            raise ConfigError("this surrogate is not fitted: call fit, or NeuralSurrogate.load")
        return self._model

    def fit(
        self,
        samples: Iterable[Trajectory],
        *,
        schema: Schema | None = None,
        validation: Sequence[Trajectory] | None = None,
        observers: Sequence[Observer] = (),
    ) -> NeuralSurrogate:
        """Learn from trajectories, all held in memory, and return this surrogate.

        Parameters
        ----------
        samples : iterable of Trajectory
            A store's split, or a list.
        schema : Schema, optional
            Taken from ``samples.schema``, or from the shapes of the first trajectory.
        validation : sequence of Trajectory, optional
            Measures the error that :meth:`estimate` reports. When left out, every tenth trajectory
            is held out for it, provided there are at least 20.
        observers : sequence of callable
            Called with metrics, see :class:`simlab.learn.trainer.Trainer`.
        """
        schema = schema or getattr(samples, "schema", None)
        trajectories = list(samples)
        if not trajectories:
            raise ConfigError("fit: no trajectories; is the store sealed and the split not empty?")
        schema = schema or _schema_of(trajectories[0])
        if validation is None:
            validation = ()
            if len(trajectories) >= _FEWEST_TO_SPLIT:
                validation = trajectories[::_HELD_OUT]
                trajectories = [t for i, t in enumerate(trajectories) if i % _HELD_OUT]
        stream = MemoryStream(trajectories, schema, self.train.seed)
        with Progress("fitting", self.train.n_batches, unit="batch") as progress:
            trainer = Trainer(self.train, schema, observers=(*observers, shown_by(progress)))
            self._model = trainer.run(stream, validation)
        return self

    @property
    def ahead(self) -> int:
        """States that a one-step network gives at once from the one before; 0: not one of these."""
        return self.train.ahead

    def predict_steps(self, trajectories: Iterable[Trajectory]) -> dict[str, np.ndarray]:
        """Return every stored state as a one-step network makes it from true ones.

        Shapes as of :meth:`predict`, which goes on from its own answers instead.
        """
        return self.model.predict_steps(trajectories)

    def predict(self, samples: Sequence[Sample]) -> dict[str, np.ndarray]:
        """Return output fields by name, each of shape (n_samples, T, *grid), float32."""
        return self.model.predict(samples)

    def estimate(self, samples: Sequence[Sample]) -> np.ndarray:
        """Return an estimated relative L2 error per sample, shape (n_samples,).

        It is the 95 % quantile of the validated error, for every sample whose parameters and whose
        fields' mean, minimum and maximum lie within those of the training data; inf for others and
        where nothing was validated.
        """
        return self.model.estimate(samples)

    def save(self, directory: str | Path) -> None:
        """Write ``model.pt`` and ``model.json``."""
        self.model.save(directory)

    @classmethod
    def load(cls, directory: str | Path) -> NeuralSurrogate:
        """Read a saved surrogate, or the model of a training run."""
        model = Model.load(directory)
        surrogate = cls(train=model.settings)
        surrogate._model = model
        return surrogate


def _schema_of(trajectory: Trajectory) -> Schema:
    """Make the schema of a bare trajectory: scalar fields on cell centres of the unit box."""
    sample = trajectory.sample
    shapes = {values.shape[1:] for values in trajectory.outputs.values()}
    shapes |= {values.shape for values in sample.fields.values()}
    if len(shapes) != 1:
        raise ConfigError(
            f"fit: fields of different shapes {sorted(shapes)}; pass schema=, which says what is a "
            "vector and what lies on a mesh"
        )
    axes = tuple(
        Axis(name, tuple(((np.arange(n) + 0.5) / n).tolist()))
        for name, n in zip("xyz", shapes.pop(), strict=False)
    )
    fields = [FieldSpec(name, "input") for name in sample.fields]
    fields += [FieldSpec(name) for name in trajectory.outputs]
    return Schema(
        "data",
        axes,
        tuple(fields),
        times=tuple(float(t) for t in trajectory.times),
        parameters=dict.fromkeys(sample.parameters, "1"),
    )
