"""Validation in a process of its own: the same numbers, no waiting, no hanging."""

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from learn_helpers import bare_schema, trajectories

from simlab.core.config import build
from simlab.core.metrics import SUMMARY, relative_l2
from simlab.learn import validator
from simlab.learn.model import Model
from simlab.learn.settings import TrainSettings
from simlab.learn.stream import MemoryStream
from simlab.learn.trainer import Trainer

SCHEMA = bare_schema(11)
DATA = trajectories(SCHEMA, 16)
HELD_OUT = trajectories(SCHEMA, 5, start=50)


class Slow(list):
    """A validation set that takes its time, elsewhere than in the process that made it."""

    def __init__(self, items, seconds):
        super().__init__(items)
        self.seconds, self.home = seconds, os.getpid()

    def __iter__(self):
        time.sleep(0.0 if os.getpid() == self.home else self.seconds)
        return super().__iter__()


class Deadly(list):
    """Ends every process but the one that made it, as long as its file has lines to lose."""

    def __init__(self, items, deaths):
        super().__init__(items)
        self.deaths, self.home = deaths, os.getpid()

    def __iter__(self):
        left = Path(self.deaths).read_text()
        if os.getpid() != self.home and left:
            Path(self.deaths).write_text(left[1:])
            os._exit(9)
        return super().__iter__()


class Attached(list):
    """Cannot be pickled."""

    def __reduce__(self):
        raise TypeError("not to be moved")


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, Path(__file__).parents[:2])))


def train(held_out=HELD_OUT, **changes):
    """Return the model and the validation lines of a short training."""
    lines = []

    def note(kind, **values):
        if kind == "validation":
            lines.append(json.loads(json.dumps(values)))

    plain = {
        "operator": {"kind": "mlp", "hidden": (8,)},
        "buffer": {"kind": "reservoir", "capacity": 40},
        "n_batches": 40,
        "validate_every": 10,
        "batch": 4,
        "pilot": 8,
        "threads": 1,
    }
    settings = build(TrainSettings, plain | changes)
    trainer = Trainer(settings, SCHEMA, observers=[note])
    model = trainer.run(MemoryStream(DATA, SCHEMA, 31), held_out)
    return model, lines


@pytest.mark.parametrize("ema", [pytest.param(0.0, marks=pytest.mark.slow), 0.8])
def test_a_process_finds_what_the_trainer_would(ema):
    here, lines = train(ema=ema, validator="inline")
    there, others = train(ema=ema, validator="process")
    assert [line["batch"] for line in lines] == [10, 20, 30, 40]
    by_batch = {line["batch"]: line for line in lines}
    assert [line["batch"] for line in others] == sorted({line["batch"] for line in others})
    assert others[-1]["batch"] == 40
    for line in others:
        assert line.keys() == by_batch[line["batch"]].keys()
        for key in SUMMARY:
            expected = by_batch[line["batch"]]["rel_l2"][key]
            assert line["rel_l2"][key] == pytest.approx(expected, rel=1e-5)
    assert there.validation == pytest.approx(here.validation, rel=1e-5)
    for name, value in here.tensors().items():
        assert torch.equal(there.tensors()[name], value), name


def test_training_does_not_wait_and_the_newest_weights_come_next():
    _, lines = train(Slow(HELD_OUT, 0.3), validator="process", validate_every=1, n_batches=200)
    batches = [line["batch"] for line in lines]
    assert batches == sorted(set(batches))
    assert batches[-1] == 200
    assert len(batches) < 20  # of 200: all others were replaced by newer ones


@pytest.mark.slow
def test_a_process_that_dies_once_is_started_again(tmp_path, caplog):
    deaths = tmp_path / "deaths"
    deaths.write_text("x")
    model, lines = train(Deadly(HELD_OUT, str(deaths)), validator="process", validate_every=50)
    assert deaths.read_text() == ""
    assert [line["batch"] for line in lines] == [40]
    assert model.validation["n"] == 5
    assert "ended with code 9; it is started once more" in caplog.text


@pytest.mark.slow
def test_one_that_always_dies_is_replaced_by_the_trainer(tmp_path, caplog):
    deaths = tmp_path / "deaths"
    deaths.write_text("x" * 9)
    model, lines = train(Deadly(HELD_OUT, str(deaths)), validator="process", validate_every=50)
    assert len(deaths.read_text()) == 7
    assert [line["batch"] for line in lines] == [40]
    assert model.validation["n"] == 5
    assert caplog.text.count("validating between batches instead") == 1


def test_one_that_falls_silent_is_ended(monkeypatch, caplog):
    monkeypatch.setattr(validator, "_SILENT_SECONDS", 0.0)
    _, lines = train(validator="process", validate_every=50)
    assert [line["batch"] for line in lines] == [40]
    assert "is silent" in caplog.text


def test_a_set_that_cannot_be_moved_stays(caplog):
    _, lines = train(Attached(HELD_OUT), validator="process")
    assert [line["batch"] for line in lines] == [10, 20, 30, 40]
    assert caplog.text.count("cannot be handed over (not to be moved)") == 1


@pytest.mark.parametrize(
    ("seconds", "is_elsewhere"), [(0.0, False), pytest.param(30.0, True, marks=pytest.mark.slow)]
)
def test_auto_takes_a_process_for_dear_validations_only(seconds, is_elsewhere, monkeypatch):
    """The clock of a validation is set forward, not waited for; a part of the set is enough."""
    started, sizes = [], []

    class Noted(validator.Validator):
        def _start(self):
            started.append(True)
            super()._start()

    monkeypatch.setattr("simlab.learn.trainer.Validator", Noted)
    real, measure = time.monotonic, Model.validate
    offset = [0.0]

    def validate(self, held_out):
        offset[0] += seconds * len(held_out) / len(HELD_OUT)
        sizes.append(len(held_out))
        return measure(self, held_out)

    monkeypatch.setattr(Model, "validate", validate)
    monkeypatch.setattr("simlab.learn.trainer.time.monotonic", lambda: real() + offset[0])
    _, lines = train()
    assert bool(started) == is_elsewhere
    assert sizes == ([1] if is_elsewhere else [1, 5, 5, 5, 5])
    assert lines[0]["batch"] == 10
    assert lines[-1]["batch"] == 40


def test_errors_by_time():
    settings = build(TrainSettings, {"operator": {"kind": "mlp", "hidden": (8,)}})
    model = Model(settings, SCHEMA)
    found = model.validate(HELD_OUT)["by_time"]
    made = model.predict([trajectory.sample for trajectory in HELD_OUT])["u"]
    truth = np.stack([trajectory.outputs["u"] for trajectory in HELD_OUT])
    errors = relative_l2(made, truth, n_kept=2)
    assert found["first"] == [0.0, 2.0, 4.0, 6.0, 7.0, 8.0, 9.0, 10.0]
    assert found["last"] == [1.0, 3.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0]
    assert found["mean"][1] == pytest.approx(errors[:, 2:4].mean())
    assert found["max"] == pytest.approx(
        [
            errors[:, :2].max(),
            errors[:, 2:4].max(),
            errors[:, 4:6].max(),
            *errors[:, 6:].max(axis=0),
        ]
    )
    assert "by_time" not in Model(settings, bare_schema()).validate(trajectories(bare_schema(), 3))
