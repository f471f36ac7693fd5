"""The script for an online run under SLURM, with a stand-in for ``srun``."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from commands import ROOT, environment

from simlab.store.store import SnapshotStore

CASE = """
[family]
kind = "lorenz"
n_steps = 4
[campaign]
n = 40
seed = 6151
[train]
operator = { kind = "mlp", hidden = [16] }
buffer = { kind = "reservoir", capacity = 160, threshold = 16 }
n_batches = 60
"""
# Runs what srun would; the first start of one part dies before it has begun.
SRUN = """#!/usr/bin/env bash
while [[ $1 == -* ]]; do
    if [ "$1" = -n ]; then n=$2; shift; fi
    shift
done
if [[ "$*" == *"--shard 1/2"* && ! -e "$DIED" ]]; then touch "$DIED"; exit 9; fi
if [ "$n" = 1 ]; then exec "$@"; fi
exec mpirun -n "$n" "$@"
"""


def submit(tmp_path: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the script as SLURM would in an allocation that has been granted."""
    places = tmp_path / "bin"
    places.mkdir(exist_ok=True)
    (places / "srun").write_text(SRUN)
    (places / "srun").chmod(0o755)
    (tmp_path / "case.toml").write_text(CASE)
    found = environment() | variables
    found |= {"SLURM_SUBMIT_DIR": str(ROOT), "DIED": str(tmp_path / "died")}
    found["PATH"] = f"{places}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", ROOT / "mpi_runs/slurm_online.sh", tmp_path / "case.toml", tmp_path / "run"],
        env=found,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.mark.slow
def test_an_online_run_of_job_steps_ends_whole_though_one_dies(tmp_path) -> None:
    done = submit(tmp_path, SLURM_NTASKS="6", PARTS="2", CHANNEL="stream")
    assert done.returncode == 0, done.stderr
    assert "solvers 1 ended with 9: restart 1 of 3" in done.stderr
    run = tmp_path / "run"
    store = SnapshotStore.open(run / "store")
    assert store.is_complete()
    assert not store.verify(deep=True)
    assert (run / "report.html").is_file()
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["train"]["batches"] == 60
    assert manifest["case"]["train"]["channel"] == "stream"
    again = submit(tmp_path, SLURM_NTASKS="6", PARTS="2", CHANNEL="stream")  # nothing is left to do
    assert again.returncode == 0, again.stderr


def test_too_few_tasks_are_refused_before_anything_starts(tmp_path) -> None:
    done = submit(tmp_path, SLURM_NTASKS="3", PARTS="2", CHANNEL="stream")
    assert done.returncode == 2
    assert "3 tasks are too few for 2 solver steps and 2 more" in done.stderr
    assert not (tmp_path / "run").exists()
