"""Random ``kill -9`` of solvers, trainer, supervisor, and of two at once: nothing lost or doubled.

How often each of the five is killed: the environment variable KILLS, 3 when it is not set.
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
N_SAMPLES, N_STEPS = 100 + 60 * N_KILLS, 6
SECONDS = 300 + 60 * N_KILLS  # of patience, in all
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


def kill_at_random(run: Killed, n: int) -> Counter[str]:
    """Kill each role ``n`` times, at a random moment of its work; one time in five of any state."""
    draw = random.Random(20907)
    pairs = [role for role in ROLES if role.startswith("supervisor and")]
    goal = {role: -(-n // len(pairs)) if role in pairs else n for role in ROLES}
    kills: Counter[str] = Counter()
    end = time.monotonic() + SECONDS
    while open_roles := [role for role in ROLES if kills[role] < goal[role]]:
        assert run.supervisor.poll() is None, f"the run ended first, after {dict(kills)}"
        assert time.monotonic() < end, f"no role gets to work, after {dict(kills)}"
        time.sleep(draw.uniform(0.0, 0.4))
        role = max(open_roles, key=lambda one: (1 - kills[one] / goal[one], draw.random()))
        others = [one for one in open_roles if all(map(run.is_at_work, ROLES[one]))]
        if draw.random() < 0.2 and run.is_at_work("supervisor"):
            others.append(role)  # may be just starting
        if others:
            role = role if role in others else draw.choice(others)
            run.kill(ROLES[role], draw)
            kills[role] += 1
    return kills


def weights(out: Path) -> dict[str, torch.Tensor]:
    return torch.load(out / "model" / "model.pt", weights_only=True)


@pytest.mark.slow
def test_a_run_that_was_killed_again_and_again_equals_one_that_was_not(tmp_path) -> None:
    calm, wild = Killed(tmp_path, tmp_path / "calm"), None
    try:
        assert calm.supervisor.wait(timeout=SECONDS) == 0
        begun = time.monotonic()
        wild = Killed(tmp_path, tmp_path / "wild")
        kills = kill_at_random(wild, N_KILLS)
        seconds = time.monotonic() - begun
        n_solved = len(SnapshotStore.open(wild.out / "store").done())
        assert wild.supervisor.wait(timeout=SECONDS) == 0
    finally:
        calm.end()
        if wild is not None:
            wild.end()
    n_seen = len(RunDirectory(wild.out).manifest()["restarts"])
    print(f"{sum(kills.values())} kills in {seconds:.0f} s: {dict(kills)}")
    print(f"by then {n_solved} of {N_SAMPLES} samples were solved; {n_seen} restarts")
    for out in (calm.out, wild.out):
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
    one, other = weights(calm.out), weights(wild.out)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
