"""A run survives the death of its solvers, of its trainer and of its supervisor."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import CASES, ROOT, command, environment

from simlab.core.errors import ConfigError, SimlabError
from simlab.core.runs import RunDirectory
from simlab.pipeline.processes import ProcessMark, end_heirs, heirs
from simlab.pipeline.supervisor import Side, refuse_if_supervised, supervising
from simlab.store.store import SnapshotStore

N_SAMPLES, N_BATCHES = 240, 120
SMALL = [
    "--set", "family.cells=24", "--set", f"campaign.n={N_SAMPLES}", "--set", "solver=fast",
    "--set", f"train.n_batches={N_BATCHES}", "--set", "train.operator.modes=4",
    "--set", "train.buffer.threshold=16", "--set", "train.checkpoint_seconds=0.3",
    "--set", "train.log_every=5",
]  # fmt: skip


def start(out: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(["run", CASES / "darcy_online.toml", "-n", "2", "--out", out, *SMALL, *words]),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def lines(out: Path, kind: str) -> list[dict]:
    path = out / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    found = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [line for line in found if line["kind"] == kind]


def wait_until(claim, timeout: float = 120) -> None:
    end = time.monotonic() + timeout
    while not claim():
        assert time.monotonic() < end, "nothing came of it"
        time.sleep(0.02)


def commands_of(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
    except OSError:
        return []


def those(out: Path, side: str) -> list[int]:
    return heirs("SIMLAB_SIDE", f"{side} of {out}")


def assert_whole(out: Path) -> dict:
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["state"] == "done"
    store = SnapshotStore.open(out / "store")
    assert store.is_complete()
    assert not store.verify(deep=True)
    assert sum(len(store.split(name)) for name in ("train", "valid", "test")) == N_SAMPLES
    assert lines(out, "train")[-1]["batch"] == N_BATCHES
    assert (out / "model" / "model.json").is_file()
    entry = json.loads((out / "evaluation.json").read_text())["fields"]["u"]
    assert entry["rel_l2"]["mean"] < 0.9
    assert not those(out, "solvers") + those(out, "trainer")
    return manifest


def kill_one_rank(out: Path) -> None:
    ranks = [pid for pid in those(out, "solvers") if "mpirun" not in commands_of(pid)[0]]
    os.kill(max(ranks), signal.SIGKILL)


def kill_trainer(out: Path) -> None:
    (trainer,) = (pid for pid in those(out, "trainer") if "train" in commands_of(pid))
    os.kill(trainer, signal.SIGKILL)


def test_each_side_is_started_again_and_what_outlived_its_supervisor_is_adopted(tmp_path) -> None:
    out = tmp_path / "run"
    processes = [start(out)]
    try:
        wait_until(lambda: lines(out, "campaign"))
        trainer = those(out, "trainer")
        kill_one_rank(out)
        wait_until(lambda: len(lines(out, "restart")) == 1)
        assert those(out, "trainer") == trainer  # went on
        wait_until(lambda: lines(out, "train"))
        kill_trainer(out)
        wait_until(lambda: len(lines(out, "restart")) == 2)
        n_lines = len(lines(out, "train"))
        wait_until(lambda: len(lines(out, "train")) > n_lines)
        processes[0].kill()
        processes[0].wait()
        solvers, trainer = those(out, "solvers"), those(out, "trainer")
        assert trainer
        n_lines = len(lines(out, "train"))
        processes.append(start(out, "--resume"))
        wait_until(lambda: lines(out, "adoption"))
        processes.append(start(out, "--resume"))
        assert "supervised by another" in processes[2].communicate(timeout=60)[1]
        assert processes[2].returncode == 2
        text, errors = processes[1].communicate(timeout=240)
    finally:
        for process in processes:
            process.kill()
        end_heirs("SIMLAB_SIDE", f"solvers of {out}")
        end_heirs("SIMLAB_SIDE", f"trainer of {out}")
    assert processes[1].returncode == 0, errors
    assert "report.html" in text
    manifest = assert_whole(out)
    assert [entry["side"] for entry in manifest["restarts"]] == ["solvers", "trainer"]
    assert [entry["number"] for entry in manifest["restarts"]] == [1, 1]
    assert manifest["restarts"][1]["code"] == -signal.SIGKILL
    assert [line["side"] for line in lines(out, "restart")] == ["solvers", "trainer"]
    adopted = {line["side"]: line["pid"] for line in lines(out, "adoption")}
    assert adopted["trainer"] in trainer
    assert adopted.get("solvers", 0) in [0, *solvers]
    # the adopted trainer was the only one: no batch of the time since was logged twice
    batches = [line["batch"] for line in lines(out, "train")][n_lines:]
    assert batches == sorted(set(batches))


# --- one side alone, with small programs in place of solvers


def side(run: RunDirectory, program: str, max_restarts: int = 3, **words: object) -> Side:
    command_ = [sys.executable, "-c", program]
    return Side(run, "solvers", "campaign", command_, dict(os.environ), max_restarts, **words)


def lived(one: Side, *, stop_after: float = 60) -> Side:
    one.begin()
    end = time.monotonic() + stop_after
    while not one.has_ended:
        assert time.monotonic() < end + 30
        one.look(stopping=time.monotonic() > end)
        time.sleep(0.01)
    return one


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    return RunDirectory.start(tmp_path / "run", {}, resume=False)


def test_a_side_that_ends_well_is_not_started_again(run) -> None:
    found = lived(side(run, "raise SystemExit(3)"))
    assert (found.code, found.failure, found.n_restarts) == (3, "", 0)


def test_restarts_are_counted_and_end(run) -> None:
    program = f"open({str(run.path / 'starts')!r}, 'a').write('x'); raise SystemExit(7)"
    found = lived(side(run, program, 2))
    assert (run.path / "starts").read_text() == "xxx"
    assert "exit code 7, after 2 restarts" in found.failure
    entries = run.manifest()["restarts"]
    assert [entry["number"] for entry in entries] == [1, 2]
    assert entries[1]["wait_s"] > entries[0]["wait_s"]  # no progress between


@pytest.mark.parametrize(
    ("program", "words", "n_restarts"),
    [
        ("raise SystemExit(2)", "no restart mends", 0),
        ("print('you ran as root'); raise SystemExit(1)", "set a variable", 0),
        ("print('error: no space'); raise SystemExit(1)", "for the same reason", 1),
    ],
)
def test_some_ends_are_final(run, program, words, n_restarts) -> None:
    def refusal(text: str) -> str:
        return "set a variable" if "as root" in text else ""

    found = lived(side(run, program, refusal=refusal))
    assert words in found.failure
    assert found.n_restarts == n_restarts


def test_a_stop_while_waiting_for_a_restart_is_no_failure(run) -> None:
    found = lived(side(run, "raise SystemExit(7)"), stop_after=0.4)
    assert found.has_ended
    assert (found.n_restarts, found.failure) == (1, "")
    assert run.manifest()["state"] == "stopped"


def test_what_is_left_of_an_earlier_start_is_killed(run) -> None:
    sleeper = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', '{}'])"
    sleeper = sleeper.format("import time; time.sleep(600)")
    first = lived(side(run, sleeper))
    label = f"solvers of {run.path}"
    assert first.code == 0
    (orphan,) = heirs("SIMLAB_SIDE", label)
    second = side(run, "pass")
    second.begin()
    assert orphan not in heirs("SIMLAB_SIDE", label)
    lived_on = time.monotonic() + 30
    while not second.has_ended and time.monotonic() < lived_on:
        second.look(stopping=False)
    assert second.code == 0


@pytest.mark.parametrize(
    ("section", "code"),
    [
        ({"state": "done"}, 0),
        ({"state": "done", "failed": 2}, 3),
        ({"state": "running"}, None),
        ({"state": "stopped"}, 0),
        ({"state": "failed", "error": "ConfigError: x"}, 2),
    ],
)
def test_how_an_adopted_process_ended_is_read_from_the_manifest(run, section, code) -> None:
    first = side(run, "import time; time.sleep(600)")
    first.begin()
    second = side(run, "raise SystemExit(5)", 0)
    second.begin()
    (pid,) = heirs("SIMLAB_SIDE", f"solvers of {run.path}")
    run.update(campaign=section)
    first.kill()
    while not second.has_ended:
        second.look(stopping=False)
    assert second.code == code
    assert bool(second.failure) == (section["state"] != "done")
    assert f'"pid": {pid}' in run.metrics.read_text()


def test_a_number_given_again_is_not_the_same_process() -> None:
    mark = ProcessMark.of(os.getpid())
    assert mark.is_alive()
    assert not ProcessMark(mark.pid, mark.ticks - 1, mark.boot).is_alive()
    assert not ProcessMark(mark.pid, mark.ticks, "another boot").is_alive()
    ended = subprocess.Popen([sys.executable, "-c", "pass"])
    mark = ProcessMark.of(ended.pid)
    while mark.is_alive():
        time.sleep(0.01)  # ends as a zombie, which does not count as alive
    ended.wait()
    assert ProcessMark.read({"pid": "?"}) is None


def test_one_supervisor_at_a_time_and_fresh_spares_the_living(run) -> None:
    with supervising(run):
        with pytest.raises(ConfigError, match="supervised by another"), supervising(run):
            pass
        with pytest.raises(SimlabError, match="supervised by another"):
            refuse_if_supervised(run.path, fresh=False)
    one = side(run, "import time; time.sleep(600)")
    one.begin()
    try:
        refuse_if_supervised(run.path, fresh=False)
        with pytest.raises(ConfigError, match="--resume adopts them"):
            refuse_if_supervised(run.path, fresh=True)
    finally:
        one.kill()
