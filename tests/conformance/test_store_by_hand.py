"""A store written from docs/store.md alone, without simlab's writer; and read so, too."""

import hashlib
import json
import os
import struct
import zlib

import h5py
import numpy as np
import pytest

from simlab.store.store import SnapshotStore

N, T, SEED = 12, 2, 6607
SHAPE = (3, 4)
FRACTIONS = {"train": 0.8, "valid": 0.1, "test": 0.1}
HEAD, INPUT, BEGIN, OUTPUT, STEP, END, CLOSE, SOLVER = range(1, 9)
WRITER = "otherhost-17-0badcafe-0"
MASK = 2**64 - 1


def k_of(traj):
    return np.random.default_rng([SEED, traj]).standard_normal(SHAPE).astype("<f4")


def q_of(traj, step):
    rng = np.random.default_rng([SEED, traj, step])
    return rng.standard_normal((*SHAPE, 2)).astype("<f4")


def mixed(x, seed):
    """Splitmix64."""
    z = (
        (x ^ ((seed * 0x9E3779B97F4A7C15 + 0xD1B54A32D192ED03) & MASK)) + 0x9E3779B97F4A7C15
    ) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def split_of(traj):
    block, place = divmod(traj, 10)
    hashes = [mixed(10 * block + i, SEED) for i in range(10)]
    rank = sorted(hashes).index(hashes[place])
    shift = ((mixed(0, ~SEED) >> 11) / 2**53 + block * 0.6180339887498949) % 1.0
    at = rank + shift
    return "train" if at < 8 else "valid" if at < 9 else "test"


def pack(kind, number=0, traj=0, attempt=0, step=0, time=0.0, payload=b"", dtype=0, shape=()):
    head = struct.pack("<4sHHQII", b"SLW1", 2, number, traj, attempt, step)
    head += struct.pack("<dQBBH", time, len(payload), dtype, len(shape), kind)
    head += struct.pack("<4I", *shape, *[0] * (4 - len(shape)))
    assert len(head) == 60
    crc = zlib.crc32(head, zlib.crc32(payload))
    return head + struct.pack("<I", crc) + payload + bytes(-len(payload) % 8), crc


def pack_json(kind, traj=0, attempt=0, **body):
    return pack(kind, traj=traj, attempt=attempt, payload=json.dumps(body).encode())


def trajectory(traj, n_steps, attempt=1, solver=0):
    """All records of a trajectory but its END, and their CRCs."""
    given = {"parameters": {"mu": traj / 4}, "split": split_of(traj), "provenance": {"by": "hand"}}
    records = [
        pack(INPUT, 0, traj, attempt, payload=k_of(traj).tobytes(), dtype=1, shape=SHAPE),
        pack_json(BEGIN, traj, attempt, index=traj, seed=SEED, **given),
    ]
    for step in range(n_steps):
        values = q_of(traj, step).tobytes()
        shape = (*SHAPE, 2)
        records.append(pack(OUTPUT, 0, traj, attempt, step, 0.5 * step, values, 1, shape))
        solve = struct.pack("<qqqqiIdd", 40 + traj, 11, 12, 13, 2, solver, 1e-9 * (traj + 1), 0.25)
        records.append(pack(STEP, 0, traj, attempt, step, 0.5 * step, solve))
    return records


def ended(records, traj, n_steps, attempt=1, status="done", reason=""):
    digest = hashlib.sha256(struct.pack(f"<{len(records)}I", *(crc for _, crc in records)))
    body = {"status": status, "reason": reason, "n_steps": n_steps, "digest": digest.hexdigest()}
    return [*records, pack_json(END, traj, attempt, **body)]


def write_campaign(path):
    for name in ("inflight", "manifest", "data/train", "data/valid", "data/test"):
        (path / name).mkdir(parents=True)
    field = {"location": "grid", "long_name": "", "units": "1"}
    content = {
        "schema": "simlab-store/2",
        "uuid": "0123456789abcdef0123456789abcdef",
        "n": N,
        "seed": SEED,
        "split": FRACTIONS,
        "config": {},
        "mesh": None,
        "spec": {
            "name": "hand",
            "axes": [
                {"name": "x", "coordinates": [0.0, 0.5, 1.0], "units": "m"},
                {"name": "y", "coordinates": [0.0, 1.0, 2.0, 3.0], "units": "m"},
            ],
            "fields": [
                {"name": "k", "role": "input", "order": 0, **field},
                {"name": "q", "role": "output", "order": 1, **field},
            ],
            "times": [0.0, 0.5],
            "parameters": {"mu": "1"},
            "constants": {},
            "boundaries": [{"axis": "x", "kind": "wall"}, {"axis": "y", "kind": "periodic"}],
        },
    }
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (path / "campaign.json").write_text(json.dumps({**content, "digest": digest}))


def write_segment(path, tail=b"", is_closed=True):
    """Ten trajectories, two of them one record in turn; one fails, one is never ended."""
    records = [pack_json(HEAD, schema="simlab-segment/2", campaign="0123", writer=WRITER)]
    records.append(pack_json(SOLVER, solver="by hand"))
    pairs = [ended(trajectory(traj, T), traj, T) for traj in (0, 1)]
    at = [[0, 2, 4, 6, 7], [0, 2, 4, 6, 7]]  # groups: INPUT BEGIN, OUTPUT STEP, OUTPUT STEP, END
    for first in range(4):
        for records_of, cuts in zip(pairs, at, strict=True):
            records += records_of[cuts[first] : cuts[first + 1]]
    for traj in range(2, 9):
        records += ended(trajectory(traj, T), traj, T)
    records += ended(trajectory(9, 1), 9, 1, status="failed", reason="diverged")
    records += trajectory(10, 1)
    if is_closed:
        records.append(pack_json(CLOSE, is_full=False))
    data = b"".join(record for record, _ in records) + tail
    segment = path / "inflight" / f"{WRITER}.000000.seg"
    segment.write_bytes(data)
    os.utime(segment, (1, 1))  # its writer, on another host, has not been heard of for long


def assert_right(store):
    found = {}
    for name in FRACTIONS:
        for item in store.split(name):
            traj = item.sample.index
            found[traj] = name
            assert item.sample.parameters == {"mu": traj / 4}
            assert np.array_equal(item.sample.fields["k"], k_of(traj))
            assert np.array_equal(item.outputs["q"], np.stack([q_of(traj, s) for s in range(T)]))
    assert found == {traj: split_of(traj) for traj in range(9)}


def test_a_store_written_by_hand_is_followed_sealed_and_read(tmp_path):
    write_campaign(tmp_path)
    write_segment(tmp_path)
    store = SnapshotStore.open(tmp_path)
    assert store.verify(deep=True) == []
    assert store.done() == set(range(9))
    events, _ = store.follow(None, 1000)
    values = {(e.traj, e.step): e.fields["q"] for e in events if hasattr(e, "fields")}
    for (traj, step), q in values.items():
        assert np.array_equal(q, q_of(traj, step))
    assert len(values) == 9 * T + 2  # and the steps of 9 and 10
    assert store.seal(final=True)
    store = SnapshotStore.open(tmp_path)
    assert store.verify(deep=True) == []
    assert_right(store)
    solves = store.solves()
    assert solves["order"].tolist() == [40 + traj for traj in range(9) for _ in range(T)]
    assert set(solves["solver"].tolist()) == {"by hand"}
    assert solves["true_relres"][3 * T] == 4e-9
    assert store.status().splits[split_of(9)].failed == 1


def test_a_torn_tail_written_by_hand_is_cut(tmp_path):
    write_campaign(tmp_path)
    write_segment(tmp_path, trajectory(11, 0)[0][0][:-9], is_closed=False)
    path = tmp_path / "inflight" / f"{WRITER}.000000.seg"
    store = SnapshotStore.open(tmp_path)
    report = store.recover()
    assert list(report.truncated) == [path.name]
    assert report.abandoned == {10: 1}
    store.seal(final=True)
    assert_right(store)


@pytest.mark.parametrize("at", [4, 12, 33, 60, 64, 70])
def test_one_wrong_byte_in_a_record_and_it_does_not_count(tmp_path, at):
    write_campaign(tmp_path)
    write_segment(tmp_path)
    path = tmp_path / "inflight" / f"{WRITER}.000000.seg"
    data = bytearray(path.read_bytes())
    begin = bytes(data).index(pack_json(SOLVER, solver="by hand")[0])
    data[begin + at] ^= 4
    path.write_bytes(data)
    os.utime(path, (1, 1))
    assert SnapshotStore.open(tmp_path).verify(deep=True) != []


def test_manifest_and_shards_are_what_the_page_says(tmp_path):
    write_campaign(tmp_path)
    write_segment(tmp_path)
    SnapshotStore.open(tmp_path).seal(final=True)
    (path,) = (tmp_path / "manifest").glob("*.jsonl")
    kinds, rows = [], []
    for line in path.read_bytes().splitlines():
        head, crc = line[:-18], line[-10:-2].decode()  # ,"crc":"01234567"}
        assert line[len(head) :] == f',"crc":"{crc}"}}'.encode()
        assert f"{zlib.crc32(head + b'}'):08x}" == crc
        entry = json.loads(line)
        kinds.append(entry["kind"])
        if entry["kind"] == "shard":
            data = (tmp_path / "data" / entry["shard"]).read_bytes()
            assert len(data) == entry["bytes"]
            assert hashlib.sha256(data).hexdigest() == entry["sha256"]
            rows += entry["traj"]
            with h5py.File(tmp_path / "data" / entry["shard"]) as file:
                q, k = file["t1_fields/q"][:], file["t0_fields/k"][:]
                assert (q.dtype, q.shape[1:]) == (np.dtype("<f4"), (entry["n_steps"], *SHAPE, 2))
                log = file["simlab"]
                assert log["traj_id"][:].tolist() == entry["traj"]
                for b in range(len(q)):
                    assert log["input_crc32"][b, 0] == zlib.crc32(k[b].tobytes())
                    for t in range(entry["n_steps"]):
                        assert log["crc32"][b, t, 0] == zlib.crc32(q[b, t].tobytes())
    assert kinds[-1] == "retired"
    assert sorted(rows) == list(range(10))  # the one that failed after a step is in data/failed
