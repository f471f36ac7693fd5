"""Recycling on 1, 2 and 4 ranks, and two chains on two ranks: runs ``_skr_ranks`` under mpirun.

Rows: mean iterations per system, their largest deviation from one rank's, and the largest
distance ``||x - x_1|| / ||x_1||`` of a solution from one rank's. The preconditioner is Jacobi,
which does not depend on the number of ranks. Chains: wall and CPU seconds of the slower rank's
whole walk with ILU, medians of alternating runs; on a machine with other work the CPU seconds say
what parting a chain costs, the wall seconds what the neighbours took.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from simlab.bench._launch import NotMeasured, launched

__all__ = ["COLUMNS", "NotMeasured", "chains", "together"]

COLUMNS = (
    "family",
    "n",
    "ranks",
    "iterations",
    "iterations_off",
    "solution_off",
    "wall_s",
    "cpu_s",
)


def together(n: int, n_samples: int, ranks: tuple[int, ...] = (1, 2, 4)) -> list[dict[str, Any]]:
    """Solve the same systems of C1 on different numbers of ranks.

    Raises
    ------
    NotMeasured
    """
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for size in ranks:
            path = Path(folder) / f"{size}.npy"
            words = ["together", "--n", n, "--samples", n_samples, "--solutions", path]
            its = np.array(launched("_skr_ranks", size, *words)["iterations"])
            x = np.load(path).reshape(n_samples, -1)
            if size == ranks[0]:
                first_its, first_x = its, x
            distance = np.linalg.norm(x - first_x, axis=1) / np.linalg.norm(first_x, axis=1)
            rows.append(
                {
                    "family": "C1",
                    "n": x.shape[1],
                    "ranks": size,
                    "iterations": float(its.mean()),
                    "iterations_off": float(np.abs(its / first_its - 1.0).max()),
                    "solution_off": float(distance.max()),
                }
            )
    return rows


def chains(n: int, n_samples: int, repeats: int) -> list[dict[str, Any]]:
    """Walk one chain on one rank, then two on two; the last row over the first is the gain.

    Raises
    ------
    NotMeasured
    """
    seconds: dict[int, list[tuple[float, float]]] = {1: [], 2: []}
    iterations = {}
    for turn in range(repeats):
        for size in (1, 2) if turn % 2 == 0 else (2, 1):
            found = launched("_skr_ranks", size, "chains", "--n", n, "--samples", n_samples)
            seconds[size].append((found["seconds"], found["cpu_seconds"]))
            iterations[size] = float(np.mean(found["iterations"]))
    return [
        {
            "family": "C1, one chain per rank",
            "n": n,
            "ranks": size,
            "iterations": iterations[size],
            "wall_s": float(np.median([wall for wall, _ in seconds[size]])),
            "cpu_s": float(np.median([cpu for _, cpu in seconds[size]])),
        }
        for size in (1, 2)
    ]
