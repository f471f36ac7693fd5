"""The trainer's side of active sampling: when generations are made, of what, what items weigh."""

from __future__ import annotations

import numpy as np
import pytest

from simlab.core.config import build
from simlab.core.samples import Trajectory
from simlab.learn.active import ActiveSampling
from simlab.learn.settings import TrainSettings
from simlab.learn.stream import MemoryStream
from simlab.learn.trainer import Trainer
from simlab.problems.breed import Breed, Breeder
from simlab.problems.generations import DrawLog, GenerationFiles
from simlab.problems.spaces import Box
from simlab.store.schema import Axis, FieldSpec, Schema

BOUNDS = {"a": (2.0, 6.0)}
SEED = 61231
BREED = {"period": 10, "share": (0.5, 0.5), "sigma": 0.05, "seen": 0.0}


def active(directory, n_runs=1000, n_steps=1, **settings):
    breed = Breed(**BREED | settings)
    return ActiveSampling(breed, BOUNDS, SEED, directory, n_runs=n_runs, n_steps=n_steps)


def draw(directory, ids, generation=0):
    log = DrawLog(directory)
    for index in ids:
        log.note(index, generation)


def items(ids):
    return np.stack([np.asarray(ids), np.zeros(len(ids), dtype=int)], axis=1)


def uniform(ids):
    return Breeder(Breed(), BOUNDS, SEED).draw(ids, 0)[:, 0]


def hard(ids):
    """Losses that are ten times as large in the lowest tenth of the range."""
    return np.where(uniform(ids) < 2.4, 10.0, 1.0)


def test_a_generation_is_due_every_so_many_runs_and_bred_where_losses_are_high(tmp_path):
    trained, solver = active(tmp_path), GenerationFiles(tmp_path)
    draw(tmp_path, range(40))
    trained.weights(items(range(40)))
    trained.note(items(range(40)), hard(range(40)))
    assert trained.evolve(9) is None
    made = trained.evolve(13)
    n_hard = int((hard(range(40)) > 1).sum())
    assert made == {
        "generation": 1, "parents": n_hard, "bred": 0.5, "finished": 13, "drawn": 40, "ess": 1.0
    }  # fmt: skip
    assert trained.evolve(22) is None
    assert trained.evolve(23)["generation"] == 2
    assert trained.evolve(33)["generation"] == 3
    found = solver.news()
    assert [facts["finished"] for _, facts in found] == [13, 23, 33]
    parents = 2.0 + 4.0 * found[0][0].parents[:, 0]
    np.testing.assert_allclose(np.sort(parents), np.sort(uniform(range(40))[hard(range(40)) > 1]))


def test_no_generation_is_made_when_all_runs_are_drawn(tmp_path):
    trained = active(tmp_path, n_runs=30)
    draw(tmp_path, range(29))
    trained.note(items(range(9)), hard(range(9)))
    assert trained.evolve(10) is None  # ten runs have to be seen first
    trained.note(items(range(29)), hard(range(29)))
    assert trained.evolve(10)["generation"] == 1
    draw(tmp_path, [29], generation=1)
    assert trained.evolve(20) is None
    assert len(GenerationFiles(tmp_path).news()) == 1


def test_weights_are_those_of_what_is_learned_from(tmp_path):
    trained = active(tmp_path)
    draw(tmp_path, range(40))
    trained.note(items(range(40)), hard(range(40)))
    w = trained.weights(items(range(40)))
    np.testing.assert_array_equal(w, np.ones(40))
    trained.evolve(10)
    draw(tmp_path, range(100, 400), generation=1)
    ((generation, _),) = GenerationFiles(tmp_path).news()
    breeder = Breeder(Breed(**BREED), BOUNDS, SEED)
    breeder.add(generation)
    ids = [*range(6), *range(100, 110)]
    w = trained.weights(items(ids))
    q = np.concatenate([np.ones(6), breeder.density(breeder.draw(ids[6:], 1), 1)])
    np.testing.assert_allclose(w, (1 / q) / (1 / q).mean(), rtol=1e-12)
    assert trained.report()["ess"] == pytest.approx(
        np.mean([1.0, w.sum() ** 2 / (len(w) * (w**2).sum())])
    )
    assert active(tmp_path, reweight=False).weights(items(ids)) is None


def test_a_resumed_training_knows_runs_and_generations(tmp_path):
    trained = active(tmp_path)
    draw(tmp_path, range(40))
    trained.weights(items(range(40)))
    trained.note(items(range(40)), hard(range(40)))
    state = trained.state_dict()
    first = trained.evolve(10)
    again = active(tmp_path)
    again.load_state_dict(state)
    assert again.report()["generation"] == 1
    draw(tmp_path, range(40, 90), generation=1)
    np.testing.assert_array_equal(again.weights(items([3, 50])), trained.weights(items([3, 50])))
    assert again.evolve(19) is None
    assert again.evolve(20)["parents"] == first["parents"]
    assert trained.evolve(20) is None  # somebody else has made it


AXIS = Axis("x", tuple(np.linspace(0, 1, 4).tolist()))
SCHEMA = Schema("toy", (AXIS,), (FieldSpec("u"),), times=(0.5, 1.0), parameters={"a": ""})


def runs(n, twist):
    """Runs that resemble each other, but for a twist in the lowest tenth of the range."""
    made = []
    for mu in Box(BOUNDS).sample(n, SEED):
        a = mu.parameters["a"]
        wave = twist * np.sin(40 * a) if a < 2.4 else 0.0
        values = np.array([[a + wave] * 4, [a - wave] * 4], dtype=np.float32)
        made.append(Trajectory(mu, np.array(SCHEMA.times), {"u": values}))
    return made


def train(directory, sampling, n=120, twist=3.0):
    settings = {"operator": {"kind": "mlp", "hidden": [16]}, "n_batches": n, "batch": 16}
    settings |= {"seed": 88, "threads": 1, "loss": "mse", "checkpoint_seconds": 1e9}
    told = []
    trainer = Trainer(
        build(TrainSettings, settings),
        SCHEMA,
        directory,
        observers=[lambda kind, **values: told.append((kind, values))],
        active=sampling,
    )
    stream = MemoryStream(runs(60, twist), SCHEMA, 5)
    return trainer, stream, told


def test_a_trainer_finds_the_hard_runs(tmp_path):
    draw(tmp_path, range(60))
    sampling = active(tmp_path, n_steps=2, seen=1.0)
    trainer, stream, _ = train(None, sampling, n=200)
    stream.finished = []
    trainer.run(stream)
    assert sampling.evolve(60)["parents"] > 0
    ((generation, _),) = GenerationFiles(tmp_path).news()
    parents = 2.0 + 4.0 * generation.parents[:, 0]
    n_hard = int((uniform(range(60)) < 2.4).sum())
    assert generation.shares[parents < 2.4].sum() > 4 * n_hard / 60


def test_a_trainer_makes_generations_and_says_so(tmp_path):
    draw(tmp_path, range(60))
    trainer, stream, told = train(None, active(tmp_path, n_steps=2, period=30, seen=1.0))
    trainer.run(stream)
    ((_, facts),) = GenerationFiles(tmp_path).news()
    assert facts["finished"] == 60
    (batch,) = [v["batch"] for kind, v in told if kind == "sampling" and v["generation"] == 1]
    assert batch * 16 > 30 * 2  # not before thirty runs were seen
    last = [values for kind, values in told if kind == "train"][-1]
    assert last["sampling"] == {"generation": 1, "bred": 0.5, "ess": 1.0}


def test_a_resumed_trainer_goes_on_with_what_it_knew_of_runs(tmp_path):
    draw(tmp_path / "a", range(60))
    draw(tmp_path / "b", range(60))
    options = {"n_steps": 2, "period": 61}
    straight, stream, _ = train(tmp_path / "one", active(tmp_path / "a", **options))
    straight.run(stream)
    first, stream, _ = train(tmp_path / "two", active(tmp_path / "b", **options))
    first.run(stream, stop=lambda: first.batch >= 50)
    second, stream, _ = train(tmp_path / "two", active(tmp_path / "b", **options))
    assert second.resume(stream)
    second.run(stream)
    assert second._active.state_dict() == straight._active.state_dict()


def test_weights_of_one_change_nothing(tmp_path):
    draw(tmp_path, range(60))
    weighted, stream, _ = train(None, active(tmp_path, n_steps=2, period=61), n=20)
    plain, other, _ = train(None, None, n=20)
    for trainer, each in ((weighted, stream), (plain, other)):
        trainer.run(each)
    for name, value in weighted.model.tensors().items():
        np.testing.assert_allclose(value, plain.model.tensors()[name], rtol=1e-5, atol=1e-6)
