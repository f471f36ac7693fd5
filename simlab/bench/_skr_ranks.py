"""Recycling on several ranks, started under ``mpirun`` by the bench: prints one line of JSON.

``together``: all ranks share every system; iterations per system, and the solutions in a file.
``chains``: every rank walks a chain of its own, cut from one greedy order (draw, assemble, solve),
from the same static space; wall and CPU seconds of the slowest rank's whole walk.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import numpy as np

from simlab.bench._skr_families import SEED, entry
from simlab.core.comm import self_comm, world
from simlab.linalg.advisor import begun
from simlab.linalg.ordering import cut, orderings, sample_keys
from simlab.linalg.system import solvers
from simlab.problems.family import ProblemFamily, families
from simlab.problems.reference import reference

__all__ = ["main"]

_TOGETHER = {"preconditioner": "jacobi"}  # the same on any number of ranks
_RECYCLED = {"kind": "gcrodr", "static": 15, "carried": 5, "restart": 40, "gate": False}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="simlab.bench._skr_ranks")
    parser.add_argument("what", choices=["together", "chains"])
    parser.add_argument("--family", default="C1")
    parser.add_argument("--n", type=int, default=2500)
    parser.add_argument("--samples", type=int, default=6)
    parser.add_argument("--solutions", default="")
    words = parser.parse_args()
    family = families.build(entry(words.family).table(words.n))
    if words.what == "together":
        found = _together(family, words.samples, words.solutions)
    else:
        found = _chains(family, words.samples)
    if world().rank == 0:
        print(json.dumps(found))


def _begin(family: ProblemFamily, samples: list[Any], comm: Any, **settings: Any) -> Any:
    """Return solver, state and workspace; the mean sample's system is solved already."""
    solver = solvers.build(_RECYCLED | settings)
    workspace = family.setup(comm)
    system = family.assemble(reference(samples), workspace)
    seed = solver.seed(system)  # type: ignore[attr-defined]
    state = begun(solver, system, seed)
    _, state = solver.solve(system, state)
    return solver, state, workspace


def _together(family: ProblemFamily, n_samples: int, path: str) -> dict[str, Any]:
    comm = world()
    samples = family.space.sample(n_samples, SEED)
    solver, state, workspace = _begin(family, samples, comm, **_TOGETHER)
    iterations, solutions = [], []
    for mu in samples:
        result, state = solver.solve(family.assemble(mu, workspace), state)
        iterations.append(result.report.check().iterations)
        solutions.append(family.observe(mu, result.x, workspace).get("u", np.zeros(0)))
    if comm.rank == 0 and path:
        np.save(path, np.stack(solutions))
    return {"ranks": comm.size, "iterations": iterations}


def _chains(family: ProblemFamily, n_samples: int) -> dict[str, Any]:
    comm = world()
    samples = family.space.sample(n_samples, SEED)
    keys = sample_keys(samples)
    mine = cut(keys, orderings.build("greedy").order(keys), comm.size)[comm.rank]
    solver, state, workspace = _begin(family, samples, self_comm())
    comm.Barrier()
    begin, cpu = time.perf_counter(), time.process_time()
    iterations = []
    for index in np.asarray(mine).tolist():
        system = family.assemble(family.space.sample(1, SEED, index)[0], workspace)
        result, state = solver.solve(system, state)
        iterations.append(result.report.check().iterations)
    spent = (time.perf_counter() - begin, time.process_time() - cpu)
    everyone = comm.gather((*spent, iterations))
    if everyone is None:
        return {}
    seconds, cpu_seconds, parts = zip(*everyone, strict=True)
    flat = [its for part in parts for its in part]
    return {
        "ranks": comm.size,
        "seconds": max(seconds),
        "cpu_seconds": max(cpu_seconds),
        "iterations": flat,
    }


if __name__ == "__main__":
    main()
