"""The trainer: budget, resume bit for bit, pilot, metrics, checkpoints, what it refuses."""

import itertools
import math

import numpy as np
import pytest
import torch
from learn_helpers import bare_schema, heat_schema, trajectories

from simlab.core.config import as_table, build
from simlab.core.errors import ConfigError, ConvergenceError, StoreError
from simlab.learn import checkpoints
from simlab.learn.encoding import Encoding, Normaliser, Statistics
from simlab.learn.model import Model
from simlab.learn.monitor import Monitor
from simlab.learn.settings import TrainSettings
from simlab.learn.stream import MemoryStream
from simlab.learn.trainer import Trainer

SCHEMA = heat_schema(6, 3)
DATA = trajectories(SCHEMA, 12)


def settings_with(**changes):
    plain = {
        "operator": {"kind": "mlp", "hidden": (16,)},
        "buffer": {"kind": "reservoir", "capacity": 20},
        "n_batches": 40,
        "batch": 4,
        "threads": 1,
        "pilot": 5,
        "log_every": 5,
    }
    return build(TrainSettings, plain | changes)


def memory(data=DATA, schema=SCHEMA):
    return MemoryStream(data, schema, 90011)


def weights(trainer):
    return {name: value.clone() for name, value in trainer.model.tensors().items()}


@pytest.mark.parametrize("kind", ["reservoir", "firo", "fifo"])
@pytest.mark.parametrize("cut", [1, 7, 23])
def test_resume_equals_uninterrupted(kind, cut, tmp_path):
    """Small buffers, so that evictions, refusals and several passes are part of it."""
    settings = settings_with(buffer={"kind": kind, "capacity": 20})
    straight = Trainer(settings, SCHEMA, tmp_path / "straight")
    straight.run(memory(), DATA[:2])
    for part in (cut, cut + 9, None):
        trainer = Trainer(settings, SCHEMA, tmp_path / "parts")
        stream = memory()
        resumed = trainer.resume(stream)
        assert resumed == (part != cut)
        stop = (lambda: False) if part is None else (lambda t=trainer, n=part: t.batch >= n)
        trainer.run(stream, DATA[:2], stop)
        assert trainer.is_done == (part is None)
    assert trainer.batch == straight.batch == 40
    for name, value in weights(straight).items():
        assert torch.equal(value, weights(trainer)[name]), name
    assert trainer.model.validation == straight.model.validation
    loaded = Model.load(tmp_path / "parts")
    assert loaded.validation == straight.model.validation
    assert (tmp_path / "parts" / "model.pt").is_file()


def test_stopped_run_has_a_checkpoint_and_no_model(tmp_path):
    trainer = Trainer(settings_with(), SCHEMA, tmp_path)
    trainer.run(memory(), stop=lambda: trainer.batch >= 3)
    assert not (tmp_path / "model.json").exists()
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["batch-00000003"]


def test_resume_of_a_finished_run_changes_nothing(tmp_path):
    first = Trainer(settings_with(), SCHEMA, tmp_path)
    first.run(memory())
    again = Trainer(settings_with(), SCHEMA, tmp_path)
    assert again.resume(memory())
    assert again.is_done
    again.run(memory())
    assert all(torch.equal(v, weights(again)[n]) for n, v in weights(first).items())


def test_torn_checkpoints_are_ignored(tmp_path):
    trainer = Trainer(settings_with(checkpoint_seconds=1e-6), SCHEMA, tmp_path)
    trainer.run(memory(), stop=lambda: trainer.batch >= 6)
    folder = tmp_path / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["batch-00000005", "batch-00000006"]
    (folder / "batch-00000006" / "COMMIT").unlink()
    assert checkpoints.newest(folder)["batch"] == 5
    (folder / "batch-00000005" / "state.pt").write_bytes(b"torn")
    with pytest.raises(StoreError, match="batch-00000005 cannot be read"):
        checkpoints.newest(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"learning_rate": 0.5}, "train.learning_rate: 0.003 -> 0.5"), ({"batch": 5}, "train.batch")],
)
def test_changed_settings_are_refused_on_resume(changes, message, tmp_path):
    trainer = Trainer(settings_with(), SCHEMA, tmp_path)
    trainer.run(memory(), stop=lambda: trainer.batch >= 2)
    with pytest.raises(ConfigError, match=message):
        Trainer(settings_with(**changes), SCHEMA, tmp_path).resume(memory())


def test_changed_schema_is_refused_on_resume(tmp_path):
    trainer = Trainer(settings_with(), SCHEMA, tmp_path)
    trainer.run(memory(), stop=lambda: trainer.batch >= 2)
    other = heat_schema(6, 4)
    with pytest.raises(ConfigError, match=r"schema\.times"):
        Trainer(settings_with(), other, tmp_path).resume(memory(trajectories(other, 12), other))


def test_every_item_is_learned_from():
    """With a buffer smaller than the data the stream goes round, and everything comes by."""
    seen = set()
    trainer = Trainer(settings_with(n_batches=150), SCHEMA)
    inner = trainer.step

    def step(rows):
        seen.update(tuple(row[:3].tolist()) for row in rows)  # two parameters and the time
        return inner(rows)

    trainer.step = step
    trainer.run(memory())
    assert len(seen) == len(DATA) * len(SCHEMA.times)


def test_metrics():
    lines = []
    trainer = Trainer(
        settings_with(validate_every=20),
        SCHEMA,
        observers=[lambda kind, **values: lines.append((kind, values))],
    )
    trainer.run(memory(), DATA[:3])
    train = [values for kind, values in lines if kind == "train"]
    valid = [values for kind, values in lines if kind == "validation"]
    assert [line["batch"] for line in train] == list(range(5, 41, 5))
    assert [line["batch"] for line in valid] == [20, 40]
    for line in train:
        buffer = line["buffer"]
        assert buffer["got"] == 4 * line["batch"]
        assert buffer["unseen"] + buffer["seen"] <= 20
        assert buffer["put"] >= buffer["unseen"] + buffer["seen"]
        assert math.isfinite(line["loss"])
        assert line["threads"] == 1
        assert line["samples_per_s"] > 0
        assert line["wait_s"] <= line["train_s"]
        assert len(buffer["draws"]) == 9
        assert sum(buffer["draws"]) == sum(buffer["ages"]) == buffer["unseen"] + buffer["seen"]
        assert set(buffer["contents"]) == {"left", "right", "time"}
        for mean, std in buffer["contents"].values():
            assert math.isfinite(mean)
            assert std >= 0
    puts = [0] + [line["buffer"]["put"] for line in train]
    fresh = [5 * line["new_per_batch"] for line in train]
    assert fresh == pytest.approx([b - a for a, b in itertools.pairwise(puts)])
    assert train[0]["put_per_s"] > 0
    assert set(valid[0]["rel_l2"]) == {"mean", "median", "p95", "p99", "max"}
    assert valid[1]["rel_l2"]["mean"] <= valid[1]["rel_l2"]["max"]
    assert trainer.model.validation["p95"] == valid[1]["rel_l2"]["p95"]


def test_contents_are_those_of_the_buffer():
    schema = bare_schema(n_times=4)
    encoding = Encoding(schema)
    buffer = settings_with().buffer.build(encoding.row_size, 5)
    monitor = Monitor(encoding, buffer)
    assert monitor.contents() == {}
    rows = np.concatenate([encoding.rows(t) for t in trajectories(schema, 3)])
    for row in rows:
        buffer.put(row)
    contents = monitor.contents()
    assert contents["mu"] == pytest.approx([rows[:, 0].mean(), rows[:, 0].std()])
    assert contents["time"] == pytest.approx([1.5, np.sqrt(1.25)])


def test_a_buffer_of_one_time_is_warned_of_once(caplog):
    schema = bare_schema(n_times=9)
    encoding = Encoding(schema)
    buffer = settings_with().buffer.build(encoding.row_size, 5)
    monitor = Monitor(encoding, buffer)
    for trajectory in trajectories(schema, 16):
        buffer.put(encoding.rows(trajectory)[2])
        monitor.contents()
    assert [r.message.count("the times in the buffer spread by 0,") for r in caplog.records] == [1]


def test_learning_rate_schedules():
    def rate(schedule, share):
        return settings_with(schedule=schedule, learning_rate=1.0).learning_rate_at(share)

    assert rate("cosine", 0.0) < 0.05
    assert rate("cosine", 0.5) == pytest.approx(0.5)
    assert rate("cosine", 1.0) == pytest.approx(0.0, abs=1e-12)
    assert [rate("halving", s) for s in (0.2, 0.25, 0.5, 0.9)] == [1.0, 0.5, 0.25, 0.125]
    assert rate("constant", 0.99) == 1.0


def test_seconds_are_a_budget_too():
    settings = settings_with(n_batches=10**6, max_seconds=0.3)
    trainer = Trainer(settings, SCHEMA)
    trainer.run(memory())
    assert trainer.is_done
    assert 0 < trainer.batch < 10**6
    assert trainer._optimizer.param_groups[0]["lr"] < 0.1 * settings.learning_rate


def test_normalisation_is_that_of_the_first_trajectories():
    """By id, however the stream shuffles; and it does not move while training goes on."""
    trainer = Trainer(settings_with(pilot=4), SCHEMA)
    trainer.run(memory(DATA[::-1]))
    outputs = np.stack([t.outputs["u"] for t in DATA[:4]])
    lefts = [t.sample.parameters["left"] for t in DATA[:4]]
    network = trainer.model.network
    assert float(network.mean_out[0]) == pytest.approx(outputs.mean(), rel=1e-5)
    assert float(network.std_out[0]) == pytest.approx(outputs.std(), rel=1e-4)
    assert float(network.mean_in[0]) == pytest.approx(np.mean(lefts), rel=1e-5)


def test_constant_channels_keep_their_scale():
    encoding = Encoding(bare_schema())
    rows = np.tile(np.array([3.0, 1.0, 2.0, 3.0, 4.0], dtype=np.float32), (5, 1))
    normaliser = Normaliser.fit(Statistics.of(encoding, rows))
    np.testing.assert_allclose(normaliser.mean, [3.0, 2.5])
    np.testing.assert_allclose(normaliser.std, [1.0, np.std([1, 2, 3, 4])])


def test_statistics_merge():
    encoding = Encoding(SCHEMA)
    rows = np.concatenate([encoding.rows(t) for t in DATA[:3]])
    whole = Statistics.of(encoding, rows)
    parts = Statistics.merged(
        [Statistics.of(encoding, rows[:2]), Statistics.of(encoding, rows[2:])]
    )
    for name in ("count", "total", "square"):
        np.testing.assert_allclose(getattr(whole, name), getattr(parts, name))


@pytest.mark.parametrize("loss", ["relative_l2", "mse"])
def test_loss_is_what_it_says(loss):
    trainer = Trainer(settings_with(loss=loss), SCHEMA)
    encoding = trainer.model.encoding
    rows = np.concatenate([encoding.rows(t) for t in DATA[:2]])
    trainer.model.network.normalise(
        Normaliser.fit(Statistics.of(encoding, rows)), trainer.model.encoding
    )
    parts = encoding.split(rows)
    with torch.no_grad():
        made = trainer.model.network(*map(torch.from_numpy, map(np.ascontiguousarray, parts[:3])))
    truth, made = parts.outputs, made.numpy()
    if loss == "mse":
        scale = truth.std(axis=(0, 2, 3), keepdims=True)
        expected = np.mean(((made - truth) / scale) ** 2)
    else:
        quotients = []
        for part in (slice(0, 1), slice(1, 3)):
            error = np.linalg.norm((made - truth)[:, part].reshape(len(rows), -1), axis=1)
            quotients.append(error / np.linalg.norm(truth[:, part].reshape(len(rows), -1), axis=1))
        expected = np.mean(quotients)
    assert trainer.step(rows) == pytest.approx(expected, rel=1e-4)


def test_divergence_says_what_to_do():
    with pytest.raises(ConvergenceError, match=r"diverged: loss .* lower train.learning_rate"):
        Trainer(settings_with(learning_rate=1e30, loss="mse"), SCHEMA).run(memory())


def test_data_without_trajectories_say_so():
    with pytest.raises(StoreError, match="no finished training trajectories"):
        Trainer(settings_with(), SCHEMA).run(memory([]))


def test_threads_follow_the_solvers(caplog):
    import os

    cores = len(os.sched_getaffinity(0))
    before = torch.get_num_threads()
    seen = []

    class Live(MemoryStream):
        """Ends after its third poll, as a campaign would."""

        polls = 0

        def poll(self, at_most):
            self.polls += 1
            return super().poll(12 if self.polls < 4 else at_most)

    try:
        trainer = Trainer(
            settings_with(threads=0, log_every=1, buffer={"kind": "reservoir", "capacity": 40}),
            SCHEMA,
            observers=[lambda kind, **v: seen.append(v["threads"])],
            solver_ranks=cores - 1,
        )
        torch.set_num_threads(1)
        trainer.run(Live(DATA, SCHEMA, 5))
    finally:
        torch.set_num_threads(before)
    assert seen[0] == 1
    assert seen[-1] == cores


def test_waits_rather_than_repeat_too_often():
    """While the stream is open, the mean number of draws per item stays below the cap."""
    ratios = []

    class Slow(MemoryStream):
        def poll(self, at_most):
            ratios.append(trainer.buffer.n_got / max(trainer.buffer.n_put, 1))
            return super().poll(1)

    schema = bare_schema()
    data = trajectories(schema, 30)
    settings = settings_with(
        n_batches=60, max_repeats=3, buffer={"kind": "reservoir", "capacity": 40, "threshold": 2}
    )
    trainer = Trainer(settings, schema)
    trainer.run(Slow(data, schema, 3))
    assert max(ratios) <= 3 + 4 / 3
    assert trainer.batch == 60  # once the stream has ended, the budget is used up
    assert trainer.buffer.n_got > 6 * trainer.buffer.n_put
    assert trainer.buffer.n_put == 30


def test_train_table_round_trip():
    settings = settings_with(max_seconds=12.5)
    assert build(TrainSettings, as_table(settings)) == settings
    with pytest.raises(
        ConfigError, match="learning_rat: unknown key; did you mean 'learning_rate'"
    ):
        build(TrainSettings, {"learning_rat": 1.0})
