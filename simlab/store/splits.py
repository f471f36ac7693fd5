"""Which split a trajectory belongs to: a pure function of its id, the seed and the fractions.

Ids are taken in blocks of ten. Inside a block the ids are ranked by a hash of (seed, id), and
systematic sampling over the ranks cuts them into splits: with fractions 0.8, 0.1, 0.1 every full
block holds exactly eight, one and one. So small campaigns have all splits, a longer campaign keeps
the splits of a shorter one, and neighbouring ids are not tied together.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from simlab.core.errors import ConfigError

__all__ = ["SPLITS", "assign", "check_fractions"]

SPLITS = ("train", "valid", "test")
_BLOCK = 10
_GOLDEN = 0.6180339887498949


def check_fractions(split: Mapping[str, float]) -> dict[str, float]:
    """Return the fractions in the order train, valid, test, or raise ConfigError."""
    unknown = sorted(set(split) - set(SPLITS))
    if unknown:
        raise ConfigError(f"split.{unknown[0]}: unknown split; known: {', '.join(SPLITS)}")
    fractions = {name: float(split[name]) for name in SPLITS if name in split}
    bad = [f"split.{name}: {value} is negative" for name, value in fractions.items() if value < 0]
    if bad:
        raise ConfigError(bad)
    if abs(sum(fractions.values()) - 1.0) > 1e-9:
        raise ConfigError(f"split: fractions sum to {sum(fractions.values())}, expected 1")
    return fractions


def assign(ids: np.ndarray, seed: int, fractions: Mapping[str, float]) -> np.ndarray:
    """Return for each trajectory id the index of its split within ``fractions``.

    Parameters
    ----------
    ids : ndarray of int, shape (k,)

    Returns
    -------
    ndarray of int64, shape (k,)

    Examples
    --------
    >>> import numpy as np
    >>> np.bincount(assign(np.arange(40), 7, {"train": 0.8, "valid": 0.1, "test": 0.1})).tolist()
    [32, 4, 4]
    """
    ids = np.asarray(ids, dtype=np.int64)
    blocks, where = np.unique(ids // _BLOCK, return_inverse=True)
    members = blocks[:, None] * _BLOCK + np.arange(_BLOCK)
    ranks = np.argsort(np.argsort(_hash(members.astype(np.uint64), seed), axis=1), axis=1)
    start = float(_hash(np.zeros(1, dtype=np.uint64), ~seed)[0] >> np.uint64(11)) / 2.0**53
    shift = (start + blocks * _GOLDEN) % 1.0
    place = ranks[where, ids % _BLOCK] + shift[where]
    bounds = np.round(_BLOCK * np.cumsum(list(fractions.values()))[:-1], 9)
    return np.searchsorted(bounds, place, side="right")


def _hash(values: np.ndarray, seed: int) -> np.ndarray:
    """Mix 64-bit words with a seed (splitmix64)."""
    key = np.uint64((seed * 0x9E3779B97F4A7C15 + 0xD1B54A32D192ED03) & 0xFFFFFFFFFFFFFFFF)
    with np.errstate(over="ignore"):
        mixed = (values ^ key) + np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
