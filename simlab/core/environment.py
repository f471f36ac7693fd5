"""The environment variables simlab reads, all in one table that the documentation prints."""

from __future__ import annotations

import os

__all__ = ["VARIABLES", "read"]

VARIABLES = {
    "SIMLAB_LOG_RANKS": "`all`: ranks other than 0 log too, one file per rank in the run directory",
    "SIMLAB_MPIRUN": "process launcher that `simlab run` and `simlab bench` use (default `mpirun`)",
    "SIMLAB_SIDE": "set by `simlab run` for all it starts, so that it finds what is left of them",
    "SIMLAB_N": "client: number of trajectories of the campaign",
    "SIMLAB_PARAMETERS": "client: scalar parameters of its trajectory, a JSON object",
    "SIMLAB_SEED": "client: seed of the campaign",
    "SIMLAB_STORE": "client: directory of the store",
    "SIMLAB_TRAJ": "client: number of the trajectory it computes",
}


def read(name: str, default: str = "") -> str:
    """Return a declared variable's value, or the default."""
    if name not in VARIABLES:
        raise KeyError(f"{name} is not declared in simlab.core.environment")
    return os.environ.get(name, default)
