"""Campaigns: any number of ranks gives the same data; kills, failures and stops lose nothing."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from commands import ROOT, command, environment, simlab

from simlab.pipeline.case import load_case
from simlab.store.store import SnapshotStore

CASE = """
[family]
kind = "darcy"
cells = {cells}
[solver]
kind = "{solver}"
rtol = 1e-10
[campaign]
n = {n}
seed = 9157
"""


def write_case(directory: Path, cells: int = 12, n: int = 20, solver: str = "cg_icc") -> Path:
    path = directory / "case.toml"
    path.write_text(CASE.format(cells=cells, n=n, solver=solver))
    return path


def solutions(store: SnapshotStore) -> dict[int, np.ndarray]:
    found = {}
    for name in ("train", "valid", "test"):
        for item in store.split(name):
            assert item.sample.index not in found
            found[item.sample.index] = np.asarray(item.outputs["u"])
    return found


@pytest.fixture(scope="module")
def serial(tmp_path_factory) -> tuple[Path, dict[int, np.ndarray]]:
    directory = tmp_path_factory.mktemp("serial")
    case = write_case(directory)
    done = simlab("generate", case, "--out", directory / "run")
    assert done.returncode == 0, done.stderr
    return case, solutions(SnapshotStore.open(directory / "run" / "store"))


@pytest.mark.parametrize(
    ("ranks", "words"),
    [(2, []), (3, []), (2, ["--set", "campaign.ranks_per_group=2"])],
)
def test_any_number_of_ranks_gives_the_same_data(serial, tmp_path, ranks, words) -> None:
    case, expected = serial
    out = tmp_path / "run"
    done = simlab("generate", case, "--out", out, *words, ranks=ranks)
    assert done.returncode == 0, done.stderr
    store = SnapshotStore.open(out / "store")
    assert store.is_complete()
    assert not store.verify(deep=True)
    found = solutions(store)
    assert sorted(found) == sorted(expected) == list(range(20))
    for index, values in found.items():
        scale = np.abs(expected[index]).max()
        np.testing.assert_allclose(values, expected[index], atol=1e-6 * scale, rtol=0)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["state"] == "done"
    assert manifest["campaign"]["done"] == 20
    assert manifest["campaign"]["worst_true_relres"] <= 1e-10


def test_shards_of_a_job_array_fill_one_store_between_them(serial, tmp_path) -> None:
    case, expected = serial
    out = tmp_path / "run"
    for part in ("0/3", "2/3", "1/3", "1/3"):  # a part twice: idempotent
        done = simlab("generate", case, "--out", out, "--shard", part)
        assert done.returncode == 0, done.stderr
    store = SnapshotStore.open(out / "store")
    assert store.is_complete()
    assert sorted(solutions(store)) == sorted(expected)


def test_petsc_words_after_the_dashes_reach_the_solver(tmp_path) -> None:
    case = write_case(tmp_path, n=2, solver="cg_icc")
    done = simlab("generate", case, "--out", tmp_path / "run", "--", "-ksp_converged_reason")
    assert done.returncode == 0, done.stderr
    assert "converged due to CONVERGED_RTOL" in done.stdout


def test_twenty_kills_lose_nothing_and_repeat_nothing(tmp_path) -> None:
    n, case = 300, write_case(tmp_path, cells=96, n=300)
    dice = random.Random(2203)
    kills = rounds = 0
    while kills < 20:  # a campaign that ends before it could be killed often enough: another one
        rounds += 1
        kills += killed_campaign(case, tmp_path / f"run{rounds}", dice, 20 - kills)
        store = SnapshotStore.open(tmp_path / f"run{rounds}" / "store")
        assert store.is_complete()
        assert not store.verify(deep=True)
        assert sorted(solutions(store)) == list(range(n))
        assert not list(store.path.rglob("*.part"))


def killed_campaign(case: Path, out: Path, dice: random.Random, at_most: int) -> int:
    """Run a campaign to its end, killed up to so many times, and return how often it was."""
    kills = 0
    acknowledged: set[int] = set()
    while True:
        process = subprocess.Popen(
            command(["generate", case, "--out", out, *(["--resume"] if out.exists() else [])]),
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            process.wait(0.9 + 1.1 * dice.random() if kills < at_most else 120)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
            if (out / "store" / "campaign.json").exists():
                done = SnapshotStore.open(out / "store").done()
                assert acknowledged <= done
                acknowledged = done
            continue
        assert process.returncode == 0, process.stderr.read().decode()
        return kills


def test_a_stop_file_ends_after_the_sample_at_hand_and_resume_goes_on(tmp_path) -> None:
    case = write_case(tmp_path, cells=64, n=1000)
    out = tmp_path / "run"
    process = subprocess.Popen(
        command(["generate", case, "--out", out], ranks=2),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    while not list((out / "store" / "data" / "valid").glob("*.h5")):
        time.sleep(0.05)
        assert process.poll() is None
    (out / "STOP").touch()
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "--resume goes on" in text
    assert json.loads((out / "manifest.json").read_text())["state"] == "stopped"
    store = SnapshotStore.open(out / "store")
    assert 0 < len(store.done()) < 1000
    assert not store.verify(deep=True)


def scripted(
    script: Path, case: Path, out: Path, *words: str, ranks: int
) -> subprocess.CompletedProcess[str]:
    """Run ``simlab generate`` by a script that changes it first."""
    line = command(["generate", case, "--out", out, *words], ranks=ranks)
    line[line.index("-m") : line.index("simlab") + 1] = [str(script)]
    return subprocess.run(
        line, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=90, check=False
    )


FAILING_RANK = """
import sys
from simlab.cli import main
from simlab.problems.darcy import Darcy

original = Darcy.assemble

def assemble(self, mu, state, step=0, previous=None):
    from simlab.core.comm import world
    if mu.index >= 8 and world().rank == 1:
        open({mark!r}, "w").close()
        raise RuntimeError("the cosmic ray")
    return original(self, mu, state, step, previous)

Darcy.assemble = assemble
main()
"""


def test_a_rank_that_raises_ends_the_job_within_seconds(tmp_path) -> None:
    case = write_case(tmp_path, cells=48, n=100000, solver="cg_icc")
    script, mark = tmp_path / "fail.py", tmp_path / "raised"
    script.write_text(FAILING_RANK.format(mark=str(mark)))
    done = scripted(script, case, tmp_path / "run", ranks=2)
    assert time.time() - mark.stat().st_mtime < 5
    assert done.returncode != 0
    assert "the cosmic ray" in done.stderr
    assert "rank 1" in done.stderr


FAILING_SAMPLE = FAILING_RANK.replace(
    """    from simlab.core.comm import world
    if mu.index >= 8 and world().rank == 1:
        open({mark!r}, "w").close()
        raise RuntimeError("the cosmic ray")
    return original(self, mu, state, step, previous)
""",
    """    system = original(self, mu, state, step, previous)
    if mu.index in (3, 7):
        system.b.set(float("nan"))
    return system
""",
)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_failed_sample_is_recorded_and_skipped(tmp_path, ranks) -> None:
    case = write_case(tmp_path, n=12, solver="cg_icc")
    script = tmp_path / "fail.py"
    script.write_text(FAILING_SAMPLE)
    together = ["--set", f"campaign.ranks_per_group={ranks}"]
    done = scripted(script, case, tmp_path / "run", *together, ranks=ranks)
    assert done.returncode == 3, done.stderr
    store = SnapshotStore.open(tmp_path / "run" / "store")
    assert sorted(map(int, store.failed())) == [3, 7]
    assert sorted(solutions(store)) == [i for i in range(12) if i not in (3, 7)]
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert [entry["index"] for entry in manifest["campaign"]["failures"]] == [3, 7]
    assert "finite" in manifest["campaign"]["failures"][0]["reason"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_sample_that_fails_at_once_is_drawn_anew(tmp_path, ranks) -> None:
    """Sample 3 fails as drawn first, sample 7 however it is drawn."""
    case = write_case(tmp_path, n=12, solver="cg_icc")
    script = tmp_path / "fail.py"
    fails = "(mu.index == 3 and mu.seed == 9157) or mu.index == 7"
    script.write_text(FAILING_SAMPLE.replace("mu.index in (3, 7)", fails))
    words = ["--set", f"campaign.ranks_per_group={ranks}", "--set", "campaign.redraws=2"]
    done = scripted(script, case, tmp_path / "run", *words, ranks=ranks)
    assert done.returncode == 3, done.stderr
    store = SnapshotStore.open(tmp_path / "run" / "store")
    assert sorted(map(int, store.failed())) == [7]
    assert sorted(solutions(store)) == [i for i in range(12) if i != 7]
    assert not store.verify(deep=True)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["campaign"]["redrawn"] == 3
    assert [entry["index"] for entry in manifest["campaign"]["failures"]] == [7]
    samples = {t.sample.index: t.sample for s in ("train", "valid", "test") for t in store.split(s)}
    space = load_case(case).family.space
    assert samples[3].seed != 9157  # and what it says of itself makes it again
    for index in (3, 4):
        again = space.sample(1, samples[index].seed, index)[0].fields
        for name, values in samples[index].fields.items():
            assert np.array_equal(values, again[name].astype(np.float32))


def test_redraws_need_a_sampler_that_draws_again(tmp_path) -> None:
    case = write_case(tmp_path)
    words = ["--set", "campaign.redraws=1", "--set", 'campaign.sampler={kind="breed"}']
    done = simlab("generate", case, "--out", tmp_path / "run", *words)
    assert done.returncode == 2
    assert "leave redraws = 0" in done.stderr
    assert not (tmp_path / "run").exists()
