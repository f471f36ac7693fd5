"""The reference sample: one point of the parameter space that stands for all of them.

    parameters    m_q = mean of mu_q
    fields        exp(mean of log P) where every sample's field is positive, else mean of P

A solver that prepares itself once for a whole campaign (the lowest eigenvectors of one operator)
does so for the system of this sample. For a log-normal coefficient it is the median field; for
``a = exp(sum_q mu_q phi_q)`` it is the field of the mean parameters exactly.

Cost: one pass over the samples, three fields held whatever their number.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from simlab.core.errors import ConfigError
from simlab.core.samples import Sample

__all__ = ["REFERENCE_INDEX", "reference"]

REFERENCE_INDEX = -1
"""Index of the reference sample: it belongs to no study."""


def reference(samples: Iterable[Sample]) -> Sample:
    """Return the mean of samples of one study. Rank-local.

    Parameters
    ----------
    samples : iterable of Sample
        At least one; read once, so an iterator will do.

    Returns
    -------
    Sample
        Names and shapes of the first one, index -1.

    Raises
    ------
    ConfigError
        When there is no sample, or their names or shapes differ.

    Examples
    --------
    >>> pair = [Sample(i, 7, {"k": 1.0 + i}, {"a": np.array([4.0**i, 9.0])}) for i in range(2)]
    >>> mean = reference(pair)
    >>> mean.parameters, mean.fields["a"].round(12).tolist()
    ({'k': 1.5}, [2.0, 9.0])
    """
    first: Sample | None = None
    n = 0
    totals: dict[str, float] = {}
    sums: dict[str, np.ndarray] = {}
    logs: dict[str, np.ndarray] = {}
    for sample in samples:
        if first is None:
            first = sample
            totals = dict.fromkeys(sample.parameters, 0.0)
            sums = {name: np.zeros(np.shape(values)) for name, values in sample.fields.items()}
            logs = {name: np.zeros(np.shape(values)) for name, values in sample.fields.items()}
        shapes = {name: np.shape(values) for name, values in sample.fields.items()}
        expected = {name: values.shape for name, values in sums.items()}
        if sample.parameters.keys() != totals.keys() or shapes != expected:
            raise ConfigError(
                f"sample {sample.index}: its parameters and fields are not those of sample "
                f"{first.index}, so the two have no mean"
            )
        n += 1
        for name, value in sample.parameters.items():
            totals[name] += value
        for name, values in sample.fields.items():
            sums[name] += values
            if name in logs and np.all(values > 0):
                logs[name] += np.log(values)
            else:
                logs.pop(name, None)
    if first is None:
        raise ConfigError("a reference sample needs at least one sample to be the mean of")
    means = {name: np.exp(logs[name] / n) if name in logs else sums[name] / n for name in sums}
    return Sample(
        REFERENCE_INDEX, first.seed, {name: total / n for name, total in totals.items()}, means
    )
