"""Keys of samples: a few numbers each, whose distances say how alike two linear systems are.

A *field* ``P`` keeps its lowest Fourier modes, 12 x 12 of them in two dimensions (144 in one, 5^3
in three):

    F_k = 1/n sum_x P(x) exp(-2 pi i k x),    -6 <= k_j <= 5,    ||P - P'||^2 ~ sum_k |F_k - F'_k|^2

stored once per conjugate pair. Both ``P`` and ``log P`` are reduced; which one counts is decided
when all rows are there: the logarithm when the field is positive everywhere and the logarithm is
the less skewed by a tenth (log-normal laws). Values in the order of an unstructured mesh are a
field of one dimension: for a scattered numbering the modes are a random projection, which keeps
distances as well. *Scalars*, each made unitless, are one part together. Parts are mixed as

    ||key - key'||^2 = sum_q w_q ||P_q - P'_q||^2,    w_q = 1 / median over pairs ||P_q - P'_q||^2

so that no unit and no part swamps the others, and rotated to the principal axes, of which the
leading ``n_columns`` stay. Keys are rounded to 2^-18 of their largest entry, so that the last bits
of a machine's linear algebra hardly ever reach the order.

Two steps, so that ranks can share the first: :meth:`KeyReduction.reduced` per sample, rank-local,
and :meth:`KeyReduction.keys` for all rows together, wherever the caller has gathered them.

Cost per sample: two logarithms and one pass of ``2 m n`` multiply-adds for ``n`` values and ``m``
modes per axis, no FFT, so lengths with large primes are as good as any. Memory: 336 doubles per
sample and field (27 MB for 1e4 samples, 270 MB for 1e5); samples themselves are let go one by one.
Together: ``N D^2`` for the ``D <= 167`` columns per field, and a ``D x D`` eigenproblem.

The truncated-frequency key is that of Wang et al., arXiv:2401.09516; the mixing is ours (they add
plain norms, and a field of 1e4 values leaves nothing to a scalar).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np

from simlab.core.errors import ConfigError
from simlab.core.samples import Sample

__all__ = ["KeyReduction", "sample_keys"]

_GRID = 2.0**-18  # of the largest key
_N_MEDIAN = 1000  # rows whose pairs give the median
_LESS_SKEWED = 0.9
_BLOCK = 256  # rows gathered before they move into one array


@dataclass(frozen=True)
class KeyReduction:
    """How the samples of one study become keys: names, shapes, number of modes.

    Attributes
    ----------
    parameters : tuple of str
        Scalar parameters, in the order of the row.
    fields : tuple of (str, tuple of int)
        Name and shape of every field.
    n_modes : int
        Fourier modes kept per field, all axes together.

    Examples
    --------
    >>> samples = [Sample(i, 7, {"k": 0.1 * i}, {"a": np.full((8, 8), 2.0 + i)}) for i in range(5)]
    >>> reduction = KeyReduction.of(samples[0])
    >>> rows = np.stack([reduction.reduced(sample) for sample in samples])
    >>> reduction.keys(rows).shape
    (5, 32)
    """

    parameters: tuple[str, ...]
    fields: tuple[tuple[str, tuple[int, ...]], ...]
    n_modes: int = 144

    @classmethod
    def of(cls, sample: Sample, n_modes: int = 144) -> KeyReduction:
        """Return the reduction that fits a sample and all others of its study."""
        shapes = tuple((name, np.shape(sample.fields[name])) for name in sorted(sample.fields))
        return cls(tuple(sorted(sample.parameters)), shapes, n_modes)

    @property
    def width(self) -> int:
        """Length of a row."""
        per_field = (2 + 2 * self._count(shape) for _, shape in self.fields)
        return len(self.parameters) + sum(per_field)

    def reduced(self, sample: Sample) -> np.ndarray:
        """Return what the key of a sample is made of. Rank-local, a function of the sample only.

        Returns
        -------
        ndarray, shape (width,), float64
            Scalars; then, for each field, the skewness of ``P`` and ``log P`` and the modes of
            both. What belongs to the logarithm is NaN where the field is not positive.

        Raises
        ------
        ConfigError
            When a value is not finite, or names and shapes are not those of this reduction.
        """
        self._check(sample)
        pieces = [np.array([sample.parameters[name] for name in self.parameters], dtype=np.float64)]
        for name, shape in self.fields:
            values = np.asarray(sample.fields[name], dtype=np.float64)
            modes = _low_modes(values, self.n_modes)
            if values.size and values.min() > 0:
                logs = np.log(values)
                log_skew, log_modes = _skewness(logs), _low_modes(logs, self.n_modes)
            else:
                log_skew, log_modes = np.nan, np.full(self._count(shape), np.nan)
            pieces += [np.array([_skewness(values), log_skew]), modes, log_modes]
        return np.concatenate(pieces)

    def keys(self, rows: np.ndarray, n_columns: int = 32) -> np.ndarray:
        """Return the keys of a study from the rows of all its samples.

        Parameters
        ----------
        rows : ndarray, shape (N, width)
            Row ``i`` from :meth:`reduced`, in any fixed order of the samples.
        n_columns : int
            At most so many columns; what is left out is the directions of least spread.

        Returns
        -------
        ndarray, shape (N, d), float32
            ``1 <= d <= n_columns``, centred.
        """
        rows = np.asarray(rows, dtype=np.float64)
        if rows.ndim != 2 or rows.shape[1] != self.width:
            raise ConfigError(f"rows of shape {rows.shape}: expected (N, {self.width})")
        n_scalars, parts = len(self.parameters), []
        scalars = [_scaled(rows[:, [column]]) for column in range(n_scalars)]
        if scalars:
            parts.append(_scaled(np.hstack(scalars)))
        start = n_scalars
        for _, shape in self.fields:
            count = self._count(shape)
            parts.append(_scaled(_chosen(rows[:, start : start + 2 + 2 * count])))
            start += 2 + 2 * count
        mixed = np.hstack([np.zeros((len(rows), 0)), *parts])
        if mixed.shape[1] > n_columns:
            mixed = _principal(mixed, n_columns)
        return _rounded(mixed if mixed.shape[1] else np.zeros((len(rows), 1)))

    def _count(self, shape: tuple[int, ...]) -> int:
        return len(_selection(shape, self.n_modes)[0])

    def _check(self, sample: Sample) -> None:
        found = KeyReduction.of(sample, self.n_modes)
        if found != self:
            raise ConfigError(
                f"sample {sample.index}: parameters {found.parameters} and fields {found.fields} "
                f"differ from the study's {self.parameters} and {self.fields}"
            )
        named: dict[str, object] = {**sample.parameters, **sample.fields}
        for name, values in named.items():
            finite = np.isfinite(np.asarray(values, dtype=np.float64))
            if not np.all(finite):
                n_bad = finite.size - np.count_nonzero(finite)
                raise ConfigError(
                    f"sample {sample.index}: {name} has {n_bad} values that are not finite, "
                    "so it has no place in the order; mend or leave out the sample"
                )


def sample_keys(samples: Iterable[Sample], n_columns: int = 32, n_modes: int = 144) -> np.ndarray:
    """Return the keys of samples; an iterator's samples are never in memory together.

    Parameters
    ----------
    samples : iterable of Sample
        All of one study: the same names and shapes.
    n_columns, n_modes : int
        See :class:`KeyReduction`.

    Returns
    -------
    ndarray, shape (N, d), float32
        ``d <= n_columns``.

    Examples
    --------
    >>> samples = (Sample(i, 7, {"k": float(i % 3), "nu": 1e-3 * i}) for i in range(6))
    >>> sample_keys(samples).shape
    (6, 2)
    """
    reduction: KeyReduction | None = None
    blocks: list[np.ndarray] = []
    rows: list[np.ndarray] = []
    for sample in samples:
        reduction = reduction or KeyReduction.of(sample, n_modes)
        rows.append(reduction.reduced(sample))
        if len(rows) == _BLOCK:
            blocks.append(np.stack(rows))
            rows = []
    if reduction is None:
        return np.zeros((0, 1), dtype=np.float32)
    if rows:
        blocks.append(np.stack(rows))
    return reduction.keys(np.concatenate(blocks), n_columns)


def _low_modes(values: np.ndarray, n_modes: int) -> np.ndarray:
    """Return the lowest Fourier modes as real numbers with the distances of the full set."""
    chosen, weights, is_real = _selection(values.shape, n_modes)
    if not values.size:
        return np.zeros(0)
    per_axis = _per_axis(values.shape, n_modes)
    first = _waves(values.shape[0], per_axis[0]) if values.ndim else np.ones((1, 1))
    flat = values.reshape(first.shape[1], -1)
    modes = (first.real @ flat + 1j * (first.imag @ flat)).reshape(-1, *values.shape[1:])
    for axis in range(1, values.ndim):
        waves = _waves(values.shape[axis], per_axis[axis])
        modes = np.moveaxis(np.tensordot(modes, waves, axes=(axis, 1)), -1, axis)
    kept = modes.ravel()[chosen]
    return np.where(is_real, kept.real, kept.imag) * weights


def _per_axis(shape: Sequence[int], n_modes: int) -> tuple[int, ...]:
    if not shape:
        return ()
    along = max(2, round(n_modes ** (1 / len(shape))))
    return tuple(min(along, n) for n in shape)


@lru_cache(maxsize=16)
def _waves(n: int, n_kept: int) -> np.ndarray:
    """Return ``exp(-2 pi i k x) / n`` of the modes around zero, shape (n_kept, n)."""
    k = np.arange(n_kept) - n_kept // 2
    turns = np.outer(k, np.arange(n)) % n  # whole turns left out: phases stay exact
    return np.exp(-2j * np.pi * turns / n) / n


@lru_cache(maxsize=16)
def _selection(shape: tuple[int, ...], n_modes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return index, weight and "real part" of every number that is kept of the modes.

    A conjugate pair is stored once with weight sqrt 2; a mode without its partner has weight 1.
    """
    per_axis = _per_axis(shape, n_modes)
    ranges = [range(-(n // 2), n - n // 2) for n in per_axis]
    places = {k: place for place, k in enumerate(product(*ranges))}
    chosen, weights, is_real = [], [], []
    for k, place in places.items():
        partner = places.get(tuple(-k_j for k_j in k))
        if partner is not None and partner < place:
            continue
        chosen.append(place)
        weights.append(1.0 if partner in (None, place) else np.sqrt(2.0))
        is_real.append(True)
        if partner != place:
            chosen.append(place)
            weights.append(weights[-1])
            is_real.append(False)
    return np.array(chosen, dtype=np.int64), np.array(weights), np.array(is_real, dtype=bool)


def _skewness(values: np.ndarray) -> float:
    centred = values - values.mean() if values.size else values
    largest = np.abs(centred).max(initial=0.0)
    if largest <= 1e-12 * np.abs(values).max(initial=0.0):
        return 0.0
    centred /= largest
    squares = centred * centred
    return float(np.mean(squares * centred) / np.mean(squares) ** 1.5)


def _chosen(part: np.ndarray) -> np.ndarray:
    """Return the modes of a field or of its logarithm, whichever law is the more symmetric."""
    raw, logs = np.split(part[:, 2:], 2, axis=1)
    if not len(part):
        return raw
    raw_skew, log_skew = np.abs(part[:, :2].mean(axis=0))  # NaN, and so not less, without logs
    return logs if log_skew < _LESS_SKEWED * raw_skew else raw


def _scaled(part: np.ndarray) -> np.ndarray:
    """Return a part centred and divided by its typical distance; without columns if constant."""
    if len(part) < 2:
        return np.zeros((len(part), 0))
    largest = np.abs(part).max(initial=0.0)
    part = part / (largest or 1.0)  # squares of any unit stay numbers
    part -= part.mean(axis=0)
    spread = 2 * float(np.mean(np.square(part), axis=0).sum())  # the mean over pairs
    if spread <= 1e-24:
        return np.zeros((len(part), 0))
    some = part[np.arange(0, len(part), -(-len(part) // _N_MEDIAN))]
    norms = np.square(some).sum(axis=1)
    squares = norms[:, None] + norms - 2 * (some @ some.T)
    typical = float(np.median(squares[np.triu_indices(len(some), 1)]))
    return part / np.sqrt(typical if typical > 1e-6 * spread else spread)


def _principal(mixed: np.ndarray, n_columns: int) -> np.ndarray:
    """Rotate to the principal axes and keep the leading ones; largest entry of an axis positive."""
    centred = mixed - mixed.mean(axis=0)
    _, axes = np.linalg.eigh(centred.T @ centred)
    axes = axes[:, ::-1][:, :n_columns]
    signs = np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])])
    return np.asarray(centred @ (axes * signs))


def _rounded(keys: np.ndarray) -> np.ndarray:
    largest = np.abs(keys).max(initial=0.0)
    if largest == 0:
        return keys.astype(np.float32)
    step = _GRID * 2.0 ** np.ceil(np.log2(largest))
    return (np.rint(keys / step) * step).astype(np.float32)
