"""How good a surrogate is on trajectories it has not seen, and whether it knows.

For sample ``i`` and output field ``u`` of shape ``(T, *grid)`` the relative L2 error is

    e_i = || prediction_i - u_i ||_2 / || u_i ||_2        (over times and grid points),

summed in float64. Next to it stands the baseline that costs nothing, "predict the mean of the
training outputs", measured on the same samples: a surrogate that does not beat it has learned
nothing. Where the truth is exactly zero the quotient has no meaning; such a sample is an error of 0
when the prediction is zero too, and otherwise *undefined*: counted, left out of the quantiles, and
seen in the absolute error only. A prediction with NaN or Inf counts as an infinite error.

Calibration compares ``surrogate.estimate`` with the largest error over the fields of each sample.

A surrogate that goes by steps (``surrogate.ahead`` is not 0) predicts a trajectory from its first
state: the errors above are those of the whole march. Next to them stand its *one-step* errors, of
each stored state predicted from true ones (``surrogate.predict_steps``): they say how good the
network is, the others how errors grow.

Cost: one ``predict`` per sample, memory of one batch. Quantiles interpolate linearly, or step up to
the next sample where some errors are infinite.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from simlab.core.errors import ConfigError, SchemaError, StoreError
from simlab.core.metrics import SUMMARY, relative_l2, summary
from simlab.core.runs import publish
from simlab.core.samples import Trajectory
from simlab.core.surrogate import Surrogate

__all__ = ["Evaluation", "FieldErrors", "evaluate", "mean_outputs"]


@dataclass(frozen=True, eq=False)
class FieldErrors:
    """Errors of one output field on the test samples.

    Attributes
    ----------
    errors : ndarray, shape (n,)
        Relative L2 error per sample; NaN where undefined.
    rms : ndarray, shape (n,)
        Root mean square of the absolute error per sample, in the field's units.
    per_time : ndarray, shape (n, T)
        Relative L2 error per sample and stored time.
    baseline : ndarray, shape (n,), optional
        Errors of predicting the mean training output.
    one_step : ndarray, shape (n, T), optional
        Relative L2 error of each state predicted from true ones.
    """

    errors: np.ndarray
    rms: np.ndarray
    per_time: np.ndarray
    baseline: np.ndarray | None = None
    one_step: np.ndarray | None = None

    @property
    def n_undefined(self) -> int:
        """Samples whose truth is zero while the prediction is not."""
        return int(np.count_nonzero(np.isnan(self.errors)))

    @property
    def n_not_finite(self) -> int:
        """Samples with NaN or Inf in the prediction."""
        return int(np.count_nonzero(np.isinf(self.errors)))

    def at_time(self, k: int) -> dict[str, Any]:
        """Return the summary at the k-th time, and that of the one-step errors if there are any."""
        found: dict[str, Any] = dict(summary(self.per_time[:, k]))
        if self.one_step is not None:
            found["one_step"] = summary(self.one_step[:, k])
        return found

    def ranked(self) -> dict[str, int]:
        """Return the positions of the best, the median and the worst sample."""
        order = np.argsort(self.errors, kind="stable")
        order = order[: max(len(order) - self.n_undefined, 1)]  # argsort puts NaN last
        middle = order[(len(order) - 1) // 2]
        return {"best": int(order[0]), "median": int(middle), "worst": int(order[-1])}


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What :func:`evaluate` found; ``print`` shows a table, :meth:`write` makes the JSON file.

    Attributes
    ----------
    fields : mapping of str to FieldErrors
    indices : ndarray, shape (n,)
        Sample indices, in the order of all per-sample arrays.
    times : ndarray, shape (T,)
    estimates : ndarray, shape (n,)
        ``surrogate.estimate``; inf where the surrogate had no ground for one.
    predict_seconds : float
        Wall seconds spent in ``predict`` for all samples.
    missing : tuple of str
        Output fields of the data that the surrogate does not predict.
    """

    fields: Mapping[str, FieldErrors]
    indices: np.ndarray
    times: np.ndarray
    estimates: np.ndarray
    predict_seconds: float = math.nan
    missing: tuple[str, ...] = ()

    @property
    def n_test(self) -> int:
        """Number of samples evaluated."""
        return len(self.indices)

    def worst_field_errors(self) -> np.ndarray:
        """Return each sample's largest error over the fields, shape (n,); NaN where undefined."""
        stacked = np.stack([item.errors for item in self.fields.values()])
        filled = np.where(np.isnan(stacked), -np.inf, stacked).max(axis=0)
        return np.where(np.isneginf(filled), np.nan, filled)

    def calibration(self) -> dict[str, float]:
        """Compare estimates with errors.

        Returns
        -------
        dict
            ``n`` samples with a finite estimate and a defined error; ``covered`` share of them
            whose error is at most the estimate; ``median_ratio`` of estimate to error;
            ``rank_correlation`` (Spearman) between both, NaN when either is constant.
        """
        errors = self.worst_field_errors()
        usable = np.isfinite(self.estimates) & ~np.isnan(errors)
        estimate, error = self.estimates[usable], errors[usable]
        if error.size == 0:
            return {"n": 0, "covered": math.nan, "median_ratio": math.nan} | {
                "rank_correlation": math.nan
            }
        ratio = estimate / np.where(error > 0, error, np.finfo(float).tiny)
        return {
            "n": int(error.size),
            "covered": float(np.mean(error <= estimate)),
            "median_ratio": float(np.median(ratio)),
            "rank_correlation": _rank_correlation(estimate, error),
        }

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON.

        What is not finite is ``None`` and counted beside; in ``per_sample``, ``None`` is an
        undefined error and ``"inf"`` an infinite one.
        """
        fields = {}
        for name, item in self.fields.items():
            entry: dict[str, Any] = {"rel_l2": summary(item.errors), "rms": summary(item.rms)}
            if item.baseline is not None:
                entry["baseline"] = summary(item.baseline)
                entry["times_better"] = _quotient(
                    entry["baseline"]["mean"], entry["rel_l2"]["mean"]
                )
            if item.one_step is not None:
                entry["one_step"] = summary(item.one_step)
            if len(self.times) > 1:
                entry["per_time"] = [
                    {"time": float(when), **item.at_time(k)} for k, when in enumerate(self.times)
                ]
            ranks = item.ranked()
            entry["samples"] = {name: int(self.indices[k]) for name, k in ranks.items()}
            entry |= {"n_undefined": item.n_undefined, "n_not_finite": item.n_not_finite}
            fields[name] = entry
        per_sample = {
            name: {key: value for key, value in vars(item).items() if value is not None}
            for name, item in self.fields.items()
        }
        found = {
            "fields": fields,
            "n_test": self.n_test,
            "times": self.times,
            "calibration": self.calibration(),
            "predict_seconds": self.predict_seconds,
            "missing": list(self.missing),
        }
        samples = {"index": self.indices, "estimate": self.estimates, "fields": per_sample}
        return _plain(found) | {"per_sample": _plain(samples, infinite="inf")}

    def write(self, path: str | Path) -> Path:
        """Write :meth:`as_dict` as JSON; a reader sees the old file or the whole new one."""
        path = Path(path)
        publish(path, json.dumps(self.as_dict(), allow_nan=False) + "\n")
        return path

    @classmethod
    def read(cls, path: str | Path) -> Evaluation:
        """Read what :meth:`write` wrote."""
        try:
            plain = json.loads(Path(path).read_text(encoding="utf-8"))
            samples = plain["per_sample"]
            fields = {
                name: FieldErrors(**{key: np.array(v, np.float64) for key, v in entry.items()})
                for name, entry in samples["fields"].items()
            }
            return cls(
                fields=fields,
                indices=np.array(samples["index"], dtype=np.int64),
                times=np.array(plain["times"], dtype=np.float64),
                estimates=np.array(samples["estimate"], dtype=np.float64),
                predict_seconds=_number(plain["predict_seconds"]),
                missing=tuple(plain["missing"]),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"{path}: not an evaluation ({error!r}); run simlab evaluate"
            ) from None

    def __str__(self) -> str:
        head = f"{'field':<16}{'':<12}" + "".join(f"{name:>10}" for name in SUMMARY)
        lines = [f"relative L2 error on {self.n_test} test samples", head]
        for name, item in self.fields.items():
            rows = {"surrogate": item.errors}
            if item.one_step is not None:
                rows["one step"] = item.one_step
            if item.baseline is not None:
                rows["mean output"] = item.baseline
            for label, errors in rows.items():
                values = "".join(f"{value:>10.3%}" for value in summary(errors).values())
                lines.append(f"{name if label == 'surrogate' else '':<16}{label:<12}{values}")
            if item.n_undefined:
                lines.append(f"{'':<16}{item.n_undefined} samples with zero truth left out")
            if item.n_not_finite:
                lines.append(f"{'':<16}{item.n_not_finite} predictions with NaN or Inf")
        found = self.calibration()
        if found["n"]:
            lines.append(
                f"estimate >= error for {found['covered']:.0%} of {found['n']} samples; "
                f"median estimate / error {found['median_ratio']:.2f}"
            )
            if not math.isnan(found["rank_correlation"]):
                lines[-1] += f", rank correlation {found['rank_correlation']:.2f}"
        if self.missing:
            lines.append(f"not predicted: {', '.join(self.missing)}")
        return "\n".join(lines)


def evaluate(
    surrogate: Surrogate,
    trajectories: Iterable[Trajectory],
    *,
    batch: int = 32,
    baseline: Iterable[Trajectory] | Mapping[str, np.ndarray] | None = None,
) -> Evaluation:
    """Measure a surrogate on trajectories it was not fitted to.

    Parameters
    ----------
    surrogate : Surrogate
    trajectories : iterable of Trajectory
        Test set; read once, ``batch`` at a time.
    batch : int
        Samples per ``predict``.
    baseline : iterable of Trajectory, or mapping of str to ndarray, optional
        Training trajectories, or their mean outputs of shape (T, *grid) by field name
        (:func:`mean_outputs`), for the baseline row.

    Returns
    -------
    Evaluation

    Raises
    ------
    ConfigError
        When there are no trajectories.
    SchemaError
        When the prediction does not have the fields and shapes of the data, or the data hold
        values that are not finite.
    """
    if batch < 1:
        raise ConfigError(f"evaluate: batch = {batch}, expected at least 1")
    if baseline is not None and not isinstance(baseline, Mapping):
        baseline = mean_outputs(baseline)
    parts: dict[str, list[tuple[np.ndarray, ...]]] = {}
    one_step: dict[str, list[np.ndarray]] = {}
    indices: list[int] = []
    estimates: list[np.ndarray] = []
    missing: tuple[str, ...] = ()
    times = np.zeros(0)
    seconds = 0.0
    for group in _groups(trajectories, batch):
        samples = [trajectory.sample for trajectory in group]
        began = time.perf_counter()
        predictions = surrogate.predict(samples)
        seconds += time.perf_counter() - began
        if not predictions:
            raise SchemaError("evaluate: the surrogate predicts no field")
        estimates.append(np.asarray(surrogate.estimate(samples), dtype=np.float64))
        for name, prediction in predictions.items():
            truth = _truth(group, name, prediction)
            mean = None if baseline is None else baseline.get(name)
            parts.setdefault(name, []).append(_errors(np.asarray(prediction), truth, mean))
        if getattr(surrogate, "ahead", 0):
            for name, made in surrogate.predict_steps(group).items():  # type: ignore[attr-defined]
                found = relative_l2(made, _truth(group, name, made), n_kept=2)
                one_step.setdefault(name, []).append(found)
        indices += [sample.index for sample in samples]
        times = np.asarray(group[0].times, dtype=np.float64)
        missing = tuple(name for name in group[0].outputs if name not in predictions)
    if not indices:
        raise ConfigError("evaluate: no test trajectories; generate more, or name another split")
    fields = {
        name: FieldErrors(*(np.concatenate(column) for column in zip(*rows, strict=True)))
        for name, rows in parts.items()
    }
    for name, columns in one_step.items():
        fields[name] = replace(fields[name], one_step=np.concatenate(columns))
    return Evaluation(fields, np.array(indices), times, np.concatenate(estimates), seconds, missing)


def mean_outputs(trajectories: Iterable[Trajectory]) -> dict[str, np.ndarray]:
    """Return the mean of every output field over trajectories, shape (T, *grid), float64."""
    totals: dict[str, np.ndarray] = {}
    n = 0
    for trajectory in trajectories:
        n += 1
        for name, values in trajectory.outputs.items():
            if name in totals:
                totals[name] += values
            else:
                totals[name] = np.array(values, dtype=np.float64)
    if n == 0:
        raise ConfigError("evaluate: no training trajectories to take the mean of for the baseline")
    return {name: total / n for name, total in totals.items()}


def _groups(trajectories: Iterable[Trajectory], batch: int) -> Iterator[Sequence[Trajectory]]:
    stream = iter(trajectories)
    while group := list(islice(stream, batch)):
        yield group


def _truth(group: Sequence[Trajectory], name: str, prediction: np.ndarray) -> np.ndarray:
    for trajectory in group:
        where = f"evaluate: sample {trajectory.sample.index}: field {name!r}"
        values = trajectory.outputs.get(name)
        if values is None:
            raise SchemaError(f"{where} is predicted but is not in the data")
        if values.shape != prediction.shape[1:]:
            raise SchemaError(
                f"{where} has shape {values.shape}, the prediction {prediction.shape[1:]}"
            )
        if not np.isfinite(values).all():
            raise SchemaError(f"{where} has values that are not finite; run simlab store verify")
    if len(prediction) != len(group):
        raise SchemaError(
            f"evaluate: {len(group)} samples went in, {len(prediction)} predictions of {name!r} "
            "came out"
        )
    return np.stack([trajectory.outputs[name] for trajectory in group])


def _errors(
    prediction: np.ndarray, truth: np.ndarray, mean: np.ndarray | None
) -> tuple[np.ndarray, ...]:
    difference = prediction.astype(np.float64) - truth
    rms = np.sqrt(np.mean(np.square(difference), axis=tuple(range(1, truth.ndim))))
    rms = np.where(np.isfinite(rms), rms, np.inf)
    found = (relative_l2(prediction, truth), rms, relative_l2(prediction, truth, n_kept=2))
    if mean is None:
        return found
    if mean.shape != truth.shape[1:]:
        raise SchemaError(
            f"evaluate: the baseline has shape {mean.shape}, the data {truth.shape[1:]}"
        )
    return (*found, relative_l2(np.broadcast_to(mean, truth.shape), truth))


def _rank_correlation(first: np.ndarray, second: np.ndarray) -> float:
    from scipy.stats import rankdata

    ranks = np.stack([rankdata(first), rankdata(second)])
    if (np.ptp(ranks, axis=1) == 0).any():
        return math.nan
    return float(np.corrcoef(ranks)[0, 1])


def _quotient(above: float, below: float) -> float:
    return above / below if below > 0 else math.nan


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _plain(value: Any, infinite: str | None = None) -> Any:
    """Turn arrays and mappings into what strict JSON can hold; NaN becomes ``None``."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry, infinite) for key, entry in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist(), infinite)
    if isinstance(value, list | tuple):
        return [_plain(entry, infinite) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else infinite
    return value
