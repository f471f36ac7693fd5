"""Whatever happens to a writing process: nothing acknowledged is lost, nothing is there twice."""

import errno
import gc
import itertools
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback

import h5py
import numpy as np
import pytest
from store_helpers import (
    SEED,
    Reader,
    assert_split_is_exact,
    make_schema,
    sample_of,
    solve_of,
    step_of,
    write,
)

from simlab.core.errors import StoreError
from simlab.store import files
from simlab.store.loader import Loader
from simlab.store.store import SnapshotStore

SMALL = 1200
OPERATIONS = ("write_all", "write_at", "sync", "truncate", "rename", "unlink", "sync_directory")


def run_campaign(path, schema, n, note=None, segment_bytes=2500, shard_bytes=6000):
    """Make or resume a whole campaign: what a solver process does."""
    store = SnapshotStore.create(path, schema, n=n, seed=SEED)
    store.recover()
    done = store.done()
    with store.writer(segment_bytes=segment_bytes) as writer:
        for traj in range(n):
            if traj in done:
                continue
            write(writer, schema, traj, note=note)
            if traj % 3 == 2:
                store.seal(shard_bytes=shard_bytes)
    store.seal(final=True, shard_bytes=shard_bytes)
    return store


def assert_complete(store, n):
    """Everything is sealed, once, right, and the store is clean."""
    assert store.verify(deep=True) == []
    assert store.done() == set(range(n))
    status = store.status()
    assert (status.n_segments, status.n_superseded, status.n_unsealed) == (0, 0, 0)
    rows = [traj for shard in store.catalogue.live_shards for traj in shard.traj.tolist()]
    assert sorted(rows) == list(range(n))
    for name in store.fractions:
        assert_split_is_exact(store.schema, store.split(name))


class Acknowledged:
    """A log of what was acknowledged to the solver, readable after its death."""

    def __init__(self, path):
        self.path = path

    def __call__(self, what, traj, step):
        with open(self.path, "ab", buffering=0) as stream:
            stream.write(f"{what} {traj} {step}\n".encode())

    def read(self):
        done, steps = set(), {}
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            what, traj, step = line.split()
            if what == "done":
                done.add(int(traj))
            else:
                steps[int(traj)] = int(step) + 1
        return done, steps


def kill_at_random_moments(tmp_path, n_kills, seed):
    schema = make_schema(1, 2)
    rng = random.Random(seed)
    n, number, kills, mid_seal = 12, 0, 0, 0
    while kills < n_kills:
        path = tmp_path / f"s{number}"
        note = Acknowledged(tmp_path / f"acknowledged{number}")
        reader = Reader(schema)
        number += 1
        while True:
            child = os.fork()
            if child == 0:
                try:
                    run_campaign(path, schema, n, note)
                    os._exit(0)
                except BaseException:
                    os._exit(1)
            time.sleep(rng.uniform(0.0, 0.12))
            os.kill(child, signal.SIGKILL)
            _, code = os.waitpid(child, 0)
            assert code in (0, signal.SIGKILL), "the campaign itself failed"
            if not (path / "campaign.json").exists():
                continue
            store = SnapshotStore.open(path)
            mid_seal += bool(list((path / "inflight").glob("*.part")))
            reader.drain(store, 5)
            store.recover()
            assert store.verify(deep=True) == []
            done, steps = note.read()
            assert done <= store.done()
            reader.drain(store, 5)
            for traj, count in steps.items():
                assert reader.steps[traj] >= count or traj in done
            kills += code == signal.SIGKILL
            if code == 0:
                break
        assert_complete(store, n)
        assert reader.done() == set(range(n))
    return mid_seal


def test_kill_9_at_random_moments(tmp_path):
    kill_at_random_moments(tmp_path, 20, 401)


@pytest.mark.slow
def test_kill_9_at_200_random_moments(tmp_path):
    assert kill_at_random_moments(tmp_path, 200, 402) > 0  # some of them while a shard was written


# Faults at every single operation


class Crash(BaseException):
    """The process dies here: no handler may do anything any more."""


class Faulty:
    """Patched file operations: the ``k``-th one fails, in the main thread."""

    def __init__(self, monkeypatch, at, how):
        self.count = 0
        self.at = at
        self.how = how
        self.is_dead = False
        for name in OPERATIONS:
            monkeypatch.setattr(files, name, self.wrap(name, getattr(files, name)))

    def wrap(self, name, real):
        def operation(*args, **kwargs):
            if self.is_dead:
                raise Crash
            if threading.current_thread() is not threading.main_thread():
                return real(*args, **kwargs)
            self.count += 1
            if self.count != self.at:
                return real(*args, **kwargs)
            if name == "write_all":  # tear it in the middle
                data = b"".join(bytes(item) for item in args[1])
                os.write(args[0], data[: len(data) * 2 // 3])
            if name == "write_at":
                os.pwrite(args[0], bytes(args[1])[: len(args[1]) * 2 // 3], args[2])
            if self.how == "crash":
                self.is_dead = True
                raise Crash
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        return operation


def count_operations(tmp_path, monkeypatch, schema, n):
    with monkeypatch.context() as patch:
        faulty = Faulty(patch, -1, "crash")
        run_campaign(tmp_path / "counted", schema, n, segment_bytes=SMALL)
    return faulty.count


@pytest.mark.parametrize("how", ["crash", "error"])
def test_a_fault_at_every_operation(tmp_path, monkeypatch, how):
    """Exhaustive over a small campaign: the process dies, or the disk reports an error."""
    schema = make_schema(1, 1)
    n = 5
    total = count_operations(tmp_path, monkeypatch, schema, n)
    assert total > 60
    struck = 0
    for at in range(1, total + 1):
        path = tmp_path / f"{how}{at}"
        note = Acknowledged(tmp_path / f"acknowledged-{how}{at}")
        reader = Reader(schema)
        with monkeypatch.context() as patch:
            faulty = Faulty(patch, at, how)
            try:
                run_campaign(path, schema, n, note, segment_bytes=SMALL)
            except Crash:
                assert how == "crash"
            except StoreError:
                assert how == "error"
            gc.collect()  # the writer of the dead process is dead
            struck += faulty.count >= at
        if (path / "campaign.json").exists():
            store = SnapshotStore.open(path)
            reader.drain(store, 3)
            done, steps = note.read()
            assert done <= store.done(), f"operation {at}"
            for traj in steps:
                assert reader.steps[traj] == 1, f"operation {at}"
            store.recover()
            assert done <= store.done(), f"operation {at}"
            assert store.verify(deep=True) == [], f"operation {at}"
        store = run_campaign(path, schema, n, note)
        assert_complete(store, n)
        reader.drain(store, 3)
        assert reader.done() == set(range(n)), f"operation {at}"
    assert struck >= total - 6  # now and then the helper thread is first to sync


def test_what_could_not_be_cut_is_cut_before_the_next_record(tmp_path, monkeypatch):
    """A record is torn, and the disk refuses to cut it off as well."""
    schema = make_schema(1, 2)
    store = SnapshotStore.create(tmp_path / "s", schema, n=2, seed=SEED)
    with store.writer() as writer:
        write(writer, schema, 0)
        writer.begin(sample_of(schema, 1))
        writer.append(1, 0, schema.times[0], step_of(schema, 1, 0))
        with monkeypatch.context() as patch:

            def tear(fd, buffers):
                os.write(fd, b"".join(buffers)[:100])
                raise OSError(errno.EIO, os.strerror(errno.EIO))

            def refuse(fd, size):
                raise OSError(errno.EIO, os.strerror(errno.EIO))

            patch.setattr(files, "write_all", tear)
            patch.setattr(files, "truncate", refuse)
            for _ in range(2):
                with pytest.raises(StoreError, match="nothing was kept of this call"):
                    writer.append(1, 1, schema.times[1], step_of(schema, 1, 1))
        writer.append(1, 1, schema.times[1], step_of(schema, 1, 1))
        writer.finish(1)
    assert store.verify(deep=True) == []
    store.seal(final=True)
    assert_complete(store, 2)


@pytest.mark.parametrize("kind", ["shard", "retired"])
def test_a_line_that_a_follower_saw_and_the_disk_refused(tmp_path, monkeypatch, kind):
    """What is written later, in place of a line that was cut, is seen by that follower too."""
    schema = make_schema(1, 2)
    store = SnapshotStore.create(tmp_path / "s", schema, n=8, seed=SEED)
    with store.writer(segment_bytes=2500) as writer:
        for traj in range(8):
            write(writer, schema, traj)
    follower, reader = SnapshotStore.open(store.path), Reader(schema)
    real = files.sync
    with monkeypatch.context() as patch:

        def sync(fd):
            path = os.readlink(f"/proc/self/fd/{fd}")
            if path.endswith(".jsonl"):
                with open(path) as stream:
                    if stream.read().splitlines()[-1].startswith(f'{{"v":1,"kind":"{kind}"'):
                        reader.drain(follower, 5)
                        raise OSError(errno.EIO, os.strerror(errno.EIO))
            real(fd)

        patch.setattr(files, "sync", sync)
        with pytest.raises(StoreError, match="cannot write"):
            store.seal(final=True)
    store.manifest.append({"kind": "failed", "failed": []})  # another line in its place
    store.seal(final=True)
    assert_complete(store, 8)
    reader.drain(follower, 5)
    assert reader.done() == set(range(8))
    assert follower.verify(deep=True) == []


# Flipped bytes


def flip(path, at, bit):
    with open(path, "r+b") as stream:
        stream.seek(at)
        byte = stream.read(1)[0]
        stream.seek(at)
        stream.write(bytes([byte ^ (1 << bit)]))


def unsealed(path, n=6):
    schema = make_schema(1, 2)
    store = SnapshotStore.create(path, schema, n=n, seed=SEED)
    with store.writer() as writer:
        for traj in range(n):
            write(writer, schema, traj, solved=True)
    return store


def copied(tmp_path):
    """A fresh copy of a good store, in place of the one before."""
    shutil.rmtree(tmp_path / "s", ignore_errors=True)
    shutil.copytree(tmp_path / "good", tmp_path / "s")
    return SnapshotStore.open(tmp_path / "s")


def never_wait_for_the_disk(monkeypatch):
    """Nobody dies here; what is written is there."""
    monkeypatch.setattr(files, "sync", lambda fd: None)
    monkeypatch.setattr(files, "sync_directory", lambda path: None)


def read_split(store):
    assert_split_is_exact(store.schema, store.split("train"))


def read_windows(store):
    for batch in Loader(store, "train", ahead=1).batches(4):
        for i, (traj, step) in enumerate(zip(batch.ids, batch.steps, strict=True)):
            expected = sample_of(store.schema, traj).fields["k"]
            assert np.array_equal(batch.inputs["k"][i], expected.astype(np.float32))
            for ahead in range(2):
                expected = step_of(store.schema, traj, step + ahead)["u"]
                assert np.array_equal(batch.outputs["u"][i, ahead], expected.astype(np.float32))


def read_solves(store):
    for row in store.solves("train"):
        expected = solve_of(row["index"], row["step"])
        assert (row["order"], row["iterations"]) == (expected.order, expected.iterations)
        assert row["solver"] == expected.solver


READERS = (read_split, read_windows, read_solves)
FLIPS = [pytest.param(25, id="25"), pytest.param(1000, id="1000", marks=pytest.mark.slow)]


@pytest.mark.parametrize("n_flips", FLIPS)
def test_flipped_bytes_in_a_shard_are_never_read_as_data(tmp_path, n_flips):
    store = unsealed(tmp_path / "s")
    store.seal(final=True)
    (path,) = (store.path / "data" / "train").glob("*.h5")
    rng = random.Random(77)
    refused = dict.fromkeys(READERS, 0)
    gc.freeze()  # what is collected below is a flip's only
    for _ in range(n_flips):
        at, bit = rng.randrange(path.stat().st_size), rng.randrange(8)
        flip(path, at, bit)
        again = SnapshotStore.open(store.path)
        assert len(again.verify(deep=True)) == 1
        for reader in READERS:
            try:
                reader(again)
            except StoreError:
                refused[reader] += 1
        flip(path, at, bit)
        del again
        gc.collect()
    gc.unfreeze()
    assert min(refused.values()) > 0
    assert SnapshotStore.open(store.path).verify(deep=True) == []


def test_what_has_no_checksum_in_a_shard_is_not_looked_at_by_readers(tmp_path):
    """HDF5 searches a damaged heap, where text of variable length lies, for ever."""
    store = unsealed(tmp_path / "s")
    store.seal(final=True)
    for path in (store.path / "data").glob("*/*.h5"):
        data = bytearray(path.read_bytes())
        at = data.find(b"GCOL")
        assert at > 0
        while at > 0:
            data[at + 16 : at + 512] = bytes(496)  # the heads of its objects
            at = data.find(b"GCOL", at + 1)
        path.write_bytes(data)
    child = os.fork()
    if child == 0:
        try:
            for reader in READERS:
                reader(SnapshotStore.open(store.path))
            os._exit(0)
        finally:
            os._exit(1)
    end = time.monotonic() + 30
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.05)
    assert ended[1] == 0


def test_a_damaged_shard_goes_to_quarantine_and_is_made_again(tmp_path):
    from simlab.store.verify import quarantine_damaged

    store = unsealed(tmp_path / "s")
    store.seal(final=True)
    (path,) = (store.path / "data" / "train").glob("*.h5")
    lost = set(store.split("train").ids.tolist())
    flip(path, path.stat().st_size // 2, 3)
    again = SnapshotStore.open(store.path)
    assert again.verify() == []  # only a deep look finds it
    assert quarantine_damaged(again, deep=True) == [f"train/{path.name}"]
    again = SnapshotStore.open(store.path)
    assert again.verify(deep=True) == []
    assert set(range(6)) - again.done() == lost
    assert "sha256" in (store.path / "quarantine" / (path.name + ".reason")).read_text()
    assert_complete(run_campaign(store.path, store.schema, 6), 6)


@pytest.mark.parametrize("n_flips", FLIPS)
def test_flipped_bytes_in_a_segment_are_found_and_mended(tmp_path, monkeypatch, n_flips):
    never_wait_for_the_disk(monkeypatch)
    unsealed(tmp_path / "good")
    rng = random.Random(78)
    for _ in range(n_flips):
        store = copied(tmp_path)
        (path,) = (store.path / "inflight").glob("*.seg")
        flip(path, rng.randrange(path.stat().st_size), rng.randrange(8))
        again = SnapshotStore.open(store.path)
        problems = again.verify(deep=True)
        reader = Reader(store.schema)
        reader.drain(again)  # checks every value that it is given
        if not problems:  # it hit padding
            assert reader.done() == set(range(6))
        report = again.recover()
        assert bool(problems) == bool(report.quarantined or report.truncated)
        assert again.verify(deep=True) == []
        assert_complete(run_campaign(store.path, store.schema, 6), 6)


@pytest.mark.parametrize("n_flips", FLIPS)
def test_flipped_bytes_in_the_manifest_are_found_and_mended(tmp_path, monkeypatch, n_flips):
    never_wait_for_the_disk(monkeypatch)
    unsealed(tmp_path / "good").seal(final=True)
    rng = random.Random(79)
    for _ in range(n_flips):
        store = copied(tmp_path)
        (path,) = (store.path / "manifest").glob("*.jsonl")
        reader = Reader(store.schema)
        reader.drain(store)
        flip(path, rng.randrange(path.stat().st_size), rng.randrange(8))
        again = SnapshotStore.open(store.path)
        assert again.verify() != []
        again.recover()
        again = SnapshotStore.open(store.path)
        assert again.verify(deep=True) == []
        assert_complete(run_campaign(store.path, store.schema, 6), 6)
        reader.drain(again)
        assert reader.done() == set(range(6))


def test_a_foreign_file_among_the_data_is_reported_not_touched(tmp_path):
    store = unsealed(tmp_path / "s")
    store.seal(final=True)
    foreign = store.path / "data" / "train" / "mine.h5"
    with h5py.File(foreign, "w") as file:
        file["x"] = np.zeros(3)
    store.recover()
    assert foreign.exists()
    assert any("mine.h5" in line for line in store.verify())


# A full disk


def test_a_full_disk_loses_nothing_and_work_goes_on_when_there_is_space(tmp_path):
    """The kernel refuses writes beyond a file size, in the middle of a record."""
    schema = make_schema(2, 3)
    store = SnapshotStore.create(tmp_path / "s", schema, n=20, seed=SEED)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    writer = store.writer()
    failures, next_step = 0, 0
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
        for traj in range(20):
            while True:
                try:
                    if next_step == 0 and traj not in writer._open:
                        writer.begin(sample_of(schema, traj))
                    while next_step < 3:
                        fields = step_of(schema, traj, next_step)
                        writer.append(traj, next_step, schema.times[next_step], fields)
                        next_step += 1
                    writer.finish(traj)
                    break
                except StoreError as error:
                    failures += "cannot write" in str(error)
                    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
                    resource.setrlimit(resource.RLIMIT_FSIZE, (limit + 4_321, hard))
            next_step = 0
        writer.close()
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
        with pytest.raises(StoreError):
            store.seal(final=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert failures >= 5
    store.recover()
    assert len(store.done()) == 20
    store.seal(final=True)
    assert_complete(store, 20)


# Many at once


class Team:
    """Processes that must all end well."""

    def __init__(self):
        self.children = {}

    def start(self, job, *words):
        child = os.fork()
        if child == 0:
            try:
                job(*words)
                os._exit(0)
            except BaseException:
                os.write(2, f"{job.__name__}: {traceback.format_exc()}\n".encode())
                os._exit(1)
        self.children[child] = job.__name__

    def join(self):
        ended = {name: os.waitpid(child, 0)[1] for child, name in self.children.items()}
        assert set(ended.values()) == {0}, ended


def many_at_once(tmp_path, seconds, segment_bytes):
    """Two writers, a sealer, a follower and a reader of what is sealed, all at the same time."""
    schema = make_schema(2, 3)
    path = tmp_path / "s"
    n = 1 + int(2000 * seconds)
    store = SnapshotStore.create(path, schema, n=n, seed=SEED)
    writing, last = Team(), time.monotonic() + seconds
    written = [tmp_path / f"written{number}" for number in (0, 1)]

    def writer_of(number):
        mine = SnapshotStore.create(path, schema, n=n, seed=SEED)
        with mine.writer(segment_bytes=segment_bytes) as writer:
            for traj in range(number, n, 2):
                if time.monotonic() > last:
                    break
                write(writer, schema, traj, note=Acknowledged(tmp_path / f"note{number}"))
        written[number].touch()

    def has_ended():
        return all(item.exists() for item in written)

    def sealer():
        mine = SnapshotStore.open(path)
        is_last = False
        while not is_last:
            is_last = has_ended()
            mine.seal(shard_bytes=4 * segment_bytes)
            mine.recover()  # harms no live writer
            time.sleep(0.01)

    def follower():
        mine, reader = SnapshotStore.open(path), Reader(schema)
        is_last = False
        while not is_last:
            is_last = has_ended()
            while reader.pull(mine, 17):
                pass
            time.sleep(0.002)
        reader.drain(mine)
        done = set().union(*(Acknowledged(tmp_path / f"note{k}").read()[0] for k in (0, 1)))
        assert reader.done() == done
        assert all(count == 3 for count in reader.steps.values())

    def reader_of_sealed():
        rng = np.random.default_rng(SEED)
        seen, rounds = 0, 0
        while not has_ended():
            mine = SnapshotStore.open(path)
            split = mine.split("train")
            assert len(split) >= seen, "what was sealed is gone"
            seen = len(split)
            for number in rng.integers(seen, size=4 * (seen > 0)).tolist():
                found = split[number]
                for step in range(3):
                    for name, values in step_of(schema, int(split.ids[number]), step).items():
                        assert np.array_equal(found.outputs[name][step], values.astype(np.float32))
            loader = Loader(mine, "train", ahead=2, seed=rounds)
            for batch in itertools.islice(loader.batches(8), 3):
                assert batch.outputs["u"].shape[1:] == (3, 7, 5)
            rounds += 1
        assert seen
        assert rounds > 2

    for job, *words in (
        (writer_of, 0),
        (writer_of, 1),
        (sealer,),
        (follower,),
        (reader_of_sealed,),
    ):
        writing.start(job, *words)
    writing.join()
    store.seal(final=True)
    store = SnapshotStore.open(path)
    notes = [Acknowledged(tmp_path / f"note{number}").read() for number in (0, 1)]
    done = notes[0][0] | notes[1][0]
    assert store.done() == done
    assert store.verify(deep=True) == []
    print(f"{len(done)} trajectories, {len(store.catalogue.live_shards)} shards")
    assert len(done) > 30
    rows = [traj for shard in store.catalogue.live_shards for traj in shard.traj.tolist()]
    assert sorted(rows) == sorted(done)
    late = Reader(schema)
    late.drain(store, 100)
    assert late.done() == done


def test_two_writers_a_sealer_and_two_readers(tmp_path):
    many_at_once(tmp_path, 4, 12_000)


@pytest.mark.slow
def test_two_writers_a_sealer_and_two_readers_for_a_minute(tmp_path):
    many_at_once(tmp_path, 60, 60_000)


def test_a_process_that_forgets_to_close_its_writer_still_ends(tmp_path):
    """It ends while the helper thread syncs; what was finished is there."""
    script = """
import sys
import numpy as np
from simlab.core.samples import Sample
from simlab.store.schema import Axis, FieldSpec, Schema
from simlab.store.store import SnapshotStore
axes = (Axis("x", tuple(np.arange(512.0).tolist())), Axis("y", tuple(np.arange(512.0).tolist())))
schema = Schema("big", axes, (FieldSpec("u"),))
store = SnapshotStore.create(sys.argv[1], schema, n=100, seed=3)
writer = store.writer()
for traj in range(100):
    writer.begin(Sample(traj, 3))
    writer.append(traj, 0, 0.0, {"u": np.full((512, 512), float(traj))})
    writer.finish(traj)
"""
    words = [sys.executable, "-c", script, str(tmp_path / "s")]
    for _ in range(3):
        ended = subprocess.run(words, check=True, timeout=60, capture_output=True, text=True)
        assert ended.stderr == ""
        store = SnapshotStore.open(tmp_path / "s")
        store.recover()
        store.seal(final=True)
        assert len(store.done()) == 100
        shutil.rmtree(tmp_path / "s")


@pytest.mark.slow
def test_100_000_trajectories_are_counted_fast(tmp_path):
    from simlab.core.samples import Sample
    from simlab.store.schema import Axis, FieldSpec, Schema

    n = 100_000
    schema = Schema("many", (Axis("x", (0.0, 1.0)),), (FieldSpec("u"),), parameters={"mu": "1"})
    store = SnapshotStore.create(tmp_path / "s", schema, n=n, seed=SEED)
    with store.writer(segment_bytes=1 << 20) as writer:
        for traj in range(n):
            writer.begin(Sample(traj, SEED, {"mu": traj / n}))
            writer.append(traj, 0, 0.0, {"u": np.array([traj, 1.0])})
            writer.finish(traj)
    store.seal(final=True, shard_bytes=8 << 20)
    start = time.process_time()
    again = SnapshotStore.open(store.path)
    status = again.status()
    seconds = time.process_time() - start
    assert sum(item.done for item in status.splits.values()) == n
    start = time.process_time()
    split = again.split("train")
    assert split[79_999].outputs["u"][0, 0] == split.ids[79_999]
    print(f"status {seconds:.2f} s, loader {time.process_time() - start:.2f} s")
    assert seconds < 2.0
    assert time.process_time() - start < 5.0
