"""A measurement on several ranks: a module of this package under ``mpirun``, its last line JSON."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from typing import Any

from simlab.core import environment
from simlab.pipeline.online import launch_environment

__all__ = ["NotMeasured", "launched"]


class NotMeasured(Exception):
    """No process launcher, or it failed; says why."""


def launched(module: str, n_ranks: int, *words: Any) -> dict[str, Any]:
    """Run a module on so many ranks and return what it prints last.

    Raises
    ------
    NotMeasured
        When there is no launcher, or it failed.
    """
    launcher = environment.read("SIMLAB_MPIRUN", "mpirun").split()
    if shutil.which(launcher[0]) is None:
        raise NotMeasured(f"no process launcher {launcher[0]!r}")
    command = [*launcher, "-n", str(n_ranks), sys.executable, "-m", f"simlab.bench.{module}"]
    done = subprocess.run(
        [*command, *map(str, words)],
        env=launch_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "---" not in line]
        said = " ".join(" ".join(lines).split())[:300] or "no message"
        raise NotMeasured(f"{launcher[0]}: {said}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
