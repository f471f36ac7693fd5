"""Random ``kill -9`` of solvers, trainer, supervisor, and of two at once: nothing lost or doubled.

How often each of the five is killed: the environment variable KILLS, 3 when it is not set. As many
runs as that takes, each held against one that nobody disturbed.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from commands import ROOT, command, environment

from simlab.core.runs import RunDirectory
from simlab.learn.arrivals import read_arrivals
from simlab.pipeline.processes import end_heirs, heirs
from simlab.store.store import SnapshotStore

N_KILLS = int(os.environ.get("KILLS", "3"))
N_SAMPLES, N_STEPS = 240, 6
SECONDS = 900  # of patience, with each run
SIDES = ("solvers", "trainer")
ROLES = {
    "solvers": ["solvers"],
    "trainer": ["trainer"],
    "supervisor": ["supervisor"],
    "both sides": ["solvers", "trainer"],
    "supervisor and solvers": ["supervisor", "solvers"],
    "supervisor and trainer": ["supervisor", "trainer"],
}
# Much work on few numbers: some 50 ms a sample, so that the run lasts as long as the kills.
CASE = f"""
[family]
kind = "lorenz"
n_steps = {N_STEPS}
substeps = 400
[campaign]
n = {N_SAMPLES}
seed = 40961
[train]
operator = {{ kind = "mlp", hidden = [16] }}
buffer = {{ kind = "reservoir", capacity = {N_SAMPLES * N_STEPS}, threshold = 16 }}
mode = "deterministic"
batch = 16
n_batches = {N_SAMPLES * N_STEPS // 12}
threads = 1
checkpoint_seconds = 0.3
validate_every = 500
log_every = 20
"""


class Killed:
    """A run whose processes are killed; started again when its supervisor was."""

    def __init__(self, folder: Path, out: Path) -> None:
        self.out, self._case = out, folder / "case.toml"
        self._case.write_text(CASE)
        self.supervisor = self._start()
        self._since = dict.fromkeys(SIDES, 0.0)

    def _start(self, *words: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command(["run", self._case, "--out", self.out, "--max-restarts", "10000", *words]),
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=(self.out.parent / f"{self.out.name}.err").open("ab"),
            start_new_session=True,
        )

    def _is_supervised(self) -> bool:
        with suppress(OSError):
            opened = Path(f"/proc/{self.supervisor.pid}/fd").iterdir()
            return any(os.readlink(entry).endswith(".supervisor.lock") for entry in opened)
        return False

    def is_at_work(self, victim: str) -> bool:
        """Return whether it has got something done since it was killed last."""
        if victim == "supervisor":
            return self._is_supervised()
        folder = self.out / ("store/inflight" if victim == "solvers" else "model/checkpoints")
        alive = heirs("SIMLAB_SIDE", f"{victim} of {self.out}")
        return bool(alive) and newest(folder.glob("*")) > self._since[victim]

    def kill(self, victims: Iterable[str], draw: random.Random) -> None:
        """Kill some processes or all of each victim, a supervisor first; start that again."""
        victims = list(victims)
        if "supervisor" in victims:
            self.supervisor.kill()
        for side in SIDES:
            if side in victims:
                pids = heirs("SIMLAB_SIDE", f"{side} of {self.out}")
                for pid in draw.sample(pids, draw.randint(1, len(pids)) if pids else 0):
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                self._since[side] = time.time()
        if "supervisor" in victims:
            self.supervisor.wait()
            self.supervisor = self._start("--resume")

    def end(self) -> None:
        """Leave nothing behind."""
        self.supervisor.kill()
        for side in SIDES:
            end_heirs("SIMLAB_SIDE", f"{side} of {self.out}")


def newest(paths: Iterable[Path]) -> float:
    """Return when the newest of some files was written, 0 when there is none."""
    times = [0.0]
    for path in paths:
        with suppress(FileNotFoundError):
            times.append(path.stat().st_mtime)
    return max(times)


def kill_at_random(run: Killed, draw: random.Random, kills: Counter[str]) -> None:
    """Kill the roles of which some are left, each at work or at any moment, until the run ends."""
    end = time.monotonic() + SECONDS
    while run.supervisor.poll() is None and +kills:
        assert time.monotonic() < end, f"the run does not end; left: {dict(kills)}"
        wanted = list(+kills)
        if draw.random() < 0.3:
            time.sleep(draw.uniform(0.0, 2.0))
            ready = wanted  # just starting, maybe
        else:
            time.sleep(draw.uniform(0.0, 0.4))
            ready = [role for role in wanted if all(map(run.is_at_work, ROLES[role]))]
        if ready and run.supervisor.poll() is None:
            role = max(ready, key=lambda one: (kills[one], draw.random()))
            run.kill(ROLES[role], draw)
            kills[role] -= 1
    assert run.supervisor.wait(timeout=SECONDS) == 0


def weights(out: Path) -> dict[str, torch.Tensor]:
    return torch.load(out / "model" / "model.pt", weights_only=True)


def assert_whole(out: Path) -> None:
    store = SnapshotStore.open(out / "store")
    assert store.is_complete()
    assert len(store.done()) == N_SAMPLES
    assert not store.verify(deep=True)
    arrivals = read_arrivals(out / "model" / "arrivals.log")
    puts = [rest for kind, rest, _ in arrivals if kind == "p"]
    ids = store.ids("train").tolist()
    expected = {f"{index} {step}" for index in ids for step in range(N_STEPS)}
    assert set(puts) == expected
    assert len(puts) == len(expected)  # each exactly once


@pytest.mark.slow
def test_runs_that_were_killed_again_and_again_equal_one_that_was_not(tmp_path) -> None:
    draw = random.Random(20907)
    pairs = [role for role in ROLES if role.startswith("supervisor and")]
    kills = Counter({role: -(-N_KILLS // 2) if role in pairs else N_KILLS for role in ROLES})
    print(f"{sum(kills.values())} kills: {dict(kills)}")
    runs = [Killed(tmp_path, tmp_path / "calm")]
    try:
        assert runs[0].supervisor.wait(timeout=SECONDS) == 0
        assert_whole(runs[0].out)
        calm = weights(runs[0].out)
        while +kills:
            runs.append(Killed(tmp_path, tmp_path / f"wild-{len(runs)}"))
            kill_at_random(runs[-1], draw, kills)
            out = runs[-1].out
            n_seen = len(RunDirectory(out).manifest().get("restarts", ()))
            print(f"{out.name}: {sum(kills.values())} kills left, {n_seen} restarts by supervisors")
            assert_whole(out)
            wild = weights(out)
            assert calm.keys() == wild.keys()
            assert all(torch.equal(calm[name], wild[name]) for name in calm)
    finally:
        for run in runs:
            run.end()
