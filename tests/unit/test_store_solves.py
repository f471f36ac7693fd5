"""How steps were solved: written beside the data, read back from shards and segments alike."""

import hashlib
import json
import os
import struct
import zlib

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_helpers import (
    SEED,
    Reader,
    assert_split_is_exact,
    make_schema,
    sample_of,
    step_of,
    write,
)
from typer.testing import CliRunner

from simlab.cli.store import app
from simlab.core.errors import SchemaError, StoreError
from simlab.core.reports import Provenance
from simlab.store.store import SnapshotStore

NAMES = ("cg+icc", "gcrodr(40,20)+ilu", "Čebyšëv of degree ½")
COUNTS = ("order", "chain", "iterations", "operator_applies", "pc_applies")


def solve_of(traj, step, n=12):
    """Return a provenance that differs in every number from sample to sample."""
    return Provenance(
        order=(7 * traj) % n,
        chain=traj % 3,
        iterations=20 + 3 * traj + step,
        operator_applies=30 + 3 * traj + step,
        pc_applies=25 + 3 * traj + step,
        true_relres=1e-9 / (1 + traj + step),
        seconds=0.125 * (1 + traj) + step,
        solver=NAMES[(traj + step) % 3],
    )


def write_solved(writer, schema, traj, n_steps=None):
    writer.begin(sample_of(schema, traj))
    for step in range(len(schema.times) if n_steps is None else n_steps):
        fields = step_of(schema, traj, step)
        writer.append(traj, step, schema.times[step], fields, solve=solve_of(traj, step))
    if n_steps is None:
        writer.finish(traj)


def filled(path, trajs=range(12), n=12, config=None, n_steps=2, **options):
    schema = make_schema(1, n_steps)
    store = SnapshotStore.create(path, schema, n=n, seed=SEED, config=config)
    with store.writer(**options) as writer:
        for traj in trajs:
            write_solved(writer, schema, traj)
    return store


def assert_solved(found, trajs, n_steps=2):
    expected = [(traj, step, solve_of(traj, step)) for traj in trajs for step in range(n_steps)]
    assert found["index"].tolist() == [traj for traj, _, _ in expected]
    assert found["step"].tolist() == [step for _, step, _ in expected]
    for name in Provenance.__dataclass_fields__:
        assert found[name].tolist() == [getattr(solve, name) for _, _, solve in expected], name


def test_solves_are_the_same_before_and_after_sealing_and_in_between(tmp_path):
    store = filled(tmp_path / "s", trajs=(5, 0, 9, 2))
    assert_solved(store.solves(), (0, 2, 5, 9))
    store.seal(final=True)
    assert_solved(store.solves(), (0, 2, 5, 9))
    with store.writer(segment_bytes=2000) as writer:
        for traj in (11, 1, 3, 10):
            write_solved(writer, store.schema, traj)
        writer.begin(sample_of(store.schema, 4))
        again = SnapshotStore.open(store.path)
        assert_solved(again.solves(), (0, 1, 2, 3, 5, 9, 10, 11))  # 4 is not finished
        store.seal()
        assert len(again.inflight.segments) > len(list((store.path / "inflight").glob("*.seg")))
        assert_solved(again.solves(), (0, 1, 2, 3, 5, 9, 10, 11))
    for name in store.fractions:
        mine = [traj for traj in (0, 1, 2, 3, 5, 9, 10, 11) if store.split_of(traj) == name]
        assert_solved(store.solves(name), mine)


def test_the_order_of_solving_is_undone_in_the_data_and_given_back(tmp_path):
    order = [(5 * k) % 12 for k in range(12)]  # solved in this order
    store = filled(tmp_path / "s", trajs=order, n_steps=1)
    store.seal(final=True)
    assert [t.sample.index for t in store.split("train")] == sorted(store.ids("train").tolist())
    found = store.solves()
    assert found["index"].tolist() == list(range(12))
    assert np.array_equal(np.sort(found["order"]), np.arange(12))
    walked = np.sort(found, order="order")["index"].tolist()
    assert [(7 * traj) % 12 for traj in walked] == list(range(12))


def test_a_store_without_solves_gives_an_empty_table(tmp_path):
    store = SnapshotStore.create(tmp_path / "s", make_schema(1, 1), n=3, seed=SEED)
    found = store.solves()
    assert found.shape == (0,)
    assert found["solver"].dtype.kind == "U"


def test_what_is_not_told_is_unknown(tmp_path):
    store = SnapshotStore.create(tmp_path / "s", make_schema(1, 1), n=2, seed=SEED)
    with store.writer() as writer:
        write(writer, store.schema, 0)
    for _ in range(2):
        (row,) = store.solves()
        assert [row[name] for name in COUNTS] == [-1] * 5
        assert np.isnan(row["true_relres"])
        assert np.isnan(row["seconds"])
        assert row["solver"] == ""
        store.seal(final=True)


def test_the_highest_attempt_counts(tmp_path):
    store = filled(tmp_path / "s", trajs=(0, 1))
    with store.writer() as writer:
        writer.begin(sample_of(store.schema, 1))
        for step in range(2):
            fields = step_of(store.schema, 1, step)
            writer.append(1, step, store.schema.times[step], fields, solve=Provenance(order=99))
        writer.finish(1)
    for _ in range(2):
        assert store.solves()["order"].tolist() == [0, 0, 99, 99]
        store.seal(final=True)


def test_shards_hold_the_solves_as_documented(tmp_path):
    config = {
        "family": {"kind": "darcy", "fields": {"kind": "two_phase", "low": 3.0, "high": 12.0}},
        "solver": {"kind": "gcrodr", "restart": 30, "static": 5, "carried": 10, "rtol": 1e-6},
    }
    store = filled(tmp_path / "s", config=config)
    store.seal(final=True)
    (path,) = (store.path / "data" / "train").glob("*.h5")
    with h5py.File(path) as file:
        ids, group = file["simlab/traj_id"][:], file["solve"]
        types = {name: group[name].dtype.str for name in group}
        assert types == {
            "order": "<i8", "chain": "<i4", "its": "<i8", "op_applies": "<i8",
            "pc_applies": "<i8", "true_relres": "<f8", "cpu_s": "<f8", "solver": "<i4",
        }  # fmt: skip
        assert all(group[name].shape == (len(ids), 2) for name in group)
        assert all(group[name].fletcher32 for name in group)
        said = {name: group.attrs[name] for name in group.attrs}
        words = [word.decode() for word in said.pop("solver").tolist()]
        assert sorted(words) == sorted(NAMES)  # each once
        assert said.pop("phase_values").tolist() == [3.0, 12.0]
        assert said == {
            "norm": "true residual / ||b||", "seed": SEED, "family": "darcy", "m": 30,
            "k_static": 5, "k_carried": 10, "rtol": 1e-6,
        }  # fmt: skip
        for row, traj in enumerate(ids.tolist()):
            for step in range(2):
                solve = solve_of(traj, step)
                assert group["its"][row, step] == solve.iterations
                assert group["op_applies"][row, step] == solve.operator_applies
                assert group["cpu_s"][row, step] == solve.seconds
                assert words[group["solver"][row, step]] == solve.solver


def test_a_case_that_says_nothing_leaves_no_attributes(tmp_path):
    store = filled(tmp_path / "s", config={"solver": {"kind": "krylov", "restart": 40}})
    store.seal(final=True)
    (path,) = (store.path / "data" / "test").glob("*.h5")
    with h5py.File(path) as file:
        assert sorted(file["solve"].attrs) == ["norm", "seed", "solver"]


def test_each_solver_is_written_once_a_segment(tmp_path):
    store = filled(tmp_path / "s")
    (path,) = (store.path / "inflight").glob("*.seg")
    data = path.read_bytes()
    assert data.count(json.dumps({"solver": NAMES[0]}, separators=(",", ":")).encode()) == 1
    assert data.count(b'{"solver":') == 3


def test_a_failed_trajectory_keeps_its_solves_in_its_shard(tmp_path):
    store = filled(tmp_path / "s", trajs=())
    with store.writer() as writer:
        write_solved(writer, store.schema, 3, n_steps=1)
        writer.fail(3, "diverged")
    assert len(store.solves()) == 0
    store.seal(final=True)
    assert len(store.solves()) == 0
    (path,) = (store.path / "data" / "failed").glob("*.h5")
    with h5py.File(path) as file:
        assert file["solve/its"][:].tolist() == [[solve_of(3, 0).iterations]]


i64 = st.integers(-(2**63), 2**63 - 1)
number = st.floats(allow_nan=True)
provenances = st.builds(
    Provenance, i64, st.integers(-(2**31), 2**31 - 1), i64, i64, i64, number, number,
    st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=30),
)  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(st.lists(provenances, min_size=1, max_size=6))
def test_any_values_survive_the_round_trip(tmp_path_factory, solves):
    schema = make_schema(1, 1)
    path = tmp_path_factory.mktemp("any") / "s"
    store = SnapshotStore.create(path, schema, n=len(solves), seed=SEED)
    with store.writer() as writer:
        for traj, solve in enumerate(solves):
            writer.begin(sample_of(schema, traj))
            writer.append(traj, 0, 0.0, step_of(schema, traj, 0), solve=solve)
            writer.finish(traj)
    for _ in range(2):
        found = store.solves()
        for name in Provenance.__dataclass_fields__:
            expected = np.array([getattr(solve, name) for solve in solves])
            assert np.array_equal(found[name], expected, equal_nan=found[name].dtype.kind == "f")
        store.seal(final=True)
    assert store.verify(deep=True) == []


@pytest.mark.parametrize(
    "bad", [{"order": 2**63}, {"chain": -(2**31) - 1}, {"iterations": 1.5}, {"seconds": "long"}]
)
def test_what_is_no_number_is_refused_and_nothing_is_written(tmp_path, bad):
    store = filled(tmp_path / "s", trajs=())
    with store.writer() as writer:
        writer.begin(sample_of(store.schema, 1))
        (path,) = (store.path / "inflight").glob("*.seg")
        size = path.stat().st_size
        with pytest.raises(SchemaError, match=f"trajectory 1, step 0: .*{next(iter(bad))}"):
            writer.append(1, 0, 0.0, step_of(store.schema, 1, 0), solve=Provenance(**bad))
        assert path.stat().st_size == size
        for step in range(2):
            fields = step_of(store.schema, 1, step)
            writer.append(1, step, store.schema.times[step], fields, solve=solve_of(1, step))
        writer.finish(1)
    assert_solved(store.solves(), (1,))


# Torn and damaged records


def records(data):
    """Return (begin, end, kind) of every record, read as docs/store.md says."""
    at, found = 0, []
    while at < len(data):
        (nbytes,) = struct.unpack_from("<Q", data, at + 32)
        end = at + 64 + nbytes + -nbytes % 8
        found.append((at, end, data[at + 42]))
        at = end
    return found


def with_crc(header, payload):
    return header[:60] + struct.pack("<I", zlib.crc32(header[:60], zlib.crc32(payload)))


def test_a_segment_cut_anywhere_in_a_step_is_recovered_and_goes_on(tmp_path):
    """The writer dies at every byte of a solver's and of a step's record."""
    whole = filled(tmp_path / "whole", trajs=(0, 1))
    (source,) = (whole.path / "inflight").glob("*.seg")
    data = source.read_bytes()
    layout = records(data)
    second = [k for k, (_, _, kind) in enumerate(layout) if kind == 8][1]  # step 1 of 0 brings it
    first, _, _ = layout[second]
    step = next(item for item in layout[second:] if item[2] == 5)
    named = layout[second][1]
    bytes_of = {*range(first, named + 1, 3), *range(step[0], step[1] + 1, 3), step[1]}
    for cut in sorted(bytes_of):
        path = tmp_path / f"cut{cut}"
        store = SnapshotStore.create(path, whole.schema, n=12, seed=SEED)
        target = path / "inflight" / source.name
        target.write_bytes(data[:cut])
        os.utime(target, (1, 1))
        report = store.recover()
        n_steps = 2 if cut == step[1] else 1
        assert report.abandoned == {0: n_steps}, cut
        assert store.verify(deep=True) == []
        reader = Reader(whole.schema)
        reader.drain(store)
        assert reader.steps == {0: n_steps}
        with store.writer() as writer:
            write_solved(writer, whole.schema, 0)
        assert_solved(store.solves(), (0,))
        store.seal(final=True)
        assert_solved(store.solves(), (0,))


def test_a_flipped_bit_in_a_solve_is_found(tmp_path):
    store = filled(tmp_path / "s")
    (path,) = (store.path / "inflight").glob("*.seg")
    data = bytearray(path.read_bytes())
    for begin, end, kind in records(data):
        if kind not in (5, 8):
            continue
        (nbytes,) = struct.unpack_from("<Q", data, begin + 32)
        for at in (begin + 4, begin + 42, begin + 62, begin + 64, begin + 64 + nbytes - 1):
            data[at] ^= 4
            path.write_bytes(data)
            problems = SnapshotStore.open(store.path).verify(deep=True)
            assert problems, (kind, at - begin)
            assert "damaged" in problems[0]
            data[at] ^= 4
        assert end >= begin
    path.write_bytes(data)
    assert SnapshotStore.open(store.path).verify(deep=True) == []


# Versions


def test_records_of_a_version_to_come_are_refused_not_cut(tmp_path):
    store = filled(tmp_path / "s")
    (path,) = (store.path / "inflight").glob("*.seg")
    data = path.read_bytes()
    begin, end, _ = next(item for item in records(data) if item[2] == 5)
    header = data[begin : begin + 4] + struct.pack("<H", 3) + data[begin + 6 : begin + 60]
    later = data[:begin] + with_crc(header, data[begin + 64 : end]) + data[begin + 64 :]
    path.write_bytes(later)
    again = SnapshotStore.open(store.path)
    for use in (again.status, again.recover, again.solves, lambda: again.seal(final=True)):
        with pytest.raises(StoreError, match=r"version 3, this simlab reads 1 to 2: use the"):
            use()
    with pytest.raises(StoreError, match="version 3"):
        again.follow(None, 1000)
    assert path.read_bytes() == later


def as_format(store, name):
    """Say in campaign.json that the store has another format."""
    path = store.path / "campaign.json"
    content = json.loads(path.read_text())
    del content["digest"]
    content["schema"] = name
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({**content, "digest": digest}))


def test_a_store_of_a_format_to_come_is_refused(tmp_path):
    store = filled(tmp_path / "s")
    as_format(store, "simlab-store/3")
    with pytest.raises(StoreError, match="format simlab-store/3, this simlab reads simlab-store/1"):
        SnapshotStore.open(store.path)


def segment_1(data):
    """Return a segment as version 1 had it: no solvers, three numbers a step."""
    parts = []
    for begin, end, kind in records(data):
        header, payload = bytearray(data[begin : begin + 60]), data[begin + 64 : end]
        struct.pack_into("<H", header, 4, 1)
        if kind == 8:
            continue
        if kind == 5:
            its, relres = struct.unpack_from("<q", payload, 8)[0], payload[40:48]
            payload = struct.pack("<Q", its) + relres + struct.pack("<d", 2.5)
            struct.pack_into("<Q", header, 32, len(payload))
        (nbytes,) = struct.unpack_from("<Q", header, 32)
        parts += [with_crc(bytes(header), payload[:nbytes]), payload]
    return b"".join(parts)


def test_a_store_of_format_1_is_read_sealed_and_gone_on_with(tmp_path):
    store = filled(tmp_path / "s", trajs=range(6))
    (path,) = (store.path / "inflight").glob("*.seg")
    path.write_bytes(segment_1(path.read_bytes()))
    as_format(store, "simlab-store/1")
    old = SnapshotStore.create(store.path, store.schema, n=12, seed=SEED)
    assert old.recover().quarantined == []

    def check(found, trajs):
        solves = [solve_of(traj, step) for traj in trajs for step in range(2)]
        assert found["iterations"].tolist() == [solve.iterations for solve in solves]
        assert found["true_relres"] == pytest.approx([s.true_relres for s in solves], rel=1e-6)
        assert set(found["order"].tolist()) == {-1}
        assert np.isnan(found["seconds"]).all()  # they were wall seconds

    check(old.solves(), range(6))
    reader = Reader(store.schema)
    reader.drain(old)
    assert reader.done() == set(range(6))
    old.seal(final=True)
    check(old.solves(), range(6))
    for shard in (store.path / "data").glob("*/*.h5"):  # as version 1 sealed them
        copy = shard.with_suffix(".copy")
        copy.write_bytes(shard.read_bytes())  # the shard itself is open for reading
        with h5py.File(copy, "r+") as file:
            file["simlab/iterations"] = file["solve/its"][:].astype(np.uint32)
            file["simlab/residual"] = file["solve/true_relres"][:].astype(np.float32)
            del file["solve"]
        copy.replace(shard)
    old = SnapshotStore.open(store.path)
    check(old.solves(), range(6))
    with old.writer() as writer:
        for traj in range(6, 12):
            write_solved(writer, store.schema, traj)
    both = old.solves()
    check(both[:12], range(6))
    assert_solved(both[12:], range(6, 12))
    old.seal(final=True)
    assert_solved(old.solves()[12:], range(6, 12))
    assert old.done() == set(range(12))
    for name in old.fractions:
        assert_split_is_exact(old.schema, old.split(name))


# The command


def test_the_command_sums_up_each_solver(tmp_path):
    store = filled(tmp_path / "s")
    ran = CliRunner().invoke(app, ["solves", str(store.path), "--json"])
    assert ran.exit_code == 0
    rows = {row["solver"]: row for row in json.loads(ran.stdout)}
    assert rows.keys() == set(NAMES)
    solves = [solve_of(traj, step) for traj in range(12) for step in range(2)]
    for name, row in rows.items():
        mine = [solve for solve in solves if solve.solver == name]
        assert row["solves"] == len(mine)
        assert row["iterations"] == pytest.approx(np.mean([s.iterations for s in mine]))
        assert row["operator_applies"] == pytest.approx(np.mean([s.operator_applies for s in mine]))
        assert row["pc_applies"] == pytest.approx(np.mean([s.pc_applies for s in mine]))
        assert row["worst_true_relres"] == max(s.true_relres for s in mine)
        assert row["cpu_seconds"] == pytest.approx(sum(s.seconds for s in mine))
    ran = CliRunner().invoke(app, ["solves", str(store.path), "--split", "test"])
    assert ran.exit_code == 0
    assert "worst relres" in ran.stdout
    with store.writer() as writer:  # one that says nothing of itself
        writer.begin(sample_of(store.schema, 0))
        for step in range(2):
            fields = step_of(store.schema, 0, step)
            writer.append(0, step, store.schema.times[step], fields)
        writer.finish(0)
    ran = CliRunner().invoke(app, ["solves", str(store.path), "--json"])
    unknown = next(row for row in json.loads(ran.stdout) if row["solver"] == "")
    assert (unknown["solves"], unknown["iterations"], unknown["cpu_seconds"]) == (2, None, 0.0)
