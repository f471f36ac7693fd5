"""Other people's solvers: a few lines send their steps to a store, whatever happens to them."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from petsc4py import PETSc

import numpy as np
import pytest

from simlab.client import Client, environment_of
from simlab.core.errors import ConfigError, SchemaError, StoreError
from simlab.core.reports import Provenance
from simlab.store.schema import FieldSpec
from simlab.store.store import SnapshotStore

EXAMPLE = Path(__file__).parents[2] / "examples" / "heat_client.py"
SEED = 7151
TIMES = (0.5, 1.0, 1.5, 2.0)
X = np.linspace(0.0, 1.0, 6)
MU = {"mu": 0.3}


def value(traj, step):
    return np.sin(3 * X + traj) * (step + 1)


def client(path, traj=0, parameters=MU, n=1, **more):
    return Client(path, traj, parameters, n=n, seed=SEED, **more)


def run(path, traj=0, stop_at=4, fields=None, begin_at=None, **more):
    """Compute one trajectory from where the store is; return the step it began at."""
    with client(path, traj, **more) as c:
        c.declare({"u": "K"}, {"x": X}, TIMES)
        begun = c.resume_step
        for step in range(begun if begin_at is None else begin_at, stop_at):
            c.send(step, TIMES[step], fields(step) if fields else {"u": value(traj, step)})
    return begun


def stored(path):
    store = SnapshotStore.open(path)
    found = {}
    for name in store.fractions:
        for trajectory in store.split(name):
            found[trajectory.sample.index] = trajectory
    return store, found


def test_a_whole_campaign_is_sealed_after_its_last_trajectory(tmp_path):
    path = tmp_path / "s"
    for traj in (2, 0, 1):
        assert not list(tmp_path.glob("s/data/*/*.h5"))
        run(path, traj, n=3, parameters={"mu": 0.1 * traj})
    store, found = stored(path)
    assert store.verify(deep=True) == []
    assert store.status().n_segments == 0
    for traj in range(3):
        assert found[traj].sample.parameters == {"mu": 0.1 * traj}
        expected = np.stack([value(traj, step) for step in range(4)]).astype(np.float32)
        np.testing.assert_array_equal(found[traj].outputs["u"], expected)


def test_a_long_campaign_is_sealed_as_it_goes(tmp_path, monkeypatch):
    """Every client looks at all segments, so they must not become ever more."""
    monkeypatch.setattr("simlab.store.seal._MAX_BATCH", 5)
    n = 14
    run(tmp_path / "s", 0, n=n, stop_at=2)  # left: its segment is needed
    with pytest.raises(RuntimeError):
        run(tmp_path / "s", 1, n=n, fields=breaks_with(RuntimeError("no luck")))
    for traj in range(2, n):
        run(tmp_path / "s", traj, n=n)
        store, found = stored(tmp_path / "s")
        assert store.verify(deep=True) == []
        assert store.status().n_segments <= 5
        assert len(found) > traj - 6
    assert store.failed() == {1: "RuntimeError: no luck"}
    assert run(tmp_path / "s", 0, n=n) == 2
    store, found = stored(tmp_path / "s")
    assert store.verify(deep=True) == []
    assert store.status().n_segments == 0
    for traj in (0, *range(2, n)):
        expected = np.stack([value(traj, step) for step in range(4)]).astype(np.float32)
        np.testing.assert_array_equal(found[traj].outputs["u"], expected)


def test_a_full_disk_while_others_are_sealed_is_not_this_client_s_fault(tmp_path, monkeypatch):
    monkeypatch.setattr("simlab.store.seal._MAX_BATCH", 2)
    with monkeypatch.context() as patch:

        def refuse(*_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        patch.setattr("simlab.store.files.rename", refuse)
        for traj in range(3):
            run(tmp_path, traj, n=4)
    run(tmp_path, 3, n=4)
    store, found = stored(tmp_path)
    assert store.verify(deep=True) == []
    assert set(found) == set(range(4))


def test_complex_values_are_refused(tmp_path):
    with pytest.raises(SchemaError, match="real and imaginary part"):
        run(tmp_path, fields=lambda step: {"u": 1j * X})


def test_an_attempt_that_was_left_goes_on_where_it_was(tmp_path):
    solve = Provenance(iterations=17, solver="cg+icc")
    with client(tmp_path) as c:
        c.declare({"u": "K"}, {"x": X}, TIMES)
        for step in range(3):
            c.send(step, TIMES[step], {"u": value(0, step)}, solve=solve)
    assert client(tmp_path).resume_step == 3
    assert run(tmp_path) == 3
    store, found = stored(tmp_path)
    assert found[0].outputs["u"].shape == (4, 6)
    assert store.solves()["iterations"].tolist() == [17, 17, 17, -1]
    assert store.solves()["solver"][0] == "cg+icc"
    done = client(tmp_path)
    assert done.is_done
    assert run(tmp_path) == 4
    assert store.verify(deep=True) == []


def test_steps_that_are_there_are_passed_over_and_keep_their_values(tmp_path):
    run(tmp_path, stop_at=2)
    run(tmp_path, fields=lambda step: {"u": value(5, step)}, begin_at=0)
    _, found = stored(tmp_path)
    expected = [value(0, 0), value(0, 1), value(5, 2), value(5, 3)]
    np.testing.assert_array_equal(found[0].outputs["u"], np.float32(expected))


def test_another_trajectory_under_the_same_number_begins_at_nothing(tmp_path):
    run(tmp_path, stop_at=2)
    assert run(tmp_path, parameters={"mu": 0.4}, stop_at=3) == 0
    assert not stored(tmp_path)[1]
    source = {"k": np.linspace(1, 2, 6)}
    other = tmp_path / "inputs"
    for factor, expected in ((1.0, 0), (1.0, 2), (2.0, 0)):
        with client(other) as c:
            c.declare({"u": "K"}, {"x": X}, TIMES, inputs={"k": factor * source["k"]})
            assert c.resume_step == expected
            for step in range(c.resume_step, 2):
                c.send(step, TIMES[step], {"u": value(0, step)})
    with client(other) as c:
        c.declare({"u": "K"}, {"x": X}, TIMES, inputs={"k": 2.0 * source["k"]})
        for step in range(4):
            c.send(step, TIMES[step], {"u": value(0, step)})
    np.testing.assert_allclose(stored(other)[1][0].sample.fields["k"], 2 * source["k"], rtol=1e-6)


def breaks_with(error):
    def fields(step):
        if step == 1:
            raise error
        return {"u": value(0, step)}

    return fields


def test_an_exception_fails_the_trajectory_with_its_text(tmp_path):
    with pytest.raises(ZeroDivisionError):
        run(tmp_path, fields=breaks_with(ZeroDivisionError("no pivot")))
    store = SnapshotStore.open(tmp_path)
    assert store.failed() == {0: "ZeroDivisionError: no pivot"}
    assert run(tmp_path) == 0  # what failed begins at nothing
    assert store.done() == {0}


def test_an_interrupt_does_not(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, fields=breaks_with(KeyboardInterrupt()))
    assert SnapshotStore.open(tmp_path).failed() == {}
    assert run(tmp_path) == 1


def test_two_at_once_are_refused(tmp_path):
    with client(tmp_path) as c:
        c.declare({"u": "K"}, {"x": X}, TIMES)
        c.send(0, TIMES[0], {"u": value(0, 0)})
        with pytest.raises(StoreError, match="being written"):
            client(tmp_path)


def test_mistakes_are_named(tmp_path, monkeypatch):
    for name in environment_of(tmp_path, 0, MU, n=1, seed=SEED):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SIMLAB_N", "many")
    with pytest.raises(ConfigError) as caught:
        Client.from_env()
    assert len(caught.value.faults) == 4
    assert "'many'" in str(caught.value)
    with pytest.raises(ConfigError, match="0 to 0"):
        client(tmp_path, 3)
    with pytest.raises(SchemaError, match="declare"):
        client(tmp_path).send(0, 0.5, {"u": X})
    for wrong in ({"v": X}, {"u": X[:-1]}, {"u": np.nan * X}):
        with pytest.raises(SchemaError):
            run(tmp_path / "b", fields=lambda _, wrong=wrong: wrong)
    with client(tmp_path / "b") as c, pytest.raises(ConfigError, match="times"):
        c.declare({"u": "K"}, {"x": X}, TIMES[:-1])
    with pytest.raises(ConfigError, match="seed"):
        Client(tmp_path / "b", 0, MU, n=1, seed=SEED + 1)


def test_vectors_of_petsc_come_in_the_order_of_the_grid(tmp_path):
    boxes = PETSc.DMDA().create([4, 3], dof=2, comm=PETSc.COMM_SELF, setup=True)
    vec = boxes.createGlobalVec()
    view = boxes.getVecArray(vec)
    i, j = np.meshgrid(np.arange(4), np.arange(3), indexing="ij")
    view[:, :, 0], view[:, :, 1] = 10 * i + j, -(10 * i + j)
    rows = PETSc.Vec().createWithArray(np.arange(12.0), comm=PETSc.COMM_SELF)
    with client(tmp_path) as c:
        fields = (FieldSpec("q", order=1), FieldSpec("p"))
        c.declare(fields, {"x": np.arange(4), "y": np.arange(3)}, layout={"q": boxes})
        c.send(0, 0.0, {"p": rows, "q": vec})
    found = stored(tmp_path)[1][0].outputs
    np.testing.assert_array_equal(found["q"][0], np.stack([10 * i + j, -(10 * i + j)], axis=-1))
    np.testing.assert_array_equal(found["p"][0], np.arange(12.0).reshape(4, 3))


def start(path, traj, parameters, *words):
    env = os.environ | environment_of(path, traj, parameters, n=2, seed=SEED)
    return subprocess.Popen([sys.executable, EXAMPLE, *words], env=env)


def wait_for_steps(path, n):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if (path / "campaign.json").is_file():
            store = SnapshotStore.open(path)
            store.refresh()
            runs = [r for s in store.inflight.segments.values() for r in s.runs.values()]
            if any(run.n_steps >= n for run in runs):
                return
        time.sleep(0.02)
    raise AssertionError(f"no {n} steps in {path}")


def test_the_example_is_killed_and_started_again(tmp_path):
    """Twice killed, the store ends the same as that of a run nobody disturbed."""
    words = ("--steps", "12", "--cells", "16")
    hot, cold = {"left": 400, "right": 150}, {"left": 200, "right": 350}
    killed, calm = tmp_path / "killed", tmp_path / "calm"
    for n in (3, 6):
        process = start(killed, 0, hot, *words, "--pause", "0.1")
        wait_for_steps(killed, n)
        process.send_signal(signal.SIGKILL)
        process.wait()
    together = [start(killed, 0, hot, *words), start(killed, 1, cold, *words)]
    assert [process.wait(60) for process in together] == [0, 0]
    for traj, parameters in enumerate((hot, cold)):
        assert start(calm, traj, parameters, *words).wait(60) == 0
    store, found = stored(killed)
    assert store.verify(deep=True) == []
    assert store.is_complete()
    _, expected = stored(calm)
    assert found.keys() == expected.keys() == {0, 1}
    for traj, trajectory in found.items():
        np.testing.assert_array_equal(trajectory.outputs["u"], expected[traj].outputs["u"])
        assert trajectory.outputs["u"][-1].std() > 1
    attempts = store.catalogue.done_attempts
    assert attempts[0] >= 3
    assert attempts[1] == 1
