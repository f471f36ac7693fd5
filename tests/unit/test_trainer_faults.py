"""What a training makes of bad data, a full disk, leftovers and settings that nearly lock it."""

import json
import resource
import time
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from learn_helpers import bare_schema, field_schema, trajectories

from simlab.core.config import build
from simlab.core.errors import ConfigError, SchemaError, StoreError
from simlab.core.samples import Sample
from simlab.learn import checkpoints
from simlab.learn.model import Model
from simlab.learn.pairs import PairedStream
from simlab.learn.ranks import Ranks, ShareStream
from simlab.learn.settings import TrainSettings
from simlab.learn.stream import MemoryStream
from simlab.learn.trainer import Trainer

SCHEMA = bare_schema(10)
DATA = trajectories(SCHEMA, 30)


def settings_with(**changes):
    plain = {
        "operator": {"kind": "mlp", "hidden": (8,)},
        "n_batches": 30,
        "batch": 4,
        "pilot": 2,
        "threads": 1,
    }
    return build(TrainSettings, plain | changes)


def memory(data=DATA):
    return MemoryStream(data, SCHEMA, 6151)


@pytest.mark.parametrize("kind", ["fifo", "reservoir"])
def test_more_fresh_items_than_a_batch_has_rows_lock_nothing(kind):
    """300 items, 8 new ones wanted for each batch of 4: the buffer is full before long."""
    trainer = Trainer(
        settings_with(fresh=8, n_batches=90, buffer={"kind": kind, "capacity": 50}), SCHEMA
    )
    deadline = time.monotonic() + 20
    trainer.run(memory(), stop=lambda: time.monotonic() > deadline)
    assert trainer.batch == 90


def test_a_new_training_leaves_nothing_to_resume_of_the_one_before(tmp_path):
    Trainer(settings_with(), SCHEMA, tmp_path).run(memory())
    second = Trainer(settings_with(), SCHEMA, tmp_path)
    second.run(memory(), stop=lambda: second.batch >= 20)
    third = Trainer(settings_with(), SCHEMA, tmp_path)
    assert third.resume(memory())
    assert third.batch == 20
    for name, value in second.model.tensors().items():
        assert third.model.tensors()[name].equal(value)


def test_a_crash_while_a_checkpoint_is_replaced_leaves_one(tmp_path, monkeypatch):
    state = dict.fromkeys(checkpoints._NEEDED, 7)
    checkpoints.write(tmp_path, 7, state)

    def cut(path, **_):
        if (path / "state.pt").exists():
            (path / "state.pt").unlink()
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints.shutil, "rmtree", cut)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.write(tmp_path, 7, state | {"is_new": True})
    assert checkpoints.newest(tmp_path)["batch"] == 7


@contextmanager
def no_room(size):
    """Let no file grow beyond ``size`` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_training_goes_on_where_a_checkpoint_has_no_room(tmp_path, caplog):
    settings = settings_with(checkpoint_seconds=1e-9)
    with no_room(9000):
        trainer = Trainer(settings, SCHEMA, tmp_path)
        trainer.run(memory())
    assert trainer.is_done
    assert "cannot be written" in caplog.text
    assert not list((tmp_path / "checkpoints").iterdir())
    assert Model.load(tmp_path).predict([DATA[0].sample])["u"].shape == (1, 10, 4)
    stopped = Trainer(settings_with(), SCHEMA, tmp_path)
    with no_room(9000), pytest.raises(StoreError, match=r"batch-00000005 cannot be written"):
        stopped.run(memory(), stop=lambda: stopped.batch >= 5)


@pytest.mark.parametrize(
    ("at", "message"), [(1, r"^u: among the first 2 training"), (20, r"step 3 of trajectory 20")]
)
def test_values_that_are_no_numbers_are_named(at, message):
    data = trajectories(SCHEMA, 30)
    data[at].outputs["u"][3, 1] = np.inf
    settings = settings_with(n_batches=75, buffer={"kind": "fifo"})
    with pytest.raises(StoreError, match=message):
        Trainer(settings, SCHEMA).run(memory(data))


def test_a_log_without_batches_is_no_training(tmp_path):
    (tmp_path / "arrivals.log").write_text("p 3 0\n")
    settings = settings_with(mode="replay", arrivals=str(tmp_path / "arrivals.log"))
    with pytest.raises(StoreError, match="no batch is in this log"):
        Trainer(settings, SCHEMA).run(memory(), DATA[:2])


def test_each_rank_wants_a_trajectory():
    stream = memory(DATA[:2])
    assert [ShareStream(stream, Ranks(rank, 2)).ids().tolist() for rank in range(2)] == [[0], [1]]
    with pytest.raises(ConfigError, match="3 processes of the trainer for 2 training"):
        ShareStream(stream, Ranks(0, 3))


def test_finished_trajectories_take_no_room_in_a_stream_of_windows():
    stream = PairedStream(memory(), ahead=2)
    while not stream.is_exhausted:
        stream.poll(64)
    assert stream.n_items == 30 * (10 - 2)
    state = stream.state_dict()
    assert len(state["rows"]) == 0
    assert len(state["plain"]) < 300
    again = PairedStream(memory(), ahead=2)
    again.load_state_dict(state)
    assert again.poll(64) == []


def test_trajectories_of_two_campaigns_are_not_taken_for_one():
    """Both begin with index 0; a window with steps of both would teach what no solver did."""
    data = [replace(t, outputs={"u": t.outputs["u"] * 0 + k}) for k in (1, 2) for t in DATA[:3]]
    stream = PairedStream(memory(data))
    windows = []
    while not stream.is_exhausted:
        windows += stream.poll(64)
    assert len(windows) == 2 * 3 * (10 - 1)
    for window in windows:
        now, _, later = np.split(window.row[-9:], [4, 5])  # with the time between
        assert set(now) == set(later)
        np.testing.assert_array_equal(stream.row(window.traj, window.step), window.row)


@pytest.mark.parametrize("n", [9, 11])
def test_a_trajectory_of_another_length_is_refused(n):
    odd = trajectories(bare_schema(n), 5)[4]
    with pytest.raises(SchemaError, match=f"trajectory 4 has {n} times, those of 'line' have 10"):
        memory([*DATA[:4], odd])


def test_large_grids_are_evaluated_few_at_a_time(monkeypatch):
    schema = field_schema(512)
    model = Model(settings_with(operator={"kind": "unet", "width": 1, "levels": 1}), schema)
    sizes = []
    model.network.register_forward_pre_hook(lambda _, given: sizes.append(len(given[1])))
    samples = [Sample(i, 3, {"gain": 1.0}, {"a": np.ones((512, 512))}) for i in range(6)]
    assert model.predict(samples)["u"].shape == (6, 1, 512, 512)
    assert sizes == [4, 2]


FOREIGN = {
    "weights of another library": {"model": torch.zeros(2)},
    "one tensor": torch.zeros(3),
    "code": torch.nn.Linear(2, 2),
    "torn": b"PK\x03\x04",
    "nothing": b"",
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_files_of_others_are_refused_in_a_line(content, tmp_path):
    """Above all without torch's advice on how to run the code they may bring."""
    model = Model(settings_with(), SCHEMA)
    model.save(tmp_path)
    for path in (tmp_path / "model.pt", tmp_path / "checkpoints" / "batch-00000003" / "state.pt"):
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
    (path.parent / "COMMIT").write_text("3\n")
    for load in (Model.load, lambda p: Trainer(settings_with(), SCHEMA, p).resume(memory())):
        with pytest.raises(StoreError) as found:
            load(tmp_path)
        said = str(found.value)
        assert str(tmp_path) in said
        assert "\x1b" not in said
        assert "weights_only" not in said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "model format None"),
        ({"format": 1}, "model.json lacks 'settings'"),
        ([], "format None"),
    ],
)
def test_an_incomplete_description_is_refused(change, message, tmp_path):
    Model(settings_with(), SCHEMA).save(tmp_path)
    (tmp_path / "model.json").write_text(json.dumps(change))
    with pytest.raises(StoreError, match=message):
        Model.load(tmp_path)
