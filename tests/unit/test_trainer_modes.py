"""Deterministic order, replay of what happened, averaged weights: bit for bit."""

import threading
import time

import numpy as np
import pytest
import torch
from learn_helpers import bare_schema, sample_of, trajectories

from simlab.core.config import build
from simlab.core.errors import ConfigError, StoreError
from simlab.learn.buffers import buffers
from simlab.learn.model import Model
from simlab.learn.ordered import OrderedStream
from simlab.learn.settings import TrainSettings
from simlab.learn.stream import FollowedStream, MemoryStream
from simlab.learn.trainer import ARRIVALS, Trainer
from simlab.store.store import SnapshotStore

T, N = 4, 30
SCHEMA = bare_schema(n_times=T)
DATA = trajectories(SCHEMA, N)


def settings_with(**changes):
    plain = {
        "operator": {"kind": "mlp", "hidden": (8,)},
        "buffer": {"kind": "reservoir", "capacity": 40, "threshold": 8},
        "n_batches": 50,
        "batch": 4,
        "threads": 1,
        "pilot": 5,
    }
    return build(TrainSettings, plain | changes)


def write_all(store, order, pause=0.0, fail=()):
    """Write with three open trajectories at a time, steps interleaved."""
    with store.writer() as writer:
        for group in np.array_split(np.array(order), max(len(order) // 3, 1)):
            for traj in group.tolist():
                writer.begin(sample_of(SCHEMA, traj))
            for step in range(T):
                for traj in group.tolist():
                    if step < (1 if traj in fail else T):
                        fields = {"u": DATA[traj].outputs["u"][step]}
                        writer.append(traj, step, float(SCHEMA.times[step]), fields)
                time.sleep(pause)
            for traj in group.tolist():
                if traj in fail:
                    writer.fail(traj, "diverged")
                else:
                    writer.finish(traj)


def finished(path, fail=()):
    store = SnapshotStore.create(path, SCHEMA, n=N, seed=515)
    write_all(store, list(range(N)), fail=fail)
    return store


def same(one, two):
    other = two.model.tensors()
    return all(torch.equal(value, other[name]) for name, value in one.model.tensors().items())


@pytest.mark.parametrize("kind", ["reservoir", "replay", "firo"])
def test_deterministic_weights_do_not_depend_on_who_is_fast(kind, tmp_path):
    """Order and pace of the solvers, shards or segments, memory or store: the same weights."""
    buffer = {"kind": kind, "capacity": 40, "threshold": 8}
    settings = settings_with(mode="deterministic", buffer=buffer, lanes=5)
    straight = Trainer(settings, SCHEMA)
    straight.run(FollowedStream(finished(tmp_path / "a").path))
    live = SnapshotStore.create(tmp_path / "b", SCHEMA, n=N, seed=515)
    order = np.random.default_rng(7).permutation(N).tolist()
    producer = threading.Thread(target=write_all, args=(live, order, 0.005))
    slow = Trainer(settings, SCHEMA)
    producer.start()
    slow.run(FollowedStream(live.path))
    producer.join()
    assert same(straight, slow)
    assert straight.buffer.n_put == slow.buffer.n_put
    sealed = finished(tmp_path / "c")
    sealed.seal(final=True)
    third = Trainer(settings, SCHEMA)
    third.run(FollowedStream(sealed.path))
    assert same(straight, third)
    if kind != "replay":  # whose archive is whole at once in memory
        train = [DATA[traj] for traj in sealed.ids("train")]
        fourth = Trainer(settings, SCHEMA)
        fourth.run(MemoryStream(train, SCHEMA, 4))
        assert same(straight, fourth)


def test_live_weights_do(tmp_path):
    """What the test above would miss if all orders gave the same."""
    one = Trainer(settings_with(), SCHEMA)
    one.run(MemoryStream(DATA, SCHEMA, 4))
    two = Trainer(settings_with(), SCHEMA)
    two.run(MemoryStream(DATA, SCHEMA, 5))
    assert not same(one, two)


@pytest.mark.parametrize("mode", ["live", "deterministic"])
@pytest.mark.parametrize("kind", sorted(buffers.kinds()))
def test_resumed_and_replayed_equal_straight(kind, mode, tmp_path):
    """To 2k in one go; to k, killed, on to 2k; and once more from the log of arrivals."""
    store = finished(tmp_path / "store", fail=(3, 7))
    table = {"kind": kind, "capacity": 40}
    settings = settings_with(buffer=table, mode=mode, ema=0.9, n_batches=60)
    straight = Trainer(settings, SCHEMA, tmp_path / "straight")
    straight.run(FollowedStream(store.path))
    first = Trainer(settings, SCHEMA, tmp_path / "parts")
    first.run(FollowedStream(store.path), stop=lambda: first.batch >= 30)
    for _ in range(9):  # work that is lost: nothing of it may be left after the resume
        first._feed.advance()
        first.step(first._feed.rows(4))
    first._feed._log.flush()
    second = Trainer(settings, SCHEMA, tmp_path / "parts")
    stream = FollowedStream(store.path)
    assert second.resume(stream)
    assert second.batch == 30
    second.run(stream)
    assert same(straight, second)
    logs = [(tmp_path / name / ARRIVALS).read_text() for name in ("straight", "parts")]
    assert logs[0] == logs[1]
    store.seal(final=True)
    again = settings_with(
        buffer=table,
        mode="replay",
        ema=0.9,
        n_batches=60,
        arrivals=str(tmp_path / "parts" / ARRIVALS),
    )
    replayed = Trainer(again, SCHEMA, tmp_path / "replayed")
    replayed.run(FollowedStream(store.path), stop=lambda: replayed.batch >= 20)
    last = Trainer(again, SCHEMA, tmp_path / "replayed")
    stream = FollowedStream(store.path)
    assert last.resume(stream)
    last.run(stream)
    assert last.batch == 60
    assert same(straight, last)


def test_a_live_run_within_seconds_is_replayed(tmp_path):
    """Producer and trainer side by side, a budget of seconds: learning rates come from the log."""
    store = SnapshotStore.create(tmp_path / "store", SCHEMA, n=N, seed=515)
    producer = threading.Thread(target=write_all, args=(store, list(range(N)), 0.004))
    settings = settings_with(n_batches=10**6, max_seconds=1.0)
    live = Trainer(settings, SCHEMA, tmp_path / "live")
    producer.start()
    live.run(FollowedStream(store.path))
    producer.join()
    again = settings_with(
        n_batches=10**6,
        max_seconds=1.0,
        mode="replay",
        arrivals=str(tmp_path / "live" / ARRIVALS),
    )
    replayed = Trainer(again, SCHEMA)
    replayed.run(FollowedStream(store.path))
    assert replayed.batch == live.batch > 0
    assert same(live, replayed)
    other = settings_with(
        mode="replay",
        arrivals=str(tmp_path / "live" / ARRIVALS),
        buffer={"kind": "fifo", "capacity": 4},
    )
    with pytest.raises(StoreError, match=r"arrivals.log: the buffer refuses step \d of traj"):
        Trainer(other, SCHEMA).run(FollowedStream(store.path))


def test_every_item_of_the_log_is_there_once_per_pass(tmp_path):
    store = finished(tmp_path / "store")
    trainer = Trainer(
        settings_with(buffer={"kind": "reservoir", "capacity": 200}), SCHEMA, tmp_path / "m"
    )
    trainer.run(FollowedStream(store.path))
    lines = (tmp_path / "m" / ARRIVALS).read_text().splitlines()
    puts = sorted(tuple(map(int, line.split()[1:])) for line in lines if line[0] == "p")
    assert puts == [(traj, step) for traj in store.ids("train").tolist() for step in range(T)]
    assert sum(line[0] == "b" for line in lines) == 50


def test_order_is_round_robin():
    stream = OrderedStream(MemoryStream(DATA[:5], SCHEMA, 9), lanes=2)
    items = []
    while not stream.is_exhausted:
        items += stream.poll(3)
    keys = [(item.traj, item.step) for item in items]
    pairs = [(traj + lane, step) for traj in (0, 2) for step in range(T) for lane in (0, 1)]
    assert keys == pairs + [(4, step) for step in range(T)]
    assert stream.finished == list(range(5))


def test_an_end_at_a_full_poll_shows_at_the_next():
    """Whether the end was known already when the last items came must make no difference."""
    stream = OrderedStream(MemoryStream(DATA[:2], SCHEMA, 9), lanes=2)
    assert len(stream.poll(8)) == 8
    assert not stream.is_exhausted
    assert stream.poll(8) == []
    assert stream.is_exhausted


def test_averaged_weights_are_what_is_validated_and_saved(tmp_path):
    def run(ema):
        trainer = Trainer(settings_with(ema=ema, n_batches=12), SCHEMA, tmp_path / str(ema))
        seen, inner = [], trainer.step

        def step(rows):
            value = inner(rows)
            seen.append([p.detach().clone() for p in trainer.model.network.parameters()])
            return value

        trainer.step = step
        trainer.run(MemoryStream(DATA, SCHEMA, 4), DATA[:3])
        return trainer, seen

    (plain, raw), (averaged, same_raw) = run(0.0), run(0.8)
    for one, two in zip(raw, same_raw, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    start = Trainer(settings_with(), SCHEMA).model.network
    expected = [p.detach().clone() for p in start.parameters()]
    for batch, weights in enumerate(raw, start=1):
        decay = min(0.8, (1 + batch) / (10 + batch))
        expected = [decay * a + (1 - decay) * w for a, w in zip(expected, weights, strict=True)]
    for value, wanted in zip(averaged.model.network.parameters(), expected, strict=True):
        torch.testing.assert_close(value.detach(), wanted)
    assert averaged.model.validation != plain.model.validation
    loaded = Model.load(tmp_path / "0.8")
    assert all(torch.equal(v, loaded.tensors()[n]) for n, v in averaged.model.tensors().items())
    again = Trainer(settings_with(ema=0.8, n_batches=12), SCHEMA, tmp_path / "0.8")
    stream = MemoryStream(DATA, SCHEMA, 4)
    assert again.resume(stream)
    again.run(stream, DATA[:3])
    assert same(averaged, again)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "deterministic", "max_seconds": 3.0}, "max_seconds: seconds differ"),
        ({"mode": "replay"}, "arrivals: give "),
        ({"arrivals": "x.log"}, "arrivals: give "),
        ({"ema": 1.0}, "ema"),
    ],
)
def test_settings_that_make_no_sense(changes, message):
    with pytest.raises(ConfigError, match=message):
        settings_with(**changes)


def test_a_missing_log_says_so(tmp_path):
    settings = settings_with(mode="replay", arrivals=str(tmp_path / "none.log"))
    with pytest.raises(StoreError, match=r"none.log: the log of arrivals cannot be read"):
        Trainer(settings, SCHEMA).run(MemoryStream(DATA, SCHEMA, 4))


def puts_before_batches(path):
    """Return how many items had entered the buffer before each batch."""
    n, found = 0, []
    for line in path.read_text().splitlines():
        n += line.startswith("p ")
        if line.startswith("b "):
            found.append(n)
    return np.array(found)


def test_deterministic_training_takes_fresh_items_and_no_more(tmp_path):
    settings = settings_with(mode="deterministic", fresh=1, n_batches=60)
    trainer = Trainer(settings, SCHEMA, tmp_path / "model")
    trainer.run(FollowedStream(finished(tmp_path / "store").path))
    steps = np.diff(puts_before_batches(tmp_path / "model" / ARRIVALS))
    assert steps.max() == 1
    assert np.count_nonzero(steps) > 40


@pytest.mark.parametrize("fresh", [0, 3])
def test_live_training_waits_for_fresh_items(fresh, tmp_path):
    store = SnapshotStore.create(tmp_path / "store", SCHEMA, n=N, seed=515)
    producer = threading.Thread(target=write_all, args=(store, list(range(N)), 0.02))
    n_batches = 25  # three for each are fewer items than there are
    trainer = Trainer(settings_with(fresh=fresh, n_batches=n_batches), SCHEMA, tmp_path / "model")
    producer.start()
    trainer.run(FollowedStream(store.path))
    producer.join()
    puts = puts_before_batches(tmp_path / "model" / ARRIVALS)
    assert len(puts) == n_batches
    assert (puts >= 3 * np.arange(1, n_batches + 1)).all() == bool(fresh)  # else it runs ahead


@pytest.mark.parametrize("mode", ["live", "deterministic"])
def test_a_buffer_smaller_than_any_trajectory_in_step_holds_nothing_up(mode, tmp_path):
    """All trajectories advance in step, so the buffer is full before one is whole."""
    store = SnapshotStore.create(tmp_path / "store", SCHEMA, n=N, seed=515)
    with store.writer() as writer:
        for traj in range(N):
            writer.begin(sample_of(SCHEMA, traj))
        for step, time_now in enumerate(SCHEMA.times):
            for traj in range(N):
                fields = {"u": DATA[traj].outputs["u"][step]}
                writer.append(traj, step, float(time_now), fields)
        for traj in range(N):
            writer.finish(traj)
    buffer = {"kind": "fifo", "capacity": 6}
    settings = settings_with(mode=mode, lanes=20, buffer=buffer, n_batches=10, pilot=2)
    trainer = Trainer(settings, SCHEMA)
    deadline = time.monotonic() + 60
    trainer.run(FollowedStream(store.path), stop=lambda: time.monotonic() > deadline)
    assert trainer.batch == 10
