"""Both channels give the same records, whoever is killed in between, and to nobody else."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import zmq
from store_helpers import SEED, Reader, make_mesh, make_schema, write

from simlab.core.errors import StoreError
from simlab.store.channel import TailChannel, open_channel
from simlab.store.follow import Begin, Position, StepRecord
from simlab.store.store import SnapshotStore
from simlab.store.stream import StreamChannel, StreamServer

QUICK = {"wait": 2.0, "timeout": 0.3}


def make_store(path, n=12, **more):
    return SnapshotStore.create(path, make_schema(**more), n=n, seed=SEED)


def fill(store, first, last, **more):
    with store.writer(segment_bytes=3000) as writer:
        for traj in range(first, last):
            write(writer, store.schema, traj, **more)


def plain(event):
    """Return a record in a form that compares exactly."""
    if isinstance(event, StepRecord):
        values = {name: (v.dtype.str, v.tobytes()) for name, v in event.fields.items()}
        return ("step", event.traj, event.attempt, event.step, event.time, values)
    if isinstance(event, Begin):
        fields = {name: (v.dtype.str, v.tobytes()) for name, v in event.sample.fields.items()}
        sample = event.sample
        words = (sample.index, sample.seed, dict(sample.parameters), event.split)
        return ("begin", event.traj, event.attempt, words, fields)
    return ("end", event.traj, event.attempt, event.status)


def pull(channel, position=None, at_most=5, n_silent=60):
    """Return all there is, and the position after it."""
    found = []
    while True:
        events, after = channel.records(position, at_most)
        assert len(events) <= at_most
        if after is position:
            n_silent -= 1
            assert n_silent, "the server does not answer"
            time.sleep(0.1)
            continue
        if not events:
            return found, after
        found += map(plain, events)
        position = (
            Position.from_json(json.loads(json.dumps(after.to_json()))) if at_most == 7 else after
        )


@pytest.mark.parametrize("at_most", [1, 7, 1000])
def test_both_channels_give_the_same(tmp_path, at_most):
    """Segments, shards, attempts, failures, tensors and vertices: record by record, bit by bit."""
    store = make_store(tmp_path, mesh=make_mesh(), tensor=True)
    fill(store, 0, 5)
    with StreamServer(tmp_path) as server:
        channels = (TailChannel(tmp_path), open_channel(server.endpoint))
        first = [pull(channel, None, at_most) for channel in channels]
        fill(store, 5, 7, n_steps=2)  # abandoned
        writer = store.writer()
        write(writer, store.schema, 7, n_steps=1)
        writer.fail(7, "diverged")
        second = [pull(c, p, at_most) for c, (_, p) in zip(channels, first, strict=True)]
        writer.close()
        fill(store, 8, 12)
        store.seal(final=True)
        fill(store, 5, 8)
        third = [pull(c, p, at_most) for c, (_, p) in zip(channels, second, strict=True)]
        whole = [pull(channel, None, at_most)[0] for channel in channels]
        assert channels[1].is_complete()
        for name in store.fractions:
            np.testing.assert_array_equal(channels[1].ids(name), store.ids(name))
        channels[1].close()
    for tail, stream in (first, second, third):
        assert tail[0] == stream[0]
        assert tail[0]
        assert tail[1] == stream[1]
    assert whole[0] == whole[1]
    kinds = [record[0] for record in whole[0]]
    assert set(kinds) == {"begin", "step", "end"}
    assert {record[3] for record in whole[0] if record[0] == "end"} == {"done", "failed"}
    assert {r[3] for r in (*second[0][0], *third[0][0]) if r[0] == "end"} > {"failed", "abandoned"}


def serve(path):
    process = subprocess.Popen(
        [sys.executable, "-m", "simlab", "store", "serve", path], stdout=subprocess.PIPE, text=True
    )
    assert "token in" in process.stdout.readline()
    return process


def kill(process):
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()


def test_the_server_is_killed_in_between(tmp_path):
    """The follower goes on where it was, each record once, while data arrive."""
    store = make_store(tmp_path, n=30)
    writing = threading.Thread(target=fill, args=(store, 0, 30))
    reader, server = Reader(store.schema), serve(tmp_path)
    ports = set()
    try:
        channel = StreamChannel(tmp_path / "stream.json", **QUICK)
        writing.start()
        n_kills, deadline = 0, time.monotonic() + 60
        while len(reader.done()) < 30:
            assert time.monotonic() < deadline
            ports.add(json.loads((tmp_path / "stream.json").read_text())["address"])
            events, reader.position = channel.records(reader.position, 7)
            for event in events:
                reader.take(event)
            if len(reader.steps) > 8 * (n_kills + 1) and n_kills < 3:
                kill(server)
                n_kills += 1
                before = reader.position
                assert len(channel.records(before, 6)[0]) == 0
                server = serve(tmp_path)
        assert n_kills == 3
        writing.join()
        while not channel.is_complete():
            events, reader.position = channel.records(reader.position, 7)
            assert not events
        channel.close()
    finally:
        kill(server)
    assert len(ports) == 1  # the port is taken again


def test_the_follower_is_started_again_and_may_ask_twice(tmp_path):
    store = make_store(tmp_path)
    fill(store, 0, 12)
    expected = pull(TailChannel(tmp_path))[0]
    with StreamServer(tmp_path) as server:
        found, position = [], None
        for _ in range(4):
            channel = StreamChannel(server.endpoint)
            for _ in range(2):
                again, _ = channel.records(position, 5)
                events, after = channel.records(position, 5)
                assert list(map(plain, again)) == list(map(plain, events))
                found += map(plain, events)
                position = after
            channel.close()
        rest, _ = pull(StreamChannel(server.endpoint), position)
    assert found + rest == expected


def test_silence_is_not_the_end(tmp_path):
    """Without a server there are no records and the same position; in the end an error."""
    store = make_store(tmp_path)
    fill(store, 0, 12)
    with StreamServer(tmp_path) as server:
        channel = StreamChannel(server.endpoint, wait=0.2, timeout=0.1, patience=0.6)
        _, position = channel.records(None, 5)
        channel.records(position, 5)
        _, position = channel.records(None, 3)
    began = time.monotonic()
    while time.monotonic() - began < 0.4:
        events, after = channel.records(position, 4)
        assert events == []
        assert after is position
        assert not channel.is_complete()
        time.sleep(0.02)
    time.sleep(0.3)
    with pytest.raises(StoreError, match="no answer"):
        channel.records(position, 4)
    with pytest.raises(StoreError, match="no answer"):
        StreamChannel(tmp_path / "other.json", wait=0.05, patience=0.1)


def test_the_token_keeps_others_out(tmp_path):
    make_store(tmp_path / "s")
    mine = tmp_path / "mine.json"
    with StreamServer(tmp_path / "s") as server:
        content = json.loads(server.endpoint.read_text())
        assert os.stat(server.endpoint).st_mode & 0o777 == 0o600
        assert content["address"].startswith("tcp://127.0.0.1:")
        assert len(content["token"]) == 64
        mine.write_text(json.dumps(content))
        mine.chmod(0o644)
        with pytest.raises(StoreError, match="chmod 600"):
            StreamChannel(mine)
        mine.write_text(json.dumps(content | {"token": "0" * 64}))
        mine.chmod(0o600)
        with pytest.raises(StoreError, match="token"):
            StreamChannel(mine)
        with zmq.Context() as context, context.socket(zmq.REQ) as socket:
            for frames in ([b'{"ask":"describe"}', b""], [b"\x80\x04", b"\xff" * 32]):
                socket.connect(content["address"])
                socket.send_multipart(frames)
                assert socket.recv_multipart() == [b'{"error":"wrong token"}', b""]
        channel = StreamChannel(server.endpoint)  # still serving
        with pytest.raises(StoreError, match="another store"):
            channel.records(Position("other"), 3)
        channel.close()
        server.endpoint.chmod(0o644)
    with StreamServer(tmp_path / "s") as server:  # a token that others could read is not used again
        assert json.loads(server.endpoint.read_text())["token"] != content["token"]


def test_damage_on_the_way_or_on_disk_is_not_handed_out(tmp_path):
    store = make_store(tmp_path, n=3)
    with store.writer() as writer:
        for traj in range(3):
            write(writer, store.schema, traj)
        (segment,) = (tmp_path / "inflight").glob("*.seg")
        data = bytearray(segment.read_bytes())
        data[len(data) // 2] ^= 1
        segment.write_bytes(data)
        with StreamServer(tmp_path) as server:
            channel = StreamChannel(server.endpoint)
            found, position = [], None
            for _ in range(10):
                events, position = channel.records(position, 100)
                found += map(plain, events)
            tail, _ = pull(TailChannel(tmp_path))
            assert found == tail
            assert 0 < len(found) < 15
            channel.close()
