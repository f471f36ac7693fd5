"""Random ``kill -9`` of solvers, trainer and supervisor: nothing is lost, nothing comes twice.

How many: the environment variable KILLS, 6 when it is not set.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from commands import ROOT, command, environment

from simlab.learn.arrivals import read_arrivals
from simlab.pipeline.processes import end_heirs, heirs
from simlab.store.store import SnapshotStore

N_KILLS = int(os.environ.get("KILLS", "6"))
N_SAMPLES, N_BATCHES = 600, 400
CASE = f"""
[family]
kind = "darcy"
cells = 32
[solver]
kind = "direct"     # what it gives does not depend on the samples before
[campaign]
n = {N_SAMPLES}
seed = 40961
[train]
operator = {{ kind = "fno", modes = 4 }}
buffer = {{ kind = "reservoir", capacity = 1200, threshold = 16 }}
mode = "deterministic"
n_batches = {N_BATCHES}
threads = 1
checkpoint_seconds = 0.5
validate_every = 80
log_every = 5
"""


def start(folder: Path, out: Path, *words: str) -> subprocess.Popen[bytes]:
    case = folder / "case.toml"
    case.write_text(CASE)
    return subprocess.Popen(
        command(["run", case, "--out", out, "--max-restarts", "1000", *words]),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def newest(out: Path, kind: str) -> float:
    """Return when the last line of a kind was written, 0 when there is none."""
    path = out / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    found = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return max((line["time"] for line in found if line["kind"] == kind), default=0.0)


def killed(out: Path, supervisor: subprocess.Popen[bytes], n: int, folder: Path) -> Counter[str]:
    """Kill roles at random moments of work, each at most a third of ``n`` times; run to the end."""
    draw = random.Random(20907)
    kills: Counter[str] = Counter()
    since = {"solvers": 0.0, "trainer": 0.0, "supervisor": time.time()}
    kinds = {"solvers": "campaign", "trainer": "train"}
    while sum(kills.values()) < n and supervisor.poll() is None:
        time.sleep(draw.uniform(0.2, 1.2))
        ready = [role for role, kind in kinds.items() if newest(out, kind) > since[role]]
        ready += ["supervisor"] * (time.time() > since["supervisor"] + 4)
        ready = [role for role in ready if kills[role] < -(-n // 3)]
        role = min(ready, key=lambda one: (kills[one], draw.random()), default="")
        if role == "supervisor":
            supervisor.kill()
            supervisor.wait()
            supervisor = start(folder, out, "--resume")
        elif role and (pids := heirs("SIMLAB_SIDE", f"{role} of {out}")):
            for pid in draw.sample(pids, draw.randint(1, len(pids))):
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
        else:
            continue
        kills[role] += 1
        since[role] = time.time()
    assert supervisor.wait(timeout=600) == 0
    return kills


def weights(out: Path) -> dict[str, torch.Tensor]:
    return torch.load(out / "model" / "model.pt", weights_only=True)


@pytest.mark.slow
def test_a_run_that_was_killed_again_and_again_equals_one_that_was_not(tmp_path) -> None:
    calm, wild = tmp_path / "calm", tmp_path / "wild"
    try:
        assert start(tmp_path, calm).wait(timeout=600) == 0
        kills = killed(wild, start(tmp_path, wild), N_KILLS, tmp_path)
    finally:
        for out in (calm, wild):
            for side in ("solvers", "trainer"):
                end_heirs("SIMLAB_SIDE", f"{side} of {out}")
    print(f"{sum(kills.values())} kills: {dict(kills)}")
    assert all(kills[role] for role in ("solvers", "trainer", "supervisor"))
    for out in (calm, wild):
        store = SnapshotStore.open(out / "store")
        assert store.is_complete()
        assert not store.verify(deep=True)
        puts = [
            rest for kind, rest, _ in read_arrivals(out / "model" / "arrivals.log") if kind == "p"
        ]
        expected = {f"{index} 0" for index in store.ids("train").tolist()}
        assert set(puts) == expected
        assert len(puts) == len(expected)  # each exactly once
    one, other = weights(calm), weights(wild)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
