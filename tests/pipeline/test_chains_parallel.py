"""Two chains at once: killed and resumed, relieved of their tails, of one mind about the solver."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from commands import ROOT, command, environment, simlab

from simlab.pipeline.order import Order
from simlab.store.store import SnapshotStore

CASE = """
[family]
kind = "darcy"
cells = {cells}
fields = "four_parameter"
[solver]
kind = "{solver}"
rtol = 1e-10
[campaign]
n = {n}
seed = 9157
order = "{order}"
"""


def write_case(directory: Path, cells=24, n=160, solver="cg_icc", order="greedy") -> Path:
    path = directory / "case.toml"
    path.write_text(CASE.format(cells=cells, n=n, solver=solver, order=order))
    return path


def solutions(store: SnapshotStore) -> dict[int, np.ndarray]:
    return {
        item.sample.index: np.asarray(item.outputs["u"])
        for name in ("train", "valid", "test")
        for item in store.split(name)
    }


def scripted(script: str, directory: Path, words, ranks: int) -> subprocess.Popen:
    """Start ``simlab`` by a script that changes it first."""
    path = directory / "script.py"
    path.write_text(script)
    line = command(words, ranks=ranks)
    line[line.index("-m") : line.index("simlab") + 1] = [str(path)]
    return subprocess.Popen(
        line,
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


SLOW = """
import time
from simlab.cli import main
from simlab.problems.darcy import Darcy

original = Darcy.assemble

def assemble(self, mu, state, step=0, previous=None):
    from simlab.core.comm import world
    time.sleep({seconds} if world().rank < {n_slow} else 0.0)
    return original(self, mu, state, step, previous)

Darcy.assemble = assemble
main()
"""


def slow(seconds: float, n_slow: int) -> str:
    return SLOW.format(seconds=seconds, n_slow=n_slow)


def test_kills_cost_one_sample_per_chain_and_the_order_stays(tmp_path) -> None:
    case, out = write_case(tmp_path), tmp_path / "run"
    done = simlab("generate", case, "--out", tmp_path / "whole", ranks=2)
    assert done.returncode == 0, done.stderr
    whole = Order.load(tmp_path / "whole" / "order.npz", np.arange(160))
    seen: set[int] = set()
    kills = 0
    while kills < 2:
        resume = ["--resume"] if out.exists() else []
        words = ["generate", case, "--out", out, *resume]
        process = scripted(slow(0.01, 2), tmp_path, words, ranks=2)
        goal, end = len(seen) + 20, time.monotonic() + 60
        while len(seen) < goal:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < end
            time.sleep(0.1)
            if (out / "store" / "campaign.json").exists():
                seen = SnapshotStore.open(out / "store").done()
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        kills += 1
        after = SnapshotStore.open(out / "store").done()
        assert seen <= after
        seen = after
    done = simlab("generate", case, "--out", out, "--resume", ranks=2)
    assert done.returncode == 0, done.stderr
    store = SnapshotStore.open(out / "store")
    assert store.is_complete()
    attempts = store.catalogue.done_attempts
    assert np.sum(attempts - 1) <= 2 * kills  # two chains: at most one sample each was under way
    order = Order.load(out / "order.npz", np.arange(160))
    np.testing.assert_array_equal(order.path, whole.path)
    solves = store.solves()
    assert all(order.place[index] == place for index, place in solves[["index", "order"]].tolist())
    assert set(solves["chain"].tolist()) == {0, 1}
    expected = solutions(SnapshotStore.open(tmp_path / "whole" / "store"))
    for index, values in solutions(store).items():
        scale = np.abs(expected[index]).max()
        np.testing.assert_allclose(values, expected[index], atol=1e-6 * scale, rtol=0)


@pytest.mark.parametrize(("ranks", "together"), [(2, 1), (4, 2)])
def test_a_slow_chain_is_relieved_of_its_tail(tmp_path, ranks, together) -> None:
    case, out = write_case(tmp_path, cells=12), tmp_path / "run"
    words = ["generate", case, "--out", out, "--set", f"campaign.ranks_per_group={together}"]
    process = scripted(slow(0.04, together), tmp_path, words, ranks=ranks)
    _, errors = process.communicate(timeout=90)
    assert process.returncode == 0, errors
    store = SnapshotStore.open(out / "store")
    assert store.is_complete()
    assert store.catalogue.done_attempts.tolist() == [1] * 160
    groups = json.loads((out / "manifest.json").read_text())["campaign"]["groups"]
    assert [facts["group"] for facts in groups] == [0, 1]
    assert sum(facts["done"] for facts in groups) == 160
    assert groups[1]["taken"] >= 20
    solves = np.sort(store.solves("train"), order="order")
    chains, places = solves["chain"], solves["order"]
    assert np.sum(chains == 1) > 0.7 * len(chains)
    first = solves[places < places.min() + len(places) // 2]  # the slow group's half
    assert first["chain"][0] == 0
    taken = np.flatnonzero(first["chain"] == 1)
    assert len(taken) >= 10
    runs = np.split(taken, np.flatnonzero(np.diff(taken) > 1) + 1)
    assert max(map(len, runs)) >= 10


def test_all_groups_use_the_solver_that_was_chosen(tmp_path) -> None:
    case = write_case(tmp_path, cells=30, n=40, solver="auto", order="auto")
    words = ["--set", "solver.pilot=3"]
    done = simlab("generate", case, "--out", tmp_path / "run", *words, ranks=2)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    chosen = manifest["decision"]["solvers"][0]["kind"]
    solves = np.sort(SnapshotStore.open(tmp_path / "run" / "store").solves(), order="order")
    assert solves["order"].tolist() == list(range(40))
    assert set(solves["chain"].tolist()) == {0, 1}
    assert len(set(solves["solver"][6:].tolist())) == 1  # three systems of each group's pilot
    assert chosen in manifest["campaign"]["reason"]
    words = ["--resume", "--dry-run"]
    again = simlab("generate", case, "--out", tmp_path / "run", *words, ranks=2)
    assert "greedy if the pilot picks" in again.stdout


def test_a_group_without_a_sample_ends_with_the_others(tmp_path) -> None:
    case = write_case(tmp_path, cells=8, n=1)
    done = simlab("generate", case, "--out", tmp_path / "run", ranks=3, timeout=60)
    assert done.returncode == 0, done.stderr
    assert SnapshotStore.open(tmp_path / "run" / "store").is_complete()


@pytest.mark.slow
def test_two_chains_take_at_most_six_tenths_of_the_time_of_one(tmp_path) -> None:
    """Darcy 100 x 100 with GMRES+ILU, medians of three pairs run in turn.

    CPU seconds of the busier rank say what two free cores would take; wall seconds count where
    there are two free cores.
    """
    case = write_case(tmp_path, cells=100, n=120, solver="gmres_ilu", order="sample")
    wall, cpu, alone = [], [], []
    for pair in range(3):
        seconds, busiest = {}, {}
        before = busy_cores()
        for ranks in (1, 2) if pair % 2 else (2, 1):
            out = tmp_path / f"run{pair}_{ranks}"
            done = simlab("generate", case, "--out", out, ranks=ranks)
            assert done.returncode == 0, done.stderr
            manifest = json.loads((out / "manifest.json").read_text())
            groups = manifest["campaign"]["groups"]
            busiest[ranks] = max(facts["root_cpu_seconds"] for facts in groups)
            seconds[ranks] = manifest["seconds"]["generate"]
        wall.append(seconds[2] / seconds[1])
        cpu.append(busiest[2] / busiest[1])
        alone.append(max(before, busy_cores()) < 0.1)
    sys.stdout.write(f"two chains over one: wall {wall}, CPU {cpu}, undisturbed {alone}\n")
    assert np.median(cpu) <= 0.6
    if all(alone):
        assert np.median(wall) <= 0.6


def busy_cores(seconds: float = 1.0) -> float:
    """Return how many cores all processes together use."""

    def idle() -> float:
        ticks = [int(word) for word in Path("/proc/stat").read_text().split()[1:9]]
        return (ticks[3] + ticks[4]) / os.sysconf("SC_CLK_TCK")

    first, begun = idle(), time.perf_counter()
    time.sleep(seconds)
    spent = time.perf_counter() - begun
    return (os.cpu_count() or 1) - (idle() - first) / spent
