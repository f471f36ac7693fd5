"""Moments of fields that merge exactly, and The Well's normalisation constants made from them.

Count, extremes, mean and sum of squared deviations per component, merged pairwise (Chan, Golub and
LeVeque 1983), so that statistics of a whole campaign need the manifest only and no data.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from simlab.store.schema import Schema

__all__ = ["Moments", "constants", "merged", "to_yaml"]

_PIECE = 1 << 15


@dataclass(frozen=True)
class Moments:
    """Moments of one field; ``mean`` and ``m2`` have the shape of one tensor value.

    Examples
    --------
    >>> import numpy as np
    >>> a, b = np.arange(5.0), np.arange(3.0)
    >>> both = Moments.of(a, 0) + Moments.of(b, 0)
    >>> bool(np.isclose(both.std, np.concatenate([a, b]).std()))
    True
    """

    count: int
    low: float
    high: float
    mean: np.ndarray
    m2: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray, order: int) -> Moments:
        """Return the moments of an array whose last ``order`` axes are tensor components."""
        cut = values.ndim - order
        shape = values.shape[cut:]
        flat = values.reshape(math.prod(values.shape[:cut]), math.prod(shape))
        return cls._of(flat, None, shape)

    @classmethod
    def of_steps(cls, values: np.ndarray, order: int) -> Moments:
        """Return the moments of the differences along the first axis, of at least two entries."""
        shape = values.shape[values.ndim - order :]
        flat = values.reshape(-1, math.prod(shape))
        shift = len(flat) // len(values)
        return cls._of(flat[shift:], flat[:-shift], shape)

    @classmethod
    def _of(cls, flat: np.ndarray, less: np.ndarray | None, shape: tuple[int, ...]) -> Moments:
        """Return the moments of the columns of ``flat``, or of ``flat - less``."""
        mean, m2 = np.zeros(flat.shape[1]), np.zeros(flat.shape[1])
        low, high = np.inf, -np.inf
        for c in range(flat.shape[1]):  # a tensor has at most nine components
            for start in range(0, len(flat), _PIECE):  # pieces that stay in cache
                piece = slice(start, start + _PIECE)
                part = flat[piece, c].astype(np.float64)
                if less is not None:
                    part -= less[piece, c]
                low, high = min(low, float(part.min())), max(high, float(part.max()))
                here = part.mean()
                part -= here
                gap, count = here - mean[c], start + len(part)
                mean[c] += gap * (len(part) / count)
                m2[c] += np.einsum("i,i->", part, part) + gap**2 * (start * len(part) / count)
        return cls(len(flat), low, high, mean.reshape(shape), m2.reshape(shape))

    def __add__(self, other: Moments) -> Moments:
        count = self.count + other.count
        gap = other.mean - self.mean
        return Moments(
            count,
            min(self.low, other.low),
            max(self.high, other.high),
            self.mean + gap * (other.count / count),
            self.m2 + other.m2 + gap**2 * (self.count * other.count / count),
        )

    @property
    def std(self) -> np.ndarray:
        """Standard deviation of the population, per component."""
        return np.sqrt(self.m2 / self.count)

    @property
    def rms(self) -> np.ndarray:
        """Root of the mean square, per component."""
        return np.sqrt(self.m2 / self.count + self.mean**2)

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "count": self.count,
            "min": self.low,
            "max": self.high,
            "mean": self.mean.tolist(),
            "m2": self.m2.tolist(),
        }

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Moments:
        """Read :meth:`to_json`'s values."""
        mean, m2 = np.asarray(plain["mean"]), np.asarray(plain["m2"])
        return cls(plain["count"], plain["min"], plain["max"], mean, m2)


def merged(parts: Iterable[Mapping[str, Any]]) -> dict[str, Moments]:
    """Merge the moments of many shards, by name (``"u"``, and ``"u.delta"`` for its steps)."""
    total: dict[str, Moments] = {}
    for part in parts:
        for name, plain in part.items():
            found = Moments.from_json(plain)
            total[name] = total[name] + found if name in total else found
    return total


def constants(schema: Schema, moments: Mapping[str, Moments]) -> dict[str, dict[str, Any]]:
    """Return ``{"mean": {field: value}, "std": ..., "rms": ..., "mean_delta": ...}``.

    A value is a number for scalars, nested lists for vectors and tensors. Deltas are differences
    of successive steps; they are 0 for a stationary problem, and left out for inputs.
    """
    keys = ("mean", "std", "rms")
    found: dict[str, dict[str, Any]] = {key: {} for key in keys}
    found |= {f"{key}_delta": {} for key in keys}
    for spec in schema.fields:
        if spec.name not in moments:
            continue
        for key in keys:
            found[key][spec.name] = getattr(moments[spec.name], key).tolist()
            if spec.role == "output":
                delta = moments.get(f"{spec.name}.delta")
                value = getattr(delta, key) if delta else np.zeros((schema.n_dims,) * spec.order)
                found[f"{key}_delta"][spec.name] = value.tolist()
    return found


def to_yaml(values: Mapping[str, Mapping[str, Any]], shards: Iterable[str]) -> str:
    """Return the text of ``stats.yaml``; its comment names the shards by a hash of their list."""
    digest = hashlib.sha256("\n".join(shards).encode()).hexdigest()
    lines = [f"# simlab normalisation constants of the train split; shard list {digest}"]
    for key, fields in values.items():
        lines.append(f"{key}:" if fields else f"{key}: {{}}")
        lines += [f"  {json.dumps(name)}: {_plain(value)}" for name, value in fields.items()]
    return "\n".join(lines) + "\n"


def _plain(value: Any) -> str:
    """Write a number so that YAML 1.1 readers see one: with a point and a signed exponent."""
    if isinstance(value, list):
        return "[" + ", ".join(_plain(item) for item in value) + "]"
    return f"{value:.17e}"
