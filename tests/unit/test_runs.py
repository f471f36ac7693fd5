"""Run directories: started once, resumed only as the same case, safe against other processes."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys

import pytest

from simlab.core.errors import ConfigError, StoreError
from simlab.core.runs import RunDirectory, publish
from simlab.pipeline.case import completed

CASE = {"family": {"kind": "darcy", "cells": 8}, "campaign": {"n": 4}}


def start(path, **options):
    return RunDirectory.start(path, CASE, **({"resume": False} | options))


def test_a_new_run_holds_manifest_and_resolved_case(tmp_path) -> None:
    run = start(tmp_path / "r", seed=5)
    manifest = run.manifest()
    assert manifest["case"] == CASE
    assert manifest["state"] == "running"
    assert manifest["seed"] == 5
    assert manifest["versions"]["numpy"]
    assert "cells = 8" in (tmp_path / "r" / "case.toml").read_text()


def test_a_second_start_needs_a_word(tmp_path) -> None:
    run = start(tmp_path)
    (tmp_path / "mark").touch()
    with pytest.raises(ConfigError, match="--resume goes on with it"):
        start(tmp_path)
    assert start(tmp_path, resume=True).started == run.started
    start(tmp_path, fresh=True)
    assert not (tmp_path / "mark").exists()


def test_a_changed_case_is_named(tmp_path) -> None:
    start(tmp_path)
    other = {"family": {"kind": "darcy", "cells": 16}, "campaign": {"n": 4}}
    with pytest.raises(ConfigError, match=r"family\.cells: 8 -> 16"):
        RunDirectory.start(tmp_path, other, resume=True)


def test_fresh_never_deletes_a_directory_that_is_not_a_run(tmp_path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="is not a run"):
        start(tmp_path, fresh=True)
    assert (tmp_path / "thesis.tex").exists()


def test_opening_what_is_not_a_run_is_refused(tmp_path) -> None:
    with pytest.raises(StoreError, match="not a run directory"):
        RunDirectory.open(tmp_path)


def test_phases_give_the_state(tmp_path) -> None:
    run = start(tmp_path)
    with run.phase("campaign") as facts:
        facts["n"] = 3
        assert run.manifest()["state"] == "running"
    manifest = run.manifest()
    assert manifest["state"] == "done"
    assert manifest["campaign"] == {"state": "done", "n": 3}
    assert manifest["seconds"]["campaign"] >= 0
    with pytest.raises(ZeroDivisionError), run.phase("train"):
        _ = 1 / 0
    manifest = run.manifest()
    assert manifest["state"] == "failed"
    assert "ZeroDivisionError" in manifest["train"]["error"]


def _count(path, name) -> None:
    run = RunDirectory.open(path)
    for i in range(20):
        run.update(**{name: {"count": i + 1}})
        run.log_metric("count", name=name, value=i, seconds=0.0)


def test_processes_do_not_lose_each_others_entries(tmp_path) -> None:
    run = start(tmp_path)
    context = multiprocessing.get_context("spawn")
    names = ["left", "right", "middle"]
    workers = [context.Process(target=_count, args=(tmp_path, name)) for name in names]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    manifest = run.manifest()
    assert [manifest[name]["count"] for name in names] == [20, 20, 20]
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert len(lines) == 60


def test_stop_is_asked_for_and_forgotten_on_resume(tmp_path) -> None:
    run = start(tmp_path)
    assert not run.stop_requested()
    run.request_stop()
    assert run.stop_requested()
    start(tmp_path, resume=True)
    assert not run.stop_requested()


def test_publish_leaves_the_old_file_when_writing_fails(tmp_path, monkeypatch) -> None:
    path = tmp_path / "x.json"
    publish(path, "old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        publish(path, "new")
    assert path.read_text() == "old"


def test_tasks_that_start_one_run_at_the_same_moment_all_join_it(tmp_path) -> None:
    code = (
        "import sys; from simlab.core.runs import RunDirectory as R\n"
        "run = R.start(sys.argv[1], {'campaign': {'n': 5}}, resume=True)\n"
        "run.store.mkdir(exist_ok=True)\n"
        "run.update(campaign={sys.argv[2]: 'here'})\n"
    )
    run = tmp_path / "array"
    tasks = [subprocess.Popen([sys.executable, "-c", code, str(run), f"task{i}"]) for i in range(6)]
    assert [task.wait() for task in tasks] == [0] * 6
    joined = RunDirectory.open(run).manifest()["campaign"]
    assert set(joined) == {f"task{i}" for i in range(6)}


def test_a_directory_with_other_things_in_it_is_refused(tmp_path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="not a run"):
        RunDirectory.start(tmp_path, {"campaign": {"n": 5}}, resume=True, fresh=True)
    assert (tmp_path / "thesis.tex").exists()


def test_a_run_begun_before_there_was_a_key_goes_on(tmp_path) -> None:
    from simlab.pipeline.case import load_case

    case = tmp_path / "case.toml"
    case.write_text('[family]\nkind = "heat"\ncells = 4\n[campaign]\nn = 3\n[train]\nbatch = 2\n')
    tables = load_case(case).tables()
    older = json.loads(json.dumps(tables))
    del older["train"]["channel"], older["campaign"]["order"], older["train"]["fresh"]
    RunDirectory.start(tmp_path / "run", older, resume=False)
    RunDirectory.start(tmp_path / "run", tables, resume=True, complete=completed)
    tables["train"]["batch"] = 4
    with pytest.raises(ConfigError, match=r"train\.batch: 2 -> 4"):
        RunDirectory.start(tmp_path / "run", tables, resume=True, complete=completed)
