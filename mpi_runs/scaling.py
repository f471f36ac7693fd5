"""Shared by strong_scaling.py and weak_scaling.py: run a campaign on 1, 2, ... ranks in turn.

Runs on different numbers of ranks alternate, so that a machine that slows down slows all of them,
and medians are taken. Rates are those of the campaign itself, from its first sample to its last
sealed shard; starting Python and MPI is not in them. CPU time per sample stands beside the rate: it
tells waiting for busy cores (efficiency falls, CPU efficiency does not) from real overhead.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LAUNCHER_SETTINGS = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "OMPI_MCA_hwloc_base_binding_policy": "none",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "OMP_NUM_THREADS": "1",
}


def main(name: str, about: str, samples: Callable[[int, int], int]) -> int:
    """Parse the command line, measure, print a table and write JSON.

    Parameters
    ----------
    name : str
        Name of the study, and of its result file.
    about : str
        One line for ``--help``.
    samples : callable
        Number of samples for (base, ranks).
    """
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("case", type=Path, help="case file")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--samples", type=int, default=200, help="base number of samples")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--json", type=Path, help="default: mpi_runs/results/NAME_CASE.json")
    words = parser.parse_args()
    runs: dict[int, list[dict[str, float]]] = {ranks: [] for ranks in words.ranks}
    for _ in range(words.repeats):
        for ranks in words.ranks:
            n = samples(words.samples, ranks)
            runs[ranks].append(_campaign(words.case, ranks, n, words.overrides))
            print(f"{ranks} rank(s), {n} samples: {runs[ranks][-1]['rate']:.1f} samples/s")
    result = _summary(name, words, runs, samples)
    for row in result["rows"]:
        print("  ".join(f"{key} {value:.4g}" for key, value in row.items()))
    stem = f"{name}_{words.case.stem}"
    path = words.json or ROOT / "mpi_runs" / "results" / f"{stem}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path}")
    return 0


def _campaign(case: Path, ranks: int, n: int, overrides: list[str]) -> dict[str, float]:
    """Run one campaign in a directory of its own and read what it cost."""
    launcher = os.environ.get("SIMLAB_MPIRUN", "mpirun").split()
    directory = Path(tempfile.mkdtemp(prefix="simlab-scaling-"))
    command = [*launcher, "-n", str(ranks), sys.executable, "-m", "simlab", "generate", str(case)]
    command += ["--out", str(directory / "run"), "--set", f"campaign.n={n}"]
    for override in overrides:
        command += ["--set", override]
    try:
        done = subprocess.run(
            command, env=LAUNCHER_SETTINGS | dict(os.environ), capture_output=True, text=True
        )
        if done.returncode != 0:
            sys.exit(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stderr[-2000:]}")
        lines = (directory / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        last = [entry for line in lines if (entry := json.loads(line))["kind"] == "campaign"][-1]
        manifest = json.loads((directory / "run" / "manifest.json").read_text(encoding="utf-8"))
    finally:
        shutil.rmtree(directory)
    spent = manifest["campaign"]["cpu_seconds"]["all"]
    return {"rate": last["samples_per_s"], "cpu_ms": 1e3 * spent / last["done"]}


def _summary(
    name: str,
    words: argparse.Namespace,
    runs: dict[int, list[dict[str, float]]],
    samples: Callable[[int, int], int],
) -> dict[str, Any]:
    rows = []
    first = min(runs)
    for ranks, found in runs.items():
        rate = median(run["rate"] for run in found)
        per_rank = median(run["rate"] for run in runs[first]) / first
        spent = median(run["cpu_ms"] for run in found)
        spent_first = median(run["cpu_ms"] for run in runs[first])
        rows.append(
            {
                "ranks": ranks,
                "samples": samples(words.samples, ranks),
                "samples_per_s": rate,
                "cpu_ms_per_sample": spent,
                "efficiency": rate / (ranks * per_rank),
                "cpu_efficiency": spent_first / spent,
            }
        )
    ratios = {
        f"{kind}_{row['ranks']}": row[kind]
        for row in rows
        for kind in ("efficiency", "cpu_efficiency")
    }
    return {
        "name": name,
        "case": words.case.name,
        "overrides": words.overrides,
        "repeats": words.repeats,
        "machine": _machine(),
        "rows": rows,
        "ratios": ratios,
    }


def _machine() -> dict[str, Any]:
    """Return processor, cores and load; the load tells how far to trust the rates."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "load_after": os.getloadavg()[0],
        "python": platform.python_version(),
    }
