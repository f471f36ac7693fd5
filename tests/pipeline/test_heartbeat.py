"""Hung or not: beats, CPU time, stopped processes, and what a supervisor makes of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
from commands import ROOT, command, environment

from simlab.core.runs import RunDirectory
from simlab.learn.arrivals import read_arrivals
from simlab.pipeline import heartbeat
from simlab.pipeline.heartbeat import Heart, Pulse
from simlab.pipeline.processes import end_heirs, heirs
from simlab.pipeline.supervisor import Side
from simlab.store.store import SnapshotStore


class Clock:
    """Stands in for a watcher's clock, and for the processes it watches."""

    def __init__(self, run: RunDirectory) -> None:
        self.now = self.cpu = 0.0
        self.is_stopped = False
        self._folder = run.path / "logs"
        self._folder.mkdir()

    def monotonic(self) -> float:
        return self.now

    def beat(self, name: str) -> None:
        path = self._folder / f"{name}.beat"
        path.touch()
        os.utime(path, (self.now, self.now))

    def silent_until(self, pulse: Pulse, most: float, cpu: float = 0.0) -> float:
        """Let time pass in looks of 0.2 s; return for how long nothing was found to be hung."""
        begun = self.now
        while self.now < begun + most:
            self.now = round(self.now + 0.2, 3)
            self.cpu += 0.2 * cpu
            if pulse.look():
                break
        return round(self.now - begun, 3)

    def walk(self, pulse: Pulse, times: list[float], *names: str) -> None:
        """Beat after each of some times, and be taken for alive."""
        for passed in times:
            for name in names:
                self.beat(name)
            assert self.silent_until(pulse, passed) >= passed


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    return RunDirectory.start(tmp_path / "run", {}, resume=False)


@pytest.fixture
def clock(run, monkeypatch) -> Clock:
    made = Clock(run)
    monkeypatch.setattr(heartbeat, "time", made)
    monkeypatch.setattr(heartbeat, "cpu_seconds", lambda pids: made.cpu)
    monkeypatch.setattr(heartbeat, "is_any_stopped", lambda pids: made.is_stopped)
    return made


def pulse_of(run: RunDirectory, side: str = "solvers", counts_cpu: bool = False) -> Pulse:
    return Pulse(run, side, lambda: [], 30.0, counts_cpu)


@pytest.mark.parametrize(
    ("times", "limit"),
    [
        ([1.0] * 9, 30.0),  # patience
        ([8.0] * 9, 80.0),  # ten times the median
        ([6.0, 6.0, 29.0, 6.0, 6.0], 87.0),  # three times the longest
    ],
)
def test_the_limit_follows_from_the_times_between_beats(run, clock, times, limit) -> None:
    pulse = pulse_of(run)
    clock.walk(pulse, times, "solvers-0")
    assert pulse.limit == pytest.approx(limit, abs=3.0)
    clock.beat("solvers-0")
    # MPI ranks that wait for each other use CPU time: no sign of life
    assert clock.silent_until(pulse, 500, cpu=1.0) == pytest.approx(pulse.limit / 2, abs=1.0)


def test_one_silent_rank_is_enough_and_one_at_rest_is_not_silent(run, clock) -> None:
    pulse = pulse_of(run)
    clock.walk(pulse, [1.0] * 5, "solvers-0", "solvers-1")
    (run.path / "logs" / "solvers-1.beat").unlink()
    clock.walk(pulse, [1.0] * 60, "solvers-0")
    clock.beat("solvers-1")
    with pytest.raises(AssertionError):
        clock.walk(pulse, [1.0] * 60, "solvers-0")


def test_without_beats_work_is_life_and_silence_counts_tenfold_less(run, clock) -> None:
    pulse = pulse_of(run)
    assert clock.silent_until(pulse, 1000, cpu=0.5) >= 1000
    assert clock.silent_until(pulse, 1000) == pytest.approx(300, abs=10)


def test_a_trainer_that_works_without_a_beat_is_alive(run, clock) -> None:
    pulse = pulse_of(run, "trainer", counts_cpu=True)
    clock.walk(pulse, [1.0] * 5, "trainer")
    clock.beat("trainer")
    assert clock.silent_until(pulse, 1000, cpu=0.5) >= 1000  # a long validation
    assert clock.silent_until(pulse, 1000) == pytest.approx(30, abs=10)


def test_a_stopped_process_is_given_longer(run, clock) -> None:
    pulse = pulse_of(run)
    clock.walk(pulse, [1.0] * 5, "solvers-0")
    clock.is_stopped = True
    clock.beat("solvers-0")
    assert clock.silent_until(pulse, 1000) == pytest.approx(300, abs=3)


def test_a_watcher_that_was_stopped_itself_counts_no_silence(run, clock) -> None:
    pulse = pulse_of(run)
    clock.walk(pulse, [1.0] * 5, "solvers-0")
    clock.now += 5000
    assert not pulse.look()
    assert clock.silent_until(pulse, 1000) == pytest.approx(29, abs=3)


def test_patience_doubles_and_a_start_is_heard_from_its_own_beats(run, clock) -> None:
    pulse = pulse_of(run)
    clock.walk(pulse, [1.0] * 5, "solvers-0")
    clock.silent_until(pulse, 1000)
    pulse.begin(fresh=True)
    assert not list((run.path / "logs").glob("*.beat"))
    assert pulse.limit == pytest.approx(60, abs=3)


def test_hearts_beat_for_a_supervisor_only(run, monkeypatch) -> None:
    logs = run.path / "logs"
    logs.mkdir()
    monkeypatch.delenv("SIMLAB_SIDE", raising=False)
    Heart(run, "solvers-0").beat()
    assert not list(logs.iterdir())
    monkeypatch.setenv("SIMLAB_SIDE", "solvers")
    heart = Heart(run, "solvers-0")
    heart.beat()
    assert [path.name for path in logs.iterdir()] == ["solvers-0.beat"]
    heart.rest()
    assert not list(logs.iterdir())
    heart.beat()  # at once after a rest
    assert list(logs.iterdir())


HANGS_ONCE = """
import pathlib, sys, time
here = pathlib.Path(sys.argv[1])
for _ in range(6):
    (here / "logs" / "solvers-0.beat").touch()
    time.sleep(0.05)
if not (here / "again").exists():
    (here / "again").touch()
    time.sleep(600)
"""


def test_a_side_that_hangs_is_killed_started_again_and_said_so(run) -> None:
    words = [sys.executable, "-c", HANGS_ONCE, str(run.path)]
    one = Side(run, "solvers", "campaign", words, dict(os.environ), 3, patience=1.0)
    one.begin()
    end = time.monotonic() + 60
    while not one.has_ended and time.monotonic() < end:
        one.look(stopping=False)
        time.sleep(0.05)
    assert (one.code, one.failure, one.n_restarts) == (0, "", 1)
    (entry,) = run.manifest()["restarts"]
    assert "hung: no sign of life" in entry["reason"]
    assert json.loads(run.metrics.read_text().splitlines()[-1])["reason"] == entry["reason"]


# --- whole runs

N_SAMPLES, N_STEPS = 60, 5
SIDES = ("solvers", "trainer", "server")


def case_of(n: int, channel: str = "") -> str:
    """Return a case of some 40 ms a sample, with a training when a channel to it is given."""
    text = f"""
[family]
kind = "lorenz"
n_steps = {N_STEPS}
substeps = 300
[campaign]
n = {n}
seed = 30817
"""
    training = f"""
[train]
operator = {{ kind = "mlp", hidden = [16] }}
buffer = {{ kind = "reservoir", capacity = {n * N_STEPS}, threshold = 16 }}
channel = "{channel}"
batch = 16
fresh = 4
n_batches = {n * N_STEPS // 4}
threads = 1
log_every = 1
validate_every = 20
"""
    return text + training * bool(channel)


def start(tmp_path, text: str, *words: str) -> subprocess.Popen[str]:
    case = tmp_path / "case.toml"
    case.write_text(text)
    return subprocess.Popen(
        command(["run", case, "--out", tmp_path / "run", *words]),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_until(claim, timeout: float = 120) -> None:
    end = time.monotonic() + timeout
    while not claim():
        assert time.monotonic() < end, "nothing came of it"
        time.sleep(0.05)


def programs(tmp_path, side: str) -> list[int]:
    """Return the pids of a side without its launcher."""
    pids = heirs("SIMLAB_SIDE", f"{side} of {tmp_path / 'run'}")
    return [pid for pid in pids if "python" in executable(pid)]


def executable(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/exe")
    except OSError:  # gone
        return ""


def end_all(tmp_path, process: subprocess.Popen[str]) -> None:
    process.kill()
    for side in SIDES:
        end_heirs("SIMLAB_SIDE", f"{side} of {tmp_path / 'run'}")


@pytest.mark.slow
def test_a_stopped_solver_rank_is_replaced(tmp_path) -> None:
    process = start(tmp_path, case_of(N_SAMPLES), "-n", "2", "--patience", "1")
    beats = tmp_path / "run" / "logs"
    try:
        wait_until(lambda: len(list(beats.glob("solvers-*.beat"))) == 2)
        time.sleep(4)  # some beats, to know what is usual
        os.kill(max(programs(tmp_path, "solvers")), signal.SIGSTOP)
        _, errors = process.communicate(timeout=240)
    finally:
        end_all(tmp_path, process)
    assert process.returncode == 0, errors
    restarts = RunDirectory(tmp_path / "run").manifest()["restarts"]
    assert all("hung" in entry["reason"] for entry in restarts)
    assert {entry["side"] for entry in restarts} == {"solvers"}
    assert "so killed as hung" in errors
    store = SnapshotStore.open(tmp_path / "run" / "store")
    assert len(store.done()) == N_SAMPLES
    assert not store.verify(deep=True)


def resident(pids: list[int]) -> dict[int, float]:
    """Return the resident memory of some processes, MB."""
    found = {}
    for pid in pids:
        with suppress(OSError), open(f"/proc/{pid}/statm") as file:
            found[pid] = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    return found


def batches(tmp_path) -> int:
    path = tmp_path / "run" / "metrics.jsonl"
    return path.read_text().count('"kind": "train"') if path.exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize("channel", ["tail", "stream"])
def test_a_trainer_stopped_for_half_a_minute_costs_neither_data_nor_memory(
    tmp_path, channel
) -> None:
    """Limit of memory: 10 % above what each process held when the trainer was stopped."""
    seconds, n = 30, 700
    process = start(tmp_path, case_of(n, channel))
    out = tmp_path / "run"
    try:
        wait_until(lambda: batches(tmp_path) > 25)
        pids = [pid for side in SIDES for pid in programs(tmp_path, side)]
        (trainer,) = programs(tmp_path, "trainer")
        before = most = resident(pids)
        os.kill(trainer, signal.SIGSTOP)
        n_before, n_done = batches(tmp_path), len(SnapshotStore.open(out / "store").done())
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(0.5)
            most = {pid: max(held, resident([pid]).get(pid, 0)) for pid, held in most.items()}
        assert batches(tmp_path) == n_before  # it did stop
        assert len(SnapshotStore.open(out / "store").done()) > n_done + 5  # solvers did not
        os.kill(trainer, signal.SIGCONT)
        while process.poll() is None and trainer in programs(tmp_path, "trainer"):
            time.sleep(0.1)
            most = {pid: max(held, resident([pid]).get(pid, 0)) for pid, held in most.items()}
        _, errors = process.communicate(timeout=240)
    finally:
        end_all(tmp_path, process)
    assert process.returncode == 0, errors
    print({pid: (round(before[pid]), round(most[pid])) for pid in pids}, "MB")
    assert all(most[pid] < 1.1 * before[pid] for pid in pids)
    assert "restarts" not in RunDirectory(out).manifest()
    store = SnapshotStore.open(out / "store")
    assert len(store.done()) == n
    puts = [rest for kind, rest, _ in read_arrivals(out / "model" / "arrivals.log") if kind == "p"]
    assert sorted(puts) == sorted(
        f"{index} {step}" for index in store.ids("train").tolist() for step in range(N_STEPS)
    )
