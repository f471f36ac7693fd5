"""One measurement of sample-parallel speed, started under ``mpirun`` by a bench.

Every rank walks its own samples (weak scaling): draw, assemble, solve with ``auto``. After the
pilot all begin together; prints the wall seconds of the slowest rank.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from simlab.core.comm import self_comm, world
from simlab.linalg.system import solvers
from simlab.problems.family import families

__all__ = ["main"]

_WARM_UP = 5  # samples before the clock starts; the pilot is among them


def main() -> None:
    """Measure and print one line of JSON on rank 0."""
    parser = argparse.ArgumentParser(prog="simlab.bench._ranks")
    parser.add_argument("--cells", type=int, default=128)
    parser.add_argument("--samples", type=int, default=100)
    words = parser.parse_args()
    comm = world()
    family = families.build({"kind": "darcy", "cells": words.cells})
    solver = solvers.build("auto")
    workspace, state = family.setup(self_comm()), None
    first = comm.rank * (words.samples + _WARM_UP)

    def walk(start: int, n: int, state: Any) -> Any:
        for index in range(start, start + n):
            system = family.assemble(family.space.sample(1, 90217, index)[0], workspace)
            state = state or solver.init(system)
            result, state = solver.solve(system, state)
            result.report.check()
        return state

    state = walk(first, _WARM_UP, state)
    comm.Barrier()
    begin = time.perf_counter()
    walk(first + _WARM_UP, words.samples, state)
    seconds = comm.gather(time.perf_counter() - begin)
    if seconds is not None:
        print(json.dumps({"ranks": comm.size, "seconds": max(seconds)}))


if __name__ == "__main__":
    main()
