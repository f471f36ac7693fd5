"""``train.ranks``: the steps of one process, deaths that end all, a resume that goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import ROOT, command, environment, simlab

from simlab.core.config import build
from simlab.core.errors import ConfigError
from simlab.learn.settings import TrainSettings
from simlab.learn.trainer import Trainer
from simlab.store.store import SnapshotStore

CASE = """
[family]
kind = "heat"
cells = 6
n_steps = 4
[solver]
kind = "direct"
[campaign]
n = 48
seed = 8821
[train]
operator = { kind = "mlp", hidden = [16] }
buffer = { kind = "fifo", capacity = 40 }
mode = "deterministic"
pilot = 8
threads = 1
log_every = 1
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "case.toml").write_text(CASE)
    done = simlab("generate", folder / "case.toml", "--out", folder / "run")
    assert done.returncode == 0, done.stderr
    return folder


def words(made: Path, out: Path, **changes: object) -> list[str | Path]:
    """Return the words that train on a copy of the data."""
    if not out.exists():
        shutil.copytree(made / "run", out)
    sets = [word for key, value in changes.items() for word in ("--set", f"train.{key}={value}")]
    return ["train", made / "case.toml", "--out", out, *sets]


def losses(out: Path) -> list[float]:
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["kind"] == "train"]


@pytest.mark.slow
def test_two_ranks_equal_one_with_twice_the_batch(made, tmp_path):
    for size, out in ((1, tmp_path / "one"), (2, tmp_path / "two")):
        share = 8 // size
        done = simlab(*words(made, out, ranks=size, batch=share, lanes=share, n_batches=60))
        assert done.returncode == 0, done.stderr
    assert len(losses(tmp_path / "two")) == 60
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-5)
    one, two = (
        torch.load(tmp_path / name / "model" / "model.pt", weights_only=True)
        for name in ("one", "two")
    )
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-4)
    assert (tmp_path / "two" / "model" / "arrivals-1.log").is_file()


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def wait_for(condition, seconds=90.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


@pytest.fixture
def begin(made, tmp_path):
    """Start or resume a long training on two ranks; return it and its other process, at work."""
    out, log = tmp_path / "run", tmp_path / "log"
    given = words(made, out, ranks=2, batch=4, n_batches=100_000, checkpoint_seconds=0.2)
    running = []

    def start() -> tuple[subprocess.Popen[str], int]:
        shown = losses(out)
        with log.open("w") as file:
            process = subprocess.Popen(
                command([*given, "--resume"]),
                cwd=ROOT,
                env=environment(),
                stdout=file,
                stderr=subprocess.STDOUT,
                text=True,
            )
        running.append(process)
        wait_for(lambda: len(losses(out)) > len(shown) + 5 or process.poll() is not None)
        assert process.poll() is None, log.read_text()
        wait_for(lambda: any((out / "model" / "checkpoints").glob("batch-*/COMMIT")))
        (other,) = children(process.pid)
        return process, other

    yield start
    for process in running:
        process.kill()
        process.wait()


def test_a_rank_that_dies_ends_the_others(begin, tmp_path):
    log = tmp_path / "log"
    process, other = begin()
    os.kill(other, signal.SIGKILL)
    assert process.wait(60) == 1
    assert f"error: training process 1 (pid {other}) ended with signal SIGKILL" in log.read_text()


@pytest.mark.slow
def test_no_process_is_left_behind_and_a_resume_goes_on(begin, tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    process, other = begin()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    wait_for(lambda: not is_alive(other), 20)

    process, other = begin()
    for pid in (other, process.pid):  # as Ctrl-C does, to all of a terminal's processes
        os.kill(pid, signal.SIGINT)
    assert process.wait(60) == 0, log.read_text()
    wait_for(lambda: not is_alive(other), 5)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["train"]["state"] == "stopped"


def test_from_python_it_is_refused(made):
    schema = SnapshotStore.open(made / "run" / "store").schema
    settings = build(TrainSettings, {"operator": {"kind": "mlp"}, "ranks": 2})
    with pytest.raises(ConfigError, match=r"ranks: 2 processes .* torchrun"):
        Trainer(settings, schema)
