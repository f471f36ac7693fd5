"""The order of a campaign: sorted, kept, resumed; one solver, one static space, events told."""

from __future__ import annotations

import json
import logging
from typing import ClassVar

import numpy as np
import pytest

from simlab.core.comm import self_comm
from simlab.core.config import build
from simlab.core.errors import ConfigError, SchemaError, StoreError
from simlab.core.runs import RunDirectory
from simlab.learn.buffers import buffers
from simlab.linalg.krylov import CGICC
from simlab.linalg.ordering import path_length, sample_keys
from simlab.linalg.seed import Seed, seed_space
from simlab.linalg.system import solvers
from simlab.pipeline import chain
from simlab.pipeline.campaign import generate, plan, run_campaign
from simlab.pipeline.case import Case
from simlab.pipeline.order import Order
from simlab.pipeline.training import train_run
from simlab.problems.darcy import Darcy
from simlab.problems.reference import reference
from simlab.store.store import SnapshotStore

N, SEED = 60, 9157
FAMILY = Darcy(cells=8, fields={"kind": "four_parameter"})


class Carrying(CGICC):
    """A solver that wants an order, prepares a static space and reports an event."""

    kind: ClassVar[str] = "carrying_for_tests"
    wants_order: ClassVar[bool] = True
    made: ClassVar[list[tuple[float, Seed]]] = []
    begun: ClassVar[list[Seed | None]] = []

    def seed(self, system):
        self.made.append((system.A.getDiagonal().sum(), seed_space(system, 2)))
        return self.made[-1][1]

    def init(self, system, seed=None):
        self.begun.append(seed)
        state = super().init(system)
        state.events = []
        return state

    def solve(self, system, state):
        result, state = super().solve(system, state)
        if system.index == 11:
            state.events.append("system 11: carrying switched off, it does not pay")
        return result, state


@pytest.fixture
def carrying(monkeypatch):
    """Register the solver for one test."""
    solvers.kinds()
    monkeypatch.setitem(solvers._kinds, Carrying.kind, Carrying)
    Carrying.made.clear()
    Carrying.begun.clear()
    return Carrying


def case_of(solver="cg_icc", **campaign) -> Case:
    table = {"n": N, "seed": SEED} | campaign
    return build(Case, {"family": FAMILY, "solver": solver, "campaign": table})


def run(case: Case, out, **words) -> tuple[SnapshotStore, RunDirectory]:
    resume = words.pop("resume", (out / "manifest.json").exists())
    RunDirectory.start(out, case.tables(), resume=resume)
    directory = RunDirectory(out)
    run_campaign(case, directory, **words)
    return SnapshotStore.open(directory.store), directory


def walk_of(store: SnapshotStore) -> np.ndarray:
    """Return the ids in the order of solving; positions must be 0, 1, ..."""
    solves = np.sort(store.solves(), order="order")
    assert solves["order"].tolist() == list(range(len(solves)))
    return solves["index"]


def keys(ids) -> np.ndarray:
    return sample_keys(FAMILY.space.sample(1, SEED, int(i))[0] for i in ids)


def stop_after(monkeypatch, n: int) -> None:
    """Ask for a stop once the chain has solved n more samples."""
    solve, count = chain.Chain._solve, []

    def counted(self, index, writer):
        solve(self, index, writer)
        count.append(index)
        if len(count) == n:
            self._run.request_stop()

    monkeypatch.setattr(chain.Chain, "_solve", counted)


def test_a_carrying_solver_walks_sorted_parts_held_out_first(tmp_path, carrying) -> None:
    store, directory = run(case_of("carrying_for_tests"), tmp_path / "sorted")
    plain, _ = run(case_of(), tmp_path / "plain")
    walk = walk_of(store)
    drawn = walk_of(plain)
    for name in ("train", "valid", "test"):
        assert store.ids(name).tolist() == plain.ids(name).tolist()
    held_out = N - len(store.ids("train"))
    assert set(walk[:held_out]) == set(drawn[:held_out])
    for part in (slice(held_out), slice(held_out, None)):
        ids = keys(walk[part])
        assert path_length(ids) < 0.85 * path_length(ids[np.argsort(walk[part])])
    assert directory.manifest()["campaign"]["order"] == "greedy"
    assert directory.manifest()["campaign"]["path_over_drawn"] < 0.7
    for one, other in zip(store.split("train"), plain.split("train"), strict=True):
        assert one.sample.index == other.sample.index
        np.testing.assert_allclose(one.outputs["u"], other.outputs["u"], rtol=1e-5)


def test_as_drawn_keeps_no_order(tmp_path) -> None:
    store, directory = run(case_of(), tmp_path / "run")
    held_out = np.sort(np.concatenate([store.ids("valid"), store.ids("test")]))
    assert walk_of(store).tolist() == [*held_out, *store.ids("train")]
    assert not (directory.path / "order.npz").exists()
    assert directory.manifest()["campaign"]["order"] == "sample"


def test_a_resumed_run_goes_on_along_the_same_path(tmp_path, monkeypatch) -> None:
    case = case_of(order={"kind": "hilbert"})
    whole, _ = run(case, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(patch, 23)
        store, directory = run(case, tmp_path / "run")
        assert len(store.done()) == 23
    assert directory.manifest()["campaign"]["state"] == "stopped"
    path = Order.load(directory.path / "order.npz", np.arange(N)).path
    assert set(path[:23]) == store.done()
    made = (directory.path / "order.npz").stat().st_mtime_ns
    store, _ = run(case, tmp_path / "run")
    assert (directory.path / "order.npz").stat().st_mtime_ns == made
    assert walk_of(store).tolist() == walk_of(whole).tolist() == path.tolist()
    assert store.catalogue.done_attempts.tolist() == [1] * N


def test_an_order_of_other_samples_is_refused(tmp_path, monkeypatch) -> None:
    case = case_of(order="greedy")
    stop_after(monkeypatch, 5)
    _, directory = run(case, tmp_path / "run")
    Order.drawn([np.arange(7)]).save(directory.path / "order.npz")
    with pytest.raises(StoreError, match="other samples"):
        run(case, tmp_path / "run")
    (directory.path / "order.npz").write_bytes(b"PK")
    with pytest.raises(StoreError, match="delete it"):
        run(case, tmp_path / "run")


def test_parts_of_a_job_array_have_orders_of_their_own(tmp_path) -> None:
    case = case_of(order="greedy")
    for part in range(2):
        store, directory = run(case, tmp_path / "run", shard=(part, 2))
        path = Order.load(directory.path / f"order-{part}of2.npz", np.arange(part, N, 2)).path
        solves = store.solves()
        mine = np.sort(solves[solves["index"] % 2 == part], order="order")
        assert mine["index"].tolist() == path.tolist()
    assert store.is_complete()


def test_samples_the_trainer_waits_for_come_first(tmp_path) -> None:
    train = {"n_batches": 1, "pilot": 6, "operator": "deeponet"}
    table = {"family": FAMILY, "solver": "cg_icc", "train": train}
    case = build(Case, table | {"campaign": {"n": N, "seed": SEED, "order": "greedy"}})
    store, _ = run(case, tmp_path / "run")
    walk = walk_of(store)
    training = [i for i in walk.tolist() if i in set(store.ids("train").tolist())]
    assert sorted(training[:6]) == store.ids("train")[:6].tolist()
    assert training[6:] != sorted(training[6:])


def test_a_sample_without_a_key_ends_its_part_and_is_reported(tmp_path, monkeypatch) -> None:
    draw = type(FAMILY.space).sample

    def spoilt(self, n, seed, start=0):
        samples = draw(self, n, seed, start)
        if start == 17:
            samples[0].fields["a"][2, 3] = np.nan
        return samples

    monkeypatch.setattr(type(FAMILY.space), "sample", spoilt)
    case = case_of(order="greedy")
    with pytest.raises(SchemaError, match="17"):
        run(case, tmp_path / "run")
    order = Order.load(tmp_path / "run" / "order.npz", np.arange(N))
    n_train = len(SnapshotStore.open(tmp_path / "run" / "store").ids("train"))
    assert 17 in (order.path[-1], order.path[N - n_train - 1])


def test_auto_decides_once_and_a_resumed_run_adopts_it(tmp_path, monkeypatch, caplog) -> None:
    family = Darcy(cells=26)
    auto = {"kind": "auto", "pilot": 3}
    case = build(Case, {"family": family, "solver": auto, "campaign": {"n": 20, "seed": SEED}})
    with monkeypatch.context() as patch:
        stop_after(patch, 6)
        _, directory = run(case, tmp_path / "run")
    decision = directory.manifest()["decision"]
    assert len(decision["pilot"]) > 1
    assert decision["solvers"][0]["kind"] in decision["reason"]
    with caplog.at_level(logging.INFO, "simlab.linalg.advisor"), monkeypatch.context() as patch:
        stop_after(patch, 6)
        run(case, tmp_path / "run")
    assert "adopted" in caplog.text
    assert directory.manifest()["campaign"]["pilot"] == decision["pilot"]
    caplog.clear()
    manifest = directory.manifest()
    del manifest["decision"]
    (directory.path / "manifest.json").write_text(json.dumps(manifest))
    with caplog.at_level(logging.INFO, "simlab.linalg.advisor"):
        store, _ = run(case, tmp_path / "run")
    assert "adopted" not in caplog.text
    assert len(directory.manifest()["decision"]["pilot"]) > 1
    walk_of(store)
    assert store.is_complete()


def test_a_decision_that_cannot_be_read_says_what_to_delete(tmp_path, monkeypatch) -> None:
    case = build(Case, {"family": Darcy(cells=26), "campaign": {"n": 12, "seed": SEED}})
    stop_after(monkeypatch, 5)
    _, directory = run(case, tmp_path / "run")
    directory.update(decision={"solvers": [{"kind": "nonesuch"}]})
    with pytest.raises(ConfigError, match=r"decision.*delete the entry"):
        run(case, tmp_path / "run")


def test_the_winner_of_the_pilot_has_its_order_and_its_static_space(tmp_path, carrying) -> None:
    auto = {"kind": "auto", "candidates": ["carrying_for_tests"]}
    store, directory = run(case_of(auto), tmp_path / "run")
    assert directory.manifest()["campaign"]["order"] == "greedy"
    walk = walk_of(store)
    held_out = np.sort(np.concatenate([store.ids("valid"), store.ids("test")]))
    assert walk[0] == held_out[0]  # the pilot's, as drawn
    assert walk[1 : len(held_out)].tolist() != held_out[1:].tolist()
    pilot, begun = carrying.begun
    assert pilot is None
    np.testing.assert_array_equal(begun.vectors, carrying.made[0][1].vectors)


def test_the_static_space_is_made_once_for_the_reference(tmp_path, carrying, monkeypatch) -> None:
    case = case_of("carrying_for_tests")
    with monkeypatch.context() as patch:
        stop_after(patch, 9)
        _, directory = run(case, tmp_path / "run")
    workspace = FAMILY.setup(self_comm())
    system = FAMILY.assemble(reference(FAMILY.space.sample(N, SEED)), workspace)
    assert [total for total, _ in carrying.made] == [pytest.approx(system.A.getDiagonal().sum())]
    np.testing.assert_array_equal(carrying.begun[-1].vectors, carrying.made[0][1].vectors)
    with monkeypatch.context() as patch:
        stop_after(patch, 9)
        run(case, tmp_path / "run")
    assert len(carrying.made) == 1
    assert len(carrying.begun) == 2
    small = Darcy(cells=4)
    other = small.setup(self_comm())
    of_another_layout = seed_space(small.assemble(small.space.sample(1, SEED)[0], other), 2)
    of_another_layout.save(directory.path / "static_space.npz")
    run(case, tmp_path / "run")
    assert len(carrying.made) == 2
    assert carrying.begun[-1].vectors.shape == (64, 2)
    workspace.destroy()
    other.destroy()


def test_events_of_the_solver_are_logged_and_kept(tmp_path, carrying, caplog) -> None:
    with caplog.at_level(logging.INFO, "simlab.campaign"):
        _, directory = run(case_of("carrying_for_tests"), tmp_path / "run")
    (group,) = directory.manifest()["campaign"]["groups"]
    assert group["events"] == ["system 11: carrying switched off, it does not pay"]
    assert (group["group"], group["done"], group["failed"], group["taken"]) == (0, N, 0, 0)
    assert caplog.text.count("it does not pay") == 1


def test_the_plan_names_the_order(tmp_path, carrying) -> None:
    assert plan(case_of(), 1, tmp_path)["order"] == "auto: as drawn"
    assert plan(case_of("carrying_for_tests"), 1, tmp_path)["order"] == "auto: greedy"
    assert plan(case_of("auto"), 1, tmp_path)["order"].startswith("auto: greedy if the pilot")
    assert plan(case_of(order="hilbert"), 1, tmp_path)["order"] == "hilbert"


def test_a_wrong_order_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="greedy"):
        case_of(order="gredy")


def test_the_order_in_a_case_survives_its_tables() -> None:
    case = case_of(order={"kind": "hilbert", "dimensions": 2})
    assert build(Case, case.tables()) == case
    assert case_of().tables()["campaign"]["order"] == "auto"


@pytest.mark.parametrize(("kind", "warns"), [("fifo", True), ("reservoir", False)])
def test_a_queue_of_sorted_samples_is_warned_of_once(tmp_path, kind, warns, caplog) -> None:
    train = {"n_batches": 2, "pilot": 4, "operator": "deeponet"}
    train["buffer"] = {"kind": kind, "capacity": 48}
    table = {"family": FAMILY, "solver": "cg_icc", "train": train}
    case = build(Case, table | {"campaign": {"n": N, "seed": SEED, "order": "greedy"}})
    _, directory = run(case, tmp_path / "run")
    with caplog.at_level(logging.WARNING, "simlab.train"):
        train_run(case, directory)
    assert caplog.text.count("samples arrive in greedy order") == int(warns)


def test_a_reservoir_shuffles_what_arrives_sorted() -> None:
    """Batches drawn while sorted items arrive spread over what was seen, a queue's do not."""
    spreads = {}
    for kind in ("fifo", "reservoir"):
        buffer = buffers.build({"kind": kind, "capacity": 512}).build(1, 3907)
        batches = []
        for value in range(2000):
            buffer.put(np.array([value], dtype=np.float32))
            if value % 8 == 7 and (rows := buffer.get(8)) is not None:
                batches.append(np.ptp(rows) / (value + 1))
        spreads[kind] = np.median(batches[len(batches) // 2 :])
    assert spreads["fifo"] < 0.02
    assert spreads["reservoir"] > 0.2


def test_generate_takes_a_carrying_solver_instance(tmp_path, carrying) -> None:
    store = generate(FAMILY, out=tmp_path / "run", n=20, seed=SEED, solver=carrying(rtol=1e-9))
    assert store.is_complete()
    assert (tmp_path / "run" / "order.npz").exists()
