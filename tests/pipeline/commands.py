"""Run the command line as a user does: in processes of its own, under mpirun where asked."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CASES = ROOT / "cases"

# what the Makefile sets for Open MPI as root in a container with few cores
LAUNCH = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "OMP_NUM_THREADS": "1",
}


def environment() -> dict[str, str]:
    """Return this process's environment without what an outer launcher put there."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("OMPI_", "PMIX_"))}
    return inherited | LAUNCH


def command(words: Sequence[str | Path], ranks: int = 0) -> list[str]:
    """Return the command for ``simlab WORDS``, under mpirun when ``ranks`` is not 0."""
    launcher = ["mpirun", "-n", str(ranks)] if ranks else []
    return [*launcher, sys.executable, "-m", "simlab", *map(str, words)]


def simlab(
    *words: str | Path, ranks: int = 0, cwd: Path | None = None, timeout: float = 180
) -> subprocess.CompletedProcess[str]:
    """Run ``simlab WORDS`` to its end and return what it said."""
    return subprocess.run(
        command(words, ranks),
        cwd=cwd or ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
