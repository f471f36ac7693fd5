"""What the stream sends: neighbours of a segment in one piece, no more bytes than asked for."""

import json
import os

import pytest
from store_helpers import SEED, make_schema, sample_of, step_of, write

from simlab.core.errors import StoreError
from simlab.store import follow, stream
from simlab.store.channel import TailChannel
from simlab.store.events import as_event
from simlab.store.follow import StepRecord, follow_records
from simlab.store.records import scan_bytes
from simlab.store.store import SnapshotStore
from simlab.store.stream import StreamChannel, StreamServer


def make_store(path, n, n_writers=1, **more):
    store = SnapshotStore.create(path, make_schema(**more), n=n, seed=SEED)
    writers = [store.writer() for _ in range(n_writers)]
    for traj in range(n):
        write(writers[traj % n_writers], store.schema, traj)
    for writer in writers:
        writer.close()
    return store


def plain(event):
    if isinstance(event, StepRecord):
        values = {name: v.tobytes() for name, v in event.fields.items()}
        return (event.traj, event.step, event.time, values)
    return (type(event).__name__, event.traj, event.attempt)


def decoded(schema, runs, order):
    scans = [scan_bytes(run) for run in runs]
    found = [plain(as_event(schema, next(scans[number]))) for number in order]
    assert all(next(scan, None) is None for scan in scans)  # nothing else was sent
    return found


def test_neighbours_are_one_run(tmp_path):
    """A run each for the segments of two writers, whose records come in turn."""
    store = make_store(tmp_path, n=20, n_writers=2)
    runs, order, _ = follow_records(store, None, 1000, 1 << 30)
    assert len(order) == 20 * 5
    assert order[:2] == [0, 1]
    assert len(runs) <= 6  # one and what the solver's records and the ends of blocks cut
    expected = [plain(event) for event in TailChannel(tmp_path).records(None, 1000)[0]]
    assert decoded(store.schema, runs, order) == expected


def test_what_is_no_news_is_not_sent(tmp_path):
    """Steps of an attempt that began again elsewhere lie in the segment, and cut its run."""
    store = SnapshotStore.create(tmp_path, make_schema(), n=9, seed=SEED)
    old, new = store.writer(), store.writer()
    write(old, store.schema, 0)
    old.begin(sample_of(store.schema, 1))
    _, order, position = follow_records(store, None, 100, 1 << 30)
    assert len(order) == 6
    new.begin(sample_of(store.schema, 1), attempt=2)
    _, order, position = follow_records(store, position, 100, 1 << 30)
    assert len(order) == 1
    write(old, store.schema, 2)
    old.append(1, 0, store.schema.times[0], step_of(store.schema, 1, 0))
    write(old, store.schema, 3)
    runs, order, _ = follow_records(store, position, 100, 1 << 30)
    found = decoded(store.schema, runs, order)
    trajs = [one[1] if isinstance(one[0], str) else one[0] for one in found]
    assert trajs == [2] * 5 + [3] * 5
    assert order[:6] == [0] * 5 + [1]
    assert len(runs) <= 3
    old.close()
    new.close()


def test_replies_end_after_so_many_bytes(tmp_path, monkeypatch):
    """However many records were asked for, and the server reads little beyond them."""
    store = make_store(tmp_path, n=40, dims=3)
    (size,) = [item.stat().st_size for item in (tmp_path / "inflight").glob("*.seg")]
    n_read = 0
    preadv = os.preadv

    def counted(fd, buffers, offset):
        nonlocal n_read
        n = preadv(fd, buffers, offset)
        n_read += n
        return n

    store.is_complete()
    monkeypatch.setattr(os, "preadv", counted)
    runs = follow_records(store, None, 10_000, size // 10)[0]
    n_bytes = sum(map(len, runs))
    assert size // 10 <= n_bytes < size // 10 + 10_000
    assert n_read < size // 10 + (1 << 18) + 10_000


def test_large_records_come_a_few_at_a_time(tmp_path, monkeypatch):
    """The same few through both channels, and in the end all of them."""
    make_store(tmp_path, n=20, dims=3)
    expected = [plain(event) for event in TailChannel(tmp_path).records(None, 10_000)[0]]
    for module in (follow, stream):
        monkeypatch.setattr(module, "CALL_BYTES", 40_000)
    with StreamServer(tmp_path) as server:
        channel = StreamChannel(server.endpoint, wait=30.0)
        for one in (TailChannel(tmp_path), channel):
            found, position, sizes = [], None, []
            while events := (reply := one.records(position, 10_000))[0]:
                found += map(plain, events)
                sizes.append(len(events))
                position = reply[1]
            assert found == expected
            assert len(sizes) > 3
            assert max(sizes) < 30
        channel.close()


def test_a_file_of_another_version_is_refused(tmp_path):
    make_store(tmp_path, n=3)
    with StreamServer(tmp_path) as server:
        content = json.loads(server.endpoint.read_text())
        server.endpoint.write_text(json.dumps(content | {"v": 1}))
        with pytest.raises(StoreError, match="version 1"):
            StreamChannel(server.endpoint)
