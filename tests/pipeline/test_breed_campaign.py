"""Campaigns that draw from generations: on record, the same after a kill, on several ranks."""

from __future__ import annotations

import json
import signal
import subprocess
import time

import numpy as np
import pytest
from commands import ROOT, command, environment, simlab

from simlab.core.errors import ConfigError, StoreError
from simlab.core.runs import RunDirectory
from simlab.pipeline.case import Case, load_case
from simlab.problems.breed import Breed, Breeder, Generation
from simlab.problems.generations import DrawLog, GenerationFiles
from simlab.problems.heat import Heat
from simlab.problems.spaces import bounds_of
from simlab.store.store import SnapshotStore

CASE = """
[family]
kind = "heat"
cells = 6
n_steps = {steps}
[campaign]
n = {n}
seed = 50923
sampler = {{ kind = "breed", period = 4, share = [0.9, 0.9] }}
[train]
operator = {{ kind = "mlp", hidden = [8] }}
n_batches = 40
"""
CORNER = Generation(np.full((1, 5), 0.1), np.ones(1), 0.9)


def write_case(path, n=24, steps=2):
    path.write_text(CASE.format(n=n, steps=steps))
    return path


def found_in(store):
    """Parameters by id, training samples apart."""
    made = {
        name: {
            item.sample.index: [item.sample.parameters[key] for key in Heat().space.names]
            for item in store.split(name)
        }
        for name in ("train", "valid", "test")
    }
    return made["train"], made["valid"] | made["test"]


def expected(generations, *added):
    breeder = Breeder(Breed(), bounds_of(Heat().space), 50923)
    for generation in added:
        breeder.add(generation)
    ids = list(generations)
    return dict(zip(ids, breeder.draw(ids, list(generations.values())).tolist(), strict=True))


@pytest.mark.parametrize(
    "words",
    [pytest.param([], marks=pytest.mark.slow), ["--set", "campaign.ranks_per_group=2"]],
    ids=["two groups", "a group of two"],
)
def test_samples_come_from_the_newest_generation_and_held_out_ones_do_not(tmp_path, words):
    case, run = write_case(tmp_path / "case.toml"), tmp_path / "run"
    tables = load_case(case, words[1:]).tables()
    RunDirectory.start(run, tables, resume=False, seed=50923)
    GenerationFiles(run / "sampling").write(1, CORNER, finished=0)
    done = simlab("generate", case, "--out", run, *words, "--resume", ranks=2)
    assert done.returncode == 0, done.stderr
    training, held_out = found_in(SnapshotStore.open(run / "store"))
    drawn = DrawLog(run / "sampling").news()
    assert drawn == dict.fromkeys(training, 1)
    assert training == expected(drawn, CORNER)
    assert held_out == expected(dict.fromkeys(held_out, 0))
    assert np.mean(list(training.values())) < 200 < np.mean(list(held_out.values()))


def test_a_killed_campaign_draws_the_same_again(tmp_path):
    case, run = write_case(tmp_path / "case.toml", n=30, steps=400), tmp_path / "run"
    job = subprocess.Popen(
        command(["generate", case, "--out", run]),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    log = DrawLog(run / "sampling")
    before: dict[int, int] = {}
    while len(before) < 4 and job.poll() is None:
        time.sleep(0.005)
        before |= log.news()
    job.send_signal(signal.SIGKILL)
    job.wait()
    assert 4 <= len(before) < 24
    before |= log.news()
    GenerationFiles(run / "sampling").write(1, CORNER, finished=4)
    with (run / "sampling" / "draws.log").open("ab") as file:
        file.write(b"\n23 ")  # what a crash of the machine may leave
    done = simlab("generate", case, "--out", run, "--resume")
    assert done.returncode == 0, done.stderr
    drawn = DrawLog(run / "sampling").news()
    training, _ = found_in(SnapshotStore.open(run / "store"))
    assert set(drawn) == set(training)
    assert {index: drawn[index] for index in before} == dict.fromkeys(before, 0)
    assert {drawn[index] for index in set(drawn) - set(before)} == {1}
    assert training == expected(drawn, CORNER)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_draws_where_its_training_finds_it_hard(tmp_path, ranks):
    # long enough a campaign for a training that begins when torch has been loaded
    case, run = write_case(tmp_path / "case.toml", n=400, steps=60), tmp_path / "run"
    words = ["campaign.sampler.period=10", "train.n_batches=1500", "train.pilot=2"]
    words += ["family.cells=24", "train.validate_every=1000", f"train.ranks={ranks}"]
    options = [item for word in words for item in ("--set", word)]
    done = simlab("run", case, "--out", run, "-n", "1", *options, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    drawn = DrawLog(run / "sampling").news()
    made = [generation for generation, _ in GenerationFiles(run / "sampling").news()]
    assert len(made) >= 2
    assert set(drawn.values()) <= set(range(len(made) + 1))
    assert len(set(drawn.values())) >= 3
    training, held_out = found_in(SnapshotStore.open(run / "store"))
    assert training == expected(drawn, *made)
    assert held_out == expected(dict.fromkeys(held_out, 0))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    said = [line["generation"] for line in lines if line["kind"] == "sampling"]
    assert said == list(range(1, len(made) + 1))
    last = [line["sampling"] for line in lines if line["kind"] == "train"][-1]
    assert last["generation"] == len(made)
    assert 0.0 < last["ess"] < 1.0


def test_lines_of_draws_are_checked_and_the_first_counts(tmp_path):
    log, reader = DrawLog(tmp_path), DrawLog(tmp_path)
    assert reader.news() == {}
    log.note(3, 1)
    with (tmp_path / "draws.log").open("ab") as file:
        file.write(b"\n7 2 0badc0de\n9 1")
    log.note(4, 1)
    log.note(3, 2)
    assert reader.news() == {3: 1, 4: 1}
    assert reader.news() == {}
    log.note(12, 2)
    assert reader.news() == {12: 2}


def test_generations_are_written_once(tmp_path):
    files, reader = GenerationFiles(tmp_path), GenerationFiles(tmp_path)
    made = Generation(np.array([[0.1, 1 / 3]]), np.ones(1), 0.7)
    files.write(1, made, finished=40)
    with pytest.raises(StoreError, match="is there already"):
        files.write(1, CORNER, finished=41)
    files.write(2, Generation(), finished=80)
    (first, facts), (second, _) = reader.news()
    assert facts["finished"] == 40
    assert json.dumps(first.to_json()) == json.dumps(made.to_json())
    assert second.bred == 0
    assert reader.news() == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train": None}, "no \\[train\\] table"),
        ({"train": {"mode": "deterministic"}}, "'live'|\"live\""),
        ({"train": {"channel": "/elsewhere/stream.json"}}, "one run directory"),
        ({"campaign": {"sampler": "breed", "order": "greedy"}}, "nothing to order"),
    ],
)
def test_what_active_sampling_cannot_go_with_is_refused(changes, words):
    tables = {"family": Heat(cells=4), "campaign": {"sampler": "breed"}, "train": {}}
    assert Case(**tables).tables()["campaign"]["sampler"]["period"] == 50
    with pytest.raises(ConfigError, match=words):
        Case(**tables | changes)
