"""Runs that go wrong end: all of them, with the reason, and nobody works on behind their backs."""

from __future__ import annotations

import errno
import os
import shutil
import sys

import pytest
from commands import simlab
from test_campaign import write_case

from simlab.core.errors import ConfigError, StoreError
from simlab.core.runs import RunDirectory, metric_lines
from simlab.pipeline import online
from simlab.pipeline.case import load_case
from simlab.pipeline.processes import heirs
from simlab.pipeline.supervisor import Side, refuse_if_supervised, supervising
from simlab.pipeline.training import train_run

HOPELESS = ["--set", "solver.max_iterations=2", "--set", "campaign.max_failures=3"]
SLEEPER = "import time; time.sleep(600)"


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    return RunDirectory.start(tmp_path / "run", {}, resume=False)


def sleeping(run: RunDirectory, name: str, section: str) -> Side:
    return Side(run, name, section, [sys.executable, "-c", SLEEPER], dict(os.environ), 0)


def test_too_many_failures_are_not_mended_by_a_restart(tmp_path) -> None:
    """All samples are tried within a second, so that the first count is the last."""
    case, out = write_case(tmp_path, n=9), tmp_path / "run"
    done = simlab("run", case, "--out", out, "-n", "1", *HOPELESS)
    assert done.returncode == 1, done.stderr
    assert "9 samples failed, more than campaign.max_failures = 3" in done.stderr
    manifest = RunDirectory.open(out).manifest()
    assert "restarts" not in manifest
    assert manifest["state"] == manifest["campaign"]["state"] == "failed"
    again = simlab("generate", case, "--out", out, "--resume", *HOPELESS)
    assert again.returncode == 3, again.stderr  # nothing is left to do, and they failed still
    manifest = RunDirectory.open(out).manifest()
    assert manifest["campaign"]["state"] == "done"
    assert "error" not in manifest["campaign"]


def test_what_simlab_run_keeps_at_work_is_left_alone(tmp_path) -> None:
    case, out = write_case(tmp_path), tmp_path / "run"
    case.write_text(case.read_text() + '[train]\noperator = { kind = "fno", modes = 4 }\n')
    run = RunDirectory.start(out, load_case(case).tables(), resume=False)
    sides = [sleeping(run, "solvers", "campaign"), sleeping(run, "trainer", "train")]
    try:
        with supervising(run):
            for side in sides:
                side.begin()
            found = [simlab("generate", case, "--out", out, "--fresh")]
        found += [simlab("train", case, "--out", out, "--resume")]
    finally:
        for side in sides:
            side.kill()
    assert [done.returncode for done in found] == [2, 2], [done.stderr for done in found]
    assert "supervised by another" in found[0].stderr
    assert "still work on" in found[1].stderr
    assert run.manifest()["processes"].keys() == {"solvers", "trainer"}


@pytest.mark.parametrize("is_asked", [True, False])
def test_a_side_that_is_ended_at_once_counts_as_stopped(run, is_asked) -> None:
    """By its own supervisor, that is: another end while stopping is a failure."""
    one = sleeping(run, "solvers", "campaign")
    one.begin()
    one.terminate() if is_asked else os.kill(run.manifest()["processes"]["solvers"]["pid"], 9)
    while not one.has_ended:
        one.look(stopping=True)
    assert run.manifest()["state"] == ("stopped" if is_asked else "running")
    assert ("SIGKILL while stopping" in one.failure) != is_asked


def test_another_name_of_a_directory_is_the_same_run(run) -> None:
    one = sleeping(run, "solvers", "campaign")
    with supervising(run):
        one.begin()
    (run.path.parent / "link").symlink_to(run.path)
    try:
        for name in (run.path / ".." / "run", run.path.parent / "link"):
            with pytest.raises(ConfigError, match="still work on"):
                refuse_if_supervised(name, fresh=True)
    finally:
        one.kill()


def test_a_supervisor_that_cannot_write_leaves_no_side_behind(run, monkeypatch) -> None:
    programs = {"solvers": "raise SystemExit(7)", "trainer": SLEEPER}

    def made(run: RunDirectory, name: str, section: str, *_: object, **words: object) -> Side:
        command = [sys.executable, "-c", programs[name]]
        return Side(run, name, section, command, dict(os.environ), 3)

    def update(self: RunDirectory, **entries: object) -> None:
        if "restarts" in entries:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(self, **entries)

    original = RunDirectory.update
    monkeypatch.setattr(online, "Side", made)
    monkeypatch.setattr(RunDirectory, "update", update)
    with pytest.raises(OSError, match="No space left"):
        online.supervise(run, n_ranks=1, n_samples=3, n_batches=5)
    assert not heirs("SIMLAB_SIDE", f"trainer of {run.path}")


def test_a_full_disk_is_an_error_in_one_line_and_leaves_no_draft(run, monkeypatch) -> None:
    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = run.manifest()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match=r"cannot write .*manifest.json: No space left"):
        run.update(campaign={"state": "running"})
    assert run.manifest() == before
    assert not list(run.path.glob("*.part"))


def test_a_directory_that_cannot_be_written_to_is_wrong_input(run) -> None:
    (run.path / ".supervisor.lock").mkdir()  # which even root cannot write to
    with pytest.raises(ConfigError, match="cannot write to"), supervising(run):
        pass


def test_a_torn_line_hides_no_other_and_ends_no_run(run) -> None:
    run.log_metric("campaign", done=3, failed=0)
    with run.metrics.open("a") as file:
        file.write('{"kind": "campai{"kind": "train", "batch": 3}\n7\n')
    run.log_metric("train", batch=5)
    assert [line["kind"] for line in metric_lines(run.metrics.read_bytes())] == [
        "campaign",
        "train",
    ]
    with online._Watch(run, 4, 0) as watch:
        with run.metrics.open("a") as file:
            file.write('{"kind": "cam\n')
        run.log_metric("campaign", done=4, failed=0)
        assert watch.look() == {"campaign"}
        assert not watch.look()


def test_a_fresh_start_keeps_the_locks_and_a_kill_in_it_leaves_a_run(run, monkeypatch) -> None:
    """Two supervisors that begin afresh at once must still meet at one lock."""

    def kill(path: object) -> None:
        raise KeyboardInterrupt

    with supervising(run):
        (run.path / "store").mkdir()
        with monkeypatch.context() as patched:
            patched.setattr(shutil, "rmtree", kill)
            with pytest.raises(KeyboardInterrupt):
                RunDirectory.start(run.path, {"n": 2}, resume=False, fresh=True)
        RunDirectory.start(run.path, {"n": 3}, resume=False, fresh=True)
        assert run.manifest()["case"] == {"n": 3}
        assert not run.store.exists()
        with pytest.raises(ConfigError, match="supervised by another"), supervising(run):
            pass


def test_a_training_that_is_refused_changes_nothing(tmp_path) -> None:
    case, out = write_case(tmp_path), tmp_path / "run"
    case.write_text(case.read_text() + '[train]\noperator = { kind = "fno", modes = 4 }\n')
    run = RunDirectory.start(out, load_case(case).tables(), resume=False)
    run.model.mkdir()
    before = run.manifest()
    other = load_case(case, ["train.batch=7"])
    with pytest.raises(ConfigError, match="holds a training already"):
        train_run(other, run)
    with run.alone("trainer", ""), pytest.raises(ConfigError, match="another process is training"):
        train_run(other, run, resume=True)
    done = simlab("train", case, "--out", out, "--resume", "--set", "train.batch=7")
    assert done.returncode == 2
    assert "train.batch: 8 -> 7: changed since the training began" in done.stderr
    assert run.manifest() == before
