"""Solvers and trainer side by side: stop, kill and resume."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from commands import CASES, ROOT, command, environment, simlab

from simlab.store.store import SnapshotStore

SMALL = [
    "--set", "family.cells=16", "--set", "campaign.n=200", "--set", "train.n_batches=400",
    "--set", "train.operator.modes=4", "--set", "train.buffer.threshold=16",
]  # fmt: skip


def start(out: Path, *words: str, n: int = 1) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(["run", CASES / "darcy_online.toml", "-n", str(n), "--out", out, *SMALL, *words]),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(out: Path, kind: str, timeout: float = 90) -> None:
    """Wait until the run has logged a metric of a kind."""
    end = time.monotonic() + timeout
    metrics = out / "metrics.jsonl"
    while time.monotonic() < end:
        if metrics.exists() and f'"kind": "{kind}"' in metrics.read_text():
            return
        time.sleep(0.1)
    raise AssertionError(f"no {kind} metric within {timeout} s")


def children_of(out: Path) -> list[int]:
    """Return the processes that work on a run directory."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().decode().split("\0")
            except OSError:
                continue
            if str(out) in words and "--attach" in words:
                found.append(int(entry.name))
    return found


def assert_finished(out: Path) -> None:
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["state"] == "done"
    store = SnapshotStore.open(out / "store")
    assert store.is_complete()
    assert not store.verify(deep=True)
    entry = json.loads((out / "evaluation.json").read_text())["fields"]["u"]
    assert entry["rel_l2"]["mean"] < 0.5
    assert (out / "report.html").stat().st_size > 10_000
    batches = [
        json.loads(line)["batch"]
        for line in (out / "metrics.jsonl").read_text().splitlines()
        if json.loads(line)["kind"] == "train"
    ]
    assert batches[-1] == 400


def test_ctrl_c_stops_both_and_resume_finishes(tmp_path) -> None:
    out = tmp_path / "run"
    process = start(out)
    wait_for(out, "train")
    process.send_signal(signal.SIGINT)
    text, errors = process.communicate(timeout=90)
    assert process.returncode == 130, errors
    assert "--resume" in text
    assert not children_of(out)
    process = start(out, "--resume")
    _, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors
    assert_finished(out)


def test_a_stop_file_made_by_hand_says_stopped(tmp_path) -> None:
    out = tmp_path / "run"
    process = start(out, "--set", "campaign.n=4000", "--set", "family.cells=48")
    wait_for(out, "campaign")
    (out / "STOP").touch()
    text, errors = process.communicate(timeout=90)
    assert process.returncode == 130, errors
    assert text.startswith("stopped; ")
    assert "--resume` goes on" in text
    assert "no trained model" not in errors
    assert json.loads((out / "manifest.json").read_text())["state"] == "stopped"
    assert not children_of(out)


@pytest.mark.parametrize("victim", ["generate", "train"])
def test_one_side_killed_ends_the_other_and_resume_finishes(tmp_path, victim) -> None:
    out = tmp_path / "run"
    words = ["--set", "campaign.n=4000", "--set", "family.cells=48"] if victim == "generate" else []
    process = start(out, *words, "--max-restarts", "0")
    wait_for(out, "campaign" if victim == "generate" else "train")
    for pid in children_of(out):
        if victim in Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0"):
            os.kill(pid, signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1, errors
    assert "--resume goes on" in errors
    assert not children_of(out)
    if victim == "train":
        process = start(out, "--resume")
        _, errors = process.communicate(timeout=180)
        assert process.returncode == 0, errors
        assert_finished(out)


def test_run_refuses_to_be_started_under_a_launcher(tmp_path) -> None:
    done = simlab("run", CASES / "darcy_online.toml", "--out", tmp_path / "run", ranks=2)
    assert done.returncode == 2
    assert "without mpirun" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_trainer_of_its_own_follows_a_finished_campaign(tmp_path) -> None:
    out = tmp_path / "run"
    words = [CASES / "darcy_online.toml", "--smoke", "--out", out]
    assert simlab("generate", *words).returncode == 0
    (out / "STOP").touch()  # left by an earlier stop: a new command goes on
    trained = simlab("train", *words)
    assert trained.returncode == 0, trained.stderr
    again = simlab("train", *words)
    assert again.returncode == 2
    assert "--resume goes on with it" in again.stderr
    judged = simlab("evaluate", out)
    assert judged.returncode == 0, judged.stderr
    assert "mean output" in judged.stdout
    drawn = simlab("plot", out)
    assert drawn.returncode == 0, drawn.stderr
    assert (out / "figures" / "prediction_u.png").is_file()
