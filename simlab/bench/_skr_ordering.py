"""Orders of samples: how long keys and paths take, and how short the paths are.

One row per family and number of samples; fields on ``cells^2`` cells. Seconds are CPU seconds of
this process: ``draw_s`` for drawing the fields, ``key_s`` for their keys, ``greedy_s`` (walk only),
``improved_s`` (walk, 2-opt and Or-opt) and ``hilbert_s`` for the orders. Lengths are sums of
distances between consecutive keys: over those of a random order (``*_over_random``) and over those
of an exhaustive 2-opt of the greedy path (``*_over_two_opt``; few samples only). In
``fields_over_random`` the steps along the improved path are measured between the fields themselves
(their logarithms), all frequencies. ``peak_mib`` is the most memory in use at once beyond what was
there before, from a second run of keys and order (``tracemalloc``).
"""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Iterator
from typing import Any

import numpy as np

from simlab.core.samples import Sample
from simlab.linalg.ordering import orderings, path_length, sample_keys
from simlab.problems.fields import Field, FourParameter, Lognormal, TwoPhase
from simlab.problems.spaces import FieldSpace

__all__ = ["COLUMNS", "measured", "rows", "two_opt"]

SEED = 40923
FAMILIES: dict[str, Field] = {
    "C1": Lognormal(),
    "C2": TwoPhase(),
    "C3": FourParameter(),
}
ORDERINGS: dict[str, Any] = {
    "greedy": {"kind": "greedy", "improve": False},
    "improved": {"kind": "greedy"},
    "hilbert": {"kind": "hilbert"},
}
COLUMNS = (
    "family",
    "n_samples",
    "cells",
    "draw_s",
    "key_s",
    "greedy_s",
    "improved_s",
    "hilbert_s",
    "greedy_over_random",
    "improved_over_random",
    "hilbert_over_random",
    "fields_over_random",
    "greedy_over_two_opt",
    "improved_over_two_opt",
    "hilbert_over_two_opt",
    "peak_mib",
)
_TWO_OPT = 1000  # samples up to which all pairs of steps are compared


def rows(quick: bool) -> list[dict[str, Any]]:
    """Measure every family with 500 samples, and C1 with 10 000 on 128^2 unless ``quick``."""
    found = [measured(family, 500, 64) for family in FAMILIES]
    if not quick:
        found.append(measured("C1", 10_000, 128))
    return found


def measured(family: str, n_samples: int, cells: int) -> dict[str, Any]:
    """Return one row of the table.

    Parameters
    ----------
    family : str
        One of ``FAMILIES``.
    n_samples, cells : int
        Samples; cells along each of two axes.
    """
    space = FieldSpace("a", (cells, cells), FAMILIES[family])

    def drawn() -> Iterator[Sample]:
        for index in range(n_samples):
            start = time.process_time()
            (sample,) = space.sample(1, SEED, index)
            seconds["draw"] += time.process_time() - start
            yield sample

    seconds = {"draw": 0.0}
    start = time.process_time()
    keys = sample_keys(drawn())
    draw = seconds["draw"]
    key = time.process_time() - start - draw
    paths = {}
    for name, settings in ORDERINGS.items():
        ordering = orderings.build(settings)
        start = time.process_time()
        paths[name] = ordering.order(keys)
        seconds[name] = time.process_time() - start
    lengths = {name: path_length(keys, path) for name, path in paths.items()}
    shuffled = np.random.default_rng(SEED).permutation(n_samples)
    random = path_length(keys, shuffled)
    row: dict[str, Any] = {
        "family": family,
        "n_samples": n_samples,
        "cells": cells,
        "draw_s": draw,
        "key_s": key,
        **{f"{name}_s": seconds[name] for name in paths},
        **{f"{name}_over_random": length / random for name, length in lengths.items()},
    }
    small = n_samples <= _TWO_OPT
    best = path_length(keys, two_opt(keys, paths["greedy"])) if small else None
    for name, length in lengths.items():
        row[f"{name}_over_two_opt"] = length / best if best else None
    row["fields_over_random"] = (
        _field_length(space, paths["improved"]) / _field_length(space, shuffled) if small else None
    )
    tracemalloc.start()
    orderings.build("greedy").order(sample_keys(drawn()))
    row["peak_mib"] = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    return {name: row[name] for name in COLUMNS}


def two_opt(keys: np.ndarray, path: np.ndarray) -> np.ndarray:
    """Return a path no reversal of a stretch shortens: all pairs of steps, the best move each time.

    ``N^2`` memory and time per move; the measure for orders of few samples.
    """
    keys = np.asarray(keys, dtype=np.float64)[path]
    n = len(keys)
    distance = np.zeros((n + 1, n + 1))  # the last one is nobody, beyond both ends
    for i, key in enumerate(keys):
        distance[i, :n] = np.linalg.norm(keys - key, axis=1)
    order = np.concatenate([[n], np.arange(n), [n]])
    later = np.triu(np.ones((n + 1, n + 1), dtype=bool), 1)
    while True:
        a, b = order[:-1], order[1:]  # steps (a_i, b_i); reverse b_i .. a_j, i < j
        steps = distance[a, b]
        gains = steps[:, None] + steps - distance[np.ix_(a, a)] - distance[np.ix_(b, b)]
        gains[~later] = 0.0
        i, j = np.unravel_index(gains.argmax(), gains.shape)
        if gains[i, j] <= 1e-9 * distance.max():
            return np.asarray(path)[order[1:-1]]
        order[i + 1 : j + 1] = order[i + 1 : j + 1][::-1].copy()


def _field_length(space: FieldSpace, path: np.ndarray) -> float:
    """Return the sum of distances between the logarithms of consecutive fields."""
    total, before = 0.0, None
    for index in path.tolist():
        values = np.log(space.sample(1, SEED, index)[0].fields["a"])
        if before is not None:
            total += float(np.linalg.norm(values - before))
        before = values
    return total
