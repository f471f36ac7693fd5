"""Samples drawn anew: a kill there changes no value, and nobody takes one for failed meanwhile."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from store_helpers import SEED, Reader, make_schema, sample_of, write
from test_campaign import scripted, write_case

from simlab.learn.stream import FollowedStream
from simlab.store.channel import TailChannel, received_split
from simlab.store.store import SnapshotStore

N, REDRAWN = 12, 7
PROGRAM = """
import os, signal
from simlab.cli import main
from simlab.problems.darcy import Darcy
from simlab.problems.spaces import FieldSpace

assemble, sample = Darcy.assemble, FieldSpace.sample

def die_once(where, seed):
    mark = f"{marks}/{{seed}}"
    if where == {deaths}.get(seed) and not os.path.exists(mark):
        open(mark, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)

def failing(self, mu, state, step=0, previous=None):
    if mu.index == {redrawn}:
        die_once("solving", mu.seed)
    system = assemble(self, mu, state, step, previous)
    if mu.index == {redrawn} and mu.seed < 2_000_000:
        system.b.set(float("nan"))
    return system

def drawn(self, n, seed, start=0):
    if start == {redrawn}:
        die_once("drawing", seed)
    return sample(self, n, seed, start)

Darcy.assemble, FieldSpace.sample = failing, drawn
main()
"""


def generated(directory: Path, deaths: dict[int, str]) -> tuple[int, SnapshotStore]:
    """Make the campaign, going on after every death; return how many there were."""
    (directory / "marks").mkdir(parents=True)
    case, script = write_case(directory, n=N), directory / "program.py"
    marks = directory / "marks"
    script.write_text(PROGRAM.format(marks=marks, deaths=deaths, redrawn=REDRAWN))
    words, n_deaths = ["--set", "campaign.redraws=2"], 0
    while (done := scripted(script, case, directory / "run", *words, ranks=0)).returncode < 0:
        n_deaths += 1
        words = [*words[:2], "--resume"]
        assert n_deaths < 9
    assert done.returncode == 0, done.stderr
    return n_deaths, SnapshotStore.open(directory / "run" / "store")


def test_a_kill_between_two_draws_changes_no_value(tmp_path) -> None:
    """Killed before the first new draw has begun, and when the second has."""
    deaths = {9157 + 1_000_003: "drawing", 9157 + 2_000_006: "solving"}
    _, undisturbed = generated(tmp_path / "undisturbed", {})
    n_deaths, store = generated(tmp_path / "killed", deaths)
    assert n_deaths == 2
    assert not store.failed()
    assert not store.verify(deep=True)
    for name in ("train", "valid", "test"):
        for one, other in zip(store.split(name), undisturbed.split(name), strict=True):
            assert (one.sample.index, one.sample.seed) == (other.sample.index, other.sample.seed)
            assert (one.sample.seed > 9157) == (one.sample.index == REDRAWN)
            for key, values in other.outputs.items():
                assert np.array_equal(one.outputs[key], values)
            for key, values in other.sample.fields.items():
                assert np.array_equal(one.sample.fields[key], values)
    for made in (store, undisturbed):
        manifest = json.loads((made.path.parent / "manifest.json").read_text())
        campaign = manifest["campaign"]
        assert (campaign["done"], campaign["failed"], campaign["redrawn"]) == (N, 0, 2)


def test_a_sample_to_be_drawn_anew_is_not_taken_for_failed(tmp_path) -> None:
    """Neither before it begins again, nor after a crash and the sealing that comes then."""
    schema = make_schema()
    store = SnapshotStore.create(tmp_path / "store", schema, n=8, seed=SEED)
    (last,) = store.ids("valid").tolist()
    channel, reader = TailChannel(store.path), Reader(schema)
    stream = FollowedStream(store.path)

    def assert_missing() -> None:
        for one in (store, SnapshotStore.open(store.path)):
            assert not one.is_complete()
            assert not one.failed()
            assert one.status().splits["valid"].missing == 1
        waits = iter([False] * 3 + [True])
        assert received_split(channel, "valid", lambda: next(waits), lambda: None) is None
        while stream.poll(100):
            pass
        assert not [stream.poll(100) for _ in range(3)][-1]
        assert not stream.is_exhausted
        reader.drain(store)
        assert reader.ends[last] == "abandoned"

    with store.writer() as writer:
        for traj in range(8):
            if traj != last:
                write(writer, schema, traj)
        writer.begin(sample_of(schema, last))
        writer.abandon(last, "the first draw")
        assert_missing()
    store.seal(final=True)
    assert_missing()
    with store.writer() as writer:
        assert write(writer, schema, last) == 2
    assert store.is_complete()
    reader.drain(store)
    assert len(reader.done()) == 8
