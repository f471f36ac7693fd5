"""Look at one library from inside a process: what ``simlab doctor`` asks each of them.

    python -P simlab/cli/probes.py petsc     prints the findings as one line of JSON

A library that is badly installed may end the process that imports it, so the doctor runs each probe
in a process of its own. Under mpirun it calls the functions instead: ranks start no processes.
"""

from __future__ import annotations

import json
import platform
import re
import sys
from pathlib import Path
from typing import Any

from simlab.core import comm
from simlab.core.errors import DependencyError

__all__ = ["PROBES", "h5py", "handshake", "mpi", "petsc", "torch"]

_PETSC_PACKAGES = (
    "hypre",
    "mumps",
    "suitesparse",
    "ml",
    "superlu",
    "superlu_dist",
    "ptscotch",
    "parmetis",
    "hdf5",
    "hpddm",
    "cuda",
)
_MPI_FILE = re.compile(r"/lib(?:mpi|mpich|mpi_cray\w*)\.so[.\d]*$")


def mpi() -> dict[str, Any]:
    """Return the MPI library, this process's place in the world and the launcher's world size."""
    world = comm.world()
    return {"library": comm.library_version(), "rank": world.rank, "size": world.size}


def petsc() -> dict[str, Any]:
    """Return PETSc's version and build, and every MPI library file this process then holds."""
    import numpy as np

    from simlab.linalg import petsc as PETSc

    comm.world()
    return {
        "version": ".".join(map(str, PETSc.Sys.getVersion())),
        "scalar": np.dtype(PETSc.ScalarType).name,
        "integer": np.dtype(PETSc.IntType).name,
        "packages": [name for name in _PETSC_PACKAGES if PETSc.Sys.hasExternalPackage(name)],
        "directory": sys.modules["petsc4py"].get_config()["PETSC_DIR"],
        "mpi_files": _mapped(_MPI_FILE),
    }


def _mapped(pattern: re.Pattern[str]) -> list[str]:
    """Return the shared libraries in this process whose resolved path matches (Linux only)."""
    if platform.system() != "Linux":
        return []
    lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    paths = {str(Path(line.split(maxsplit=5)[5]).resolve()) for line in lines if "/" in line}
    return sorted(path for path in paths if pattern.search(path))


def h5py() -> dict[str, Any]:
    """Return the HDF5 version behind h5py and whether it was built with MPI."""
    import h5py as library

    return {"hdf5": library.version.hdf5_version, "mpi": bool(library.get_config().mpi)}


def torch() -> dict[str, Any]:
    """Return torch's build and how many accelerators it sees."""
    import torch as library

    return {"version": str(library.__version__), "devices": library.cuda.device_count()}


def handshake() -> dict[str, Any]:
    """Return what the ranks learn from each other through MPI and through PETSc. Collective."""
    from simlab.linalg import petsc as PETSc

    world = comm.world()
    vector = PETSc.Vec().createMPI((1, PETSc.DECIDE), comm=world)
    vector.set(1.0)
    return {"size": world.size, "ranks": world.allgather(world.rank), "petsc_sum": vector.sum()}


PROBES = {probe.__name__: probe for probe in (mpi, petsc, h5py, torch, handshake)}


def main() -> int:
    """Print one probe's findings; an import that fails is a finding."""
    try:
        found = PROBES[sys.argv[1]]()
    except (ImportError, DependencyError) as error:
        found = {"error": str(error)}
    if found.get("ranks", [0])[0] == 0 and (not comm.is_initialised() or comm.world().rank == 0):
        print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
