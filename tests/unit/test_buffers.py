"""Buffers: what they may drop, what they hand out, how evenly, and what their state holds."""

import json
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from scipy.stats import chi2, chisquare

from simlab.core.config import as_table
from simlab.core.errors import ConfigError
from simlab.learn.buffers import FIFO, FIRO, ReplayMix, Reservoir, buffers

KINDS = sorted(buffers.kinds())
RESERVOIRS = ["batch_reservoir", "replay", "reservoir", "time_stratified"]


def row(number):
    return np.array([number, -number], dtype=np.float32)


def numbers(batch):
    assert np.array_equal(batch[:, 1], -batch[:, 0])
    return batch[:, 0].astype(int).tolist()


def make(kind, capacity=8, seed=3301, **more):
    return buffers.build({"kind": kind, "capacity": capacity, **more}).build(2, seed)


class ReservoirLaw(RuleBasedStateMachine):
    """Any sequence of puts and gets, against a model that knows what was put and what was seen."""

    @initialize(
        kind=st.sampled_from(RESERVOIRS),
        capacity=st.integers(1, 9),
        threshold=st.integers(0, 4),
        seed=st.integers(0, 999),
    )
    def build(self, kind, capacity, threshold, seed):
        self.kind, self.threshold = kind, min(threshold, capacity - 1)
        self.buffer = make(kind, capacity, seed, threshold=self.threshold)
        self.unseen, self.seen, self.n = set(), set(), 0
        self.finished = False

    @rule()
    def put(self):
        accepted = self.buffer.put(row(self.n), self.n % 5)
        assert accepted == (len(self.unseen) < self.buffer.capacity)
        if accepted:
            self.unseen.add(self.n)
        self.n += 1

    @rule(size=st.integers(1, 6))
    def get(self, size):
        held = len(self.buffer)
        batch = self.buffer.get(size)
        is_short = self.kind == "batch_reservoir" and held < min(size, self.buffer.capacity)
        if held == 0 or ((held <= self.threshold or is_short) and not self.finished):
            assert batch is None
            return
        drawn = numbers(batch)
        assert len(drawn) == len(set(drawn)) == min(size, held)
        assert set(drawn) <= self.unseen | self.seen
        self.seen |= set(drawn)
        self.unseen -= set(drawn)

    @rule()
    def finish(self):
        self.buffer.finish()
        self.finished = True

    @invariant()
    def no_unseen_item_is_lost(self):
        if hasattr(self, "buffer"):
            assert self.buffer.n_unseen == len(self.unseen)
            assert self.buffer.n_seen == len(self.buffer) - len(self.unseen)
            assert self.buffer.n_put == len(self.unseen) + len(self.seen)
            assert len(self.buffer) <= self.buffer.capacity
            state = self.buffer.state()
            assert state["draws"][0] == state["unseen"]
            assert sum(state["ages"]) == sum(state["draws"]) == len(self.buffer)

    def teardown(self):
        if hasattr(self, "buffer") and len(self.buffer):
            self.buffer.finish()
            for _ in range(2000):
                if not self.unseen:
                    break
                self.get(3)
            assert not self.unseen  # everything accepted was drawn at least once


TestReservoirLaw = ReservoirLaw.TestCase
TestReservoirLaw.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)


@pytest.mark.parametrize("kind", RESERVOIRS)
def test_reservoirs_pick_uniformly(kind):
    """Over 1e5 draws; equal numbers of each time, so that strata do not show."""
    buffer = make(kind, capacity=50, threshold=0)
    for number in range(50):
        buffer.put(row(number), number % 5)
    while buffer.n_unseen:
        buffer.get(7)
    counts = np.zeros(50)
    for _ in range(2100):
        np.add.at(counts, numbers(buffer.get(48)), 1)
    assert counts.sum() > 1e5
    assert chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("kind", RESERVOIRS)
def test_unseen_and_seen_are_drawn_and_victims_chosen_uniformly(kind):
    """Over many seeds: 30 items seen and 20 not, 25 drawn, then 10 put for 10 seen ones."""
    drawn, gone = np.zeros(50), np.zeros(50)
    start = make(kind, capacity=50, threshold=0)
    for number in range(30):
        start.put(row(number), number % 5)
    while start.n_unseen:
        start.get(30)
    for number in range(30, 50):
        start.put(row(number), number % 5)
    plain = start.state_dict()
    for seed in range(600):
        buffer = make(kind, capacity=50, seed=seed, threshold=0)
        own = json.loads(buffer.state_dict()["plain"])["rng"]
        state = plain | {"plain": json.dumps(json.loads(plain["plain"]) | {"rng": own})}
        buffer.load_state_dict(state)
        for number in range(10):
            assert buffer.put(row(100 + number), number % 5)
        held = buffer.columns([0])[:, 0].astype(int)
        gone[np.setdiff1d(np.arange(50), held)] += 1
        buffer.load_state_dict(state)
        np.add.at(drawn, numbers(buffer.get(25)), 1)
    assert gone[30:].sum() == 0  # nobody has seen these
    assert gone.sum() == 6_000
    # without replacement the counts spread less than a multinomial's: chi-square errs on the
    # side of a low statistic, so both ends are looked at
    for counts, share in ((drawn, 25 / 50), (gone[:30], 10 / 30)):
        expected = 600 * share
        statistic = np.sum((counts - expected) ** 2) / (expected * (1 - share))
        assert 1e-3 < chi2(len(counts) - 1).sf(statistic) < 1 - 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_costs_little_beside_its_copy(kind):
    """Processor time of put and get, a sample of 16 KiB each, less that of two copies of it."""
    width, n, batch = 4096, 8000, 8
    buffer = buffers.build({"kind": kind, "capacity": 1500}).build(width, 3)
    rows = np.ones((1500, width), dtype=np.float32)
    slab = np.empty_like(rows)

    def through_the_buffer():
        for i in range(0, n, batch):
            for k in range(batch):
                buffer.put(rows[(i + k) % 1500], (i + k) % 100, i)
            buffer.get(batch)

    def copied():
        for i in range(0, n, batch):
            places = [(7919 * (i + k)) % 1500 for k in range(batch)]
            for k in range(batch):
                slab[places[k]] = rows[(i + k) % 1500]
            slab[places]

    def seconds(work):
        begun = time.process_time()
        work()
        return time.process_time() - begun

    through_the_buffer()
    spent = min(seconds(through_the_buffer) for _ in range(4)) - min(
        seconds(copied) for _ in range(4)
    )
    assert spent / n < 30e-6


def test_time_stratified_picks_times_uniformly():
    buffer = make("time_stratified", capacity=100, threshold=0, width=2)
    steps = [0] * 70 + [1] * 10 + [2, 3] + [9] * 18
    for number, step in enumerate(steps):
        buffer.put(row(number), step)
    counts = np.zeros(100)
    for _ in range(8000):
        np.add.at(counts, numbers(buffer.get(1)), 1)
    by_stratum = [counts[:80].sum(), counts[80:82].sum(), counts[82:].sum()]
    assert chisquare(by_stratum).pvalue > 1e-3
    assert chisquare(counts[:80]).pvalue > 1e-3
    drawn = numbers(buffer.get(60))  # more than the small strata hold: each still once
    assert len(set(drawn)) == 60
    assert {80, 81, *range(82, 100)} <= set(drawn)


class Committed:
    """An archive of rows that the buffer never saw."""

    def __init__(self, n):
        self.n, self.reads = n, []

    def __len__(self):
        return self.n

    def rows(self, picks):
        self.reads += picks.tolist()
        return np.stack([row(1000 + i) for i in picks]) if len(picks) else np.zeros((0, 2))

    def items(self, picks):
        return np.stack([1000 + picks, picks % 3], axis=1)


@pytest.mark.parametrize("q", [0.0, 0.5, 0.8, 1.0])
def test_replay_mixes_as_q_says(q):
    buffer, archive = make("replay", capacity=20, threshold=0, q=q), Committed(40)
    buffer.draw_from(archive)
    for number in range(20):
        buffer.put(row(number))
    drawn = [number for _ in range(1000) for number in numbers(buffer.get(10))]
    old = [number - 1000 for number in drawn if number >= 1000]
    assert old == archive.reads if q == 1 else sorted(old) == sorted(archive.reads)
    assert len(drawn) == buffer.n_got == 10_000
    assert abs(len(old) - 1e4 * q) <= 3 * np.sqrt(1e4 * q * (1 - q))
    assert buffer.state()["replayed"] == len(old)
    if q:
        assert chisquare(np.bincount(old, minlength=40)).pvalue > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_batches_say_whose_rows_they_are(kind):
    """Trajectory and step of every row, in their order, drawn anew or restored."""
    buffer, restored = make(kind, capacity=12), make(kind, capacity=12)
    assert buffer.drawn.shape == (0, 2)
    for one in (buffer, restored):
        one.draw_from(Committed(40))
    for number in range(60):
        buffer.put(row(number), number % 3, traj=number)
        batch = buffer.get(4)
        if batch is not None:
            assert buffer.drawn.tolist() == [
                [n, (n - 1000) % 3 if n >= 1000 else n % 3] for n in numbers(batch)
            ]
    restored.load_state_dict(buffer.state_dict())
    assert np.array_equal(restored.drawn, buffer.drawn)
    assert len(restored.drawn) > 0
    batch = restored.get(3)
    assert batch is None or restored.drawn[:, 0].tolist() == numbers(batch)
    buffer.put(row(7), 2)
    buffer.finish()
    assert -1 in [traj for _ in range(50) if buffer.get(9) is not None for traj, _ in buffer.drawn]


def test_replay_waits_for_more_than_the_buffer_holds():
    buffer, archive = make("replay", capacity=20, threshold=0, q=1.0), Committed(20)
    buffer.draw_from(archive)
    assert buffer.get(3) is None
    buffer.put(row(1))
    assert numbers(buffer.get(3)) == [1]
    archive.n = 21
    assert min(numbers(buffer.get(3))) >= 1000


def test_batch_reservoir_hands_out_whole_batches():
    buffer = make("batch_reservoir", capacity=8, threshold=0)
    for number in range(3):
        buffer.put(row(number))
    assert buffer.get(4) is None
    assert sorted(numbers(buffer.get(3))) == [0, 1, 2]
    buffer.finish()
    assert sorted(numbers(buffer.get(4))) == [0, 1, 2]


def test_state_tells_draws_and_ages():
    buffer = make("reservoir", capacity=4, threshold=0)
    for number in range(4):
        buffer.put(row(number), step=number)
    for _ in range(3):
        buffer.get(4)
    buffer.put(row(9))
    state = buffer.state()
    assert state["draws"] == [1, 0, 0, 3, 0, 0, 0, 0, 0]
    assert (state["unseen"], state["seen"], state["put"], state["got"]) == (1, 3, 5, 12)
    assert 4 <= state["oldest"] <= 5
    assert sum(state["ages"]) == 4
    assert 9 in buffer.columns([0])
    assert buffer.columns([0, 1]).shape == (4, 2)


@pytest.mark.parametrize("kind", RESERVOIRS)
def test_reservoirs_repeat_as_the_rates_say(kind):
    """In steady state each item is drawn get/put times on average, whatever its place in time."""
    buffer, ratio, counts = make(kind, capacity=100, threshold=0), 4, np.zeros(4000)
    for number in range(4000):
        assert buffer.put(row(number), number % 10)
        if number >= 50:
            np.add.at(counts, numbers(buffer.get(ratio)), 1)
    steady = counts[300:3200]
    error = 3 * steady.std() / np.sqrt(len(steady))
    assert abs(steady.mean() - ratio) < error + 1e-9


def test_fifo_keeps_order_and_hands_out_once():
    buffer = make("fifo", capacity=5)
    assert [buffer.put(row(i)) for i in range(7)] == [True] * 5 + [False] * 2
    assert numbers(buffer.get(3)) == [0, 1, 2]
    assert buffer.put(row(7))
    assert numbers(buffer.get(9)) == [3, 4, 7]
    assert buffer.get(1) is None


@given(st.integers(2, 20), st.integers(1, 5), st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_firo_hands_out_each_item_once(n, size, seed):
    buffer = make("firo", capacity=20, seed=seed, threshold=n - 1)
    for i in range(n - 1):
        buffer.put(row(i))
    assert buffer.get(1) is None  # not above the threshold
    buffer.put(row(n - 1))
    drawn = numbers(buffer.get(size))
    buffer.finish()
    while (batch := buffer.get(size)) is not None:
        drawn += numbers(batch)
    assert sorted(drawn) == list(range(n))


def test_firo_mixes():
    buffer = make("firo", capacity=100, threshold=0)
    for i in range(100):
        buffer.put(row(i))
    assert numbers(buffer.get(100)) != list(range(100))


@pytest.mark.parametrize("kind", KINDS)
@given(st.lists(st.integers(0, 4), max_size=60), st.integers(0, 50))
@settings(max_examples=25, deadline=None)
def test_state_round_trip(kind, actions, cut):
    """A buffer restored at any moment goes on exactly like the one it was taken from."""

    def play(buffer, steps, number):
        out = []
        for step in steps:
            if step == 0:
                out.append(buffer.get(3))
            else:
                out.append(buffer.put(row(number), number % 3))
                number += 1
        return out, number

    one, two = make(kind), make(kind)
    for buffer in (one, two):
        buffer.draw_from(Committed(9))
    _, number = play(one, actions[:cut], 0)
    two.load_state_dict(one.state_dict())
    first, _ = play(one, actions[cut:], number)
    second, _ = play(two, actions[cut:], number)
    for a, b in zip(first, second, strict=True):
        assert np.array_equal(a, b) if isinstance(a, np.ndarray) else a is b
    assert (one.n_put, one.n_got, len(one)) == (two.n_put, two.n_got, len(two))
    assert one.state() == two.state()


@pytest.mark.parametrize("kind", KINDS)
def test_put_copies_and_get_copies(kind):
    buffer, values = make(kind, capacity=4), row(5)
    buffer.put(values)
    values[:] = 0
    buffer.finish()
    batch = buffer.get(1)
    assert numbers(batch) == [5]
    batch[:] = 7
    buffer.put(row(6))
    later = buffer.get(4)
    assert 7 not in later


@pytest.mark.parametrize("kind", KINDS)
def test_settings_round_trip(kind):
    settings = buffers.build({"kind": kind, "capacity": 300})
    assert buffers.build(as_table(settings)) == settings


def test_seed_decides():
    def draws(seed):
        buffer = make("reservoir", capacity=100, seed=seed)
        for i in range(100):
            buffer.put(row(i))
        return [numbers(buffer.get(5)) for _ in range(4)]

    assert draws(71) == draws(71)
    assert draws(71) != draws(72)


@pytest.mark.parametrize("cls", [FIRO, ReplayMix, Reservoir])
def test_threshold_must_leave_room(cls):
    with pytest.raises(
        (ConfigError, ValueError), match="threshold = 20 is not below capacity = 20"
    ):
        cls(capacity=20, threshold=20)


def test_retains_says_what_is_never_lost():
    for kind in RESERVOIRS:
        assert make(kind, capacity=8).retains(8)
        assert not make(kind, capacity=8).retains(9)
    assert not FIFO(capacity=8).build(2, 1).retains(1)
