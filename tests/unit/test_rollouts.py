"""One-step networks: what a window from the initial state holds, rollouts, errors, refusals."""

import numpy as np
import pytest
import torch

from simlab.core.config import build
from simlab.core.errors import ConfigError, SchemaError
from simlab.core.metrics import relative_l2
from simlab.core.samples import Sample, Trajectory, generator
from simlab.core.surrogate import Surrogate
from simlab.learn.encoding import Encoding
from simlab.learn.layout import WindowLayout, learned_schema
from simlab.learn.model import Model
from simlab.learn.pairs import PairedStream
from simlab.learn.settings import TrainSettings
from simlab.learn.stream import MemoryStream
from simlab.learn.surrogate import NeuralSurrogate
from simlab.learn.trainer import Trainer
from simlab.pipeline.evaluate import Evaluation, evaluate
from simlab.problems.family import families
from simlab.store.schema import Axis, FieldSpec, Schema

N, T = 6, 7
DECAY = 0.8


def decay_schema(**changes):
    """``u`` halves towards a level, ``v`` sums it up: u begins with a field, v with a number."""
    facts = {
        "axes": (Axis("x", tuple((np.arange(N) / N).tolist())),),
        "fields": (FieldSpec("u0", "input"), FieldSpec("u"), FieldSpec("v")),
        "times": tuple((0.5 * np.arange(1, T + 1)).tolist()),
        "parameters": {"level": "1"},
        "initial": {"u": "u0", "v": 2.0},
    }
    return Schema("decay", **facts | changes)


SCHEMA = decay_schema()


def step(u, v, level):
    u = level + DECAY * (u - level)
    return u, v + 0.1 * u


def trajectory(index):
    random = generator(8117, index)
    level, u = float(random.uniform(-1, 1)), random.uniform(-2, 2, N)
    sample, v, states = Sample(index, 8117, {"level": level}, {"u0": u}), np.full(N, 2.0), []
    for _ in range(T):
        u, v = step(u, v, level)
        states.append((u, v))
    outputs = {name: np.float32([s[k] for s in states]) for k, name in enumerate("uv")}
    return Trajectory(sample, np.array(SCHEMA.times), outputs)


DATA = [trajectory(index) for index in range(40)]


def settings(ahead, **changes):
    table = {
        "operator": {"kind": "mlp", "hidden": [32]},
        "ahead": ahead,
        "n_batches": 5,
        "batch": 16,
        "threads": 1,
    }
    return build(TrainSettings, table | changes)


class Exact(torch.nn.Module):
    """The change that the equations of :func:`step` make, ``ahead`` times."""

    def __init__(self, ahead, gain=1.0):
        super().__init__()
        self.ahead, self.gain = ahead, gain

    def forward(self, parameters, fields, time):
        u, v = begun = fields[:, 0], fields[:, 1]
        made = []
        for _ in range(self.ahead):
            u, v = step(u, v, parameters)
            made += [self.gain * u - begun[0], v - begun[1]]
        return torch.stack(made, dim=1)


def exact(ahead, gain=1.0):
    model = Model(settings(ahead), SCHEMA)
    model.network.network = Exact(ahead, gain)
    return model


@pytest.mark.parametrize("ahead", [1, 3])
def test_the_first_window_begins_with_the_initial_state(ahead):
    stream = PairedStream(MemoryStream(DATA, SCHEMA, 5), ahead)
    encoding = Encoding(stream.schema)
    assert [spec.name for spec in stream.schema.inputs] == ["u_now", "v_now"]  # u0 is no other one
    np.testing.assert_allclose(stream.schema.times, 0.5 * np.arange(T - ahead + 1))
    items = [item for _ in range(99) for item in stream.poll(11)]
    assert sorted((i.traj, i.step) for i in items) == [
        (traj, k) for traj in range(40) for k in range(T - ahead + 1)
    ]
    for item in items:
        truth = DATA[item.traj]
        parts = encoding.split(item.row[None])
        u, v = np.float32(truth.sample.fields["u0"]), np.full(N, 2.0, np.float32)
        if item.step:
            u, v = (truth.outputs[name][item.step - 1] for name in "uv")
        np.testing.assert_array_equal(parts.fields[0], [u, v])
        assert parts.time[0, 0] == np.float32(0.5 * item.step)
        later = [truth.outputs[n][item.step + k] for k in range(ahead) for n in "uv"]
        np.testing.assert_array_equal(parts.outputs[0], later)
        changes = later - np.tile([u, v], (ahead, 1))
        np.testing.assert_allclose(encoding.learned(parts)[0], changes, atol=1e-6)
        np.testing.assert_array_equal(stream.row(item.traj, item.step), item.row)


@pytest.mark.parametrize(
    ("initial", "wanted", "kept"),
    [
        ({"u": "level", "v": -1.5}, [3.0] * N + [-1.5] * N, "abcdef"),
        ({"u": tuple("abcdef"), "v": "u0"}, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0] + [7.0] * N, ["level"]),
    ],
)
def test_initial_states_come_from_where_the_schema_says(initial, wanted, kept):
    parameters = dict.fromkeys(("level", *"abcdef"), "1")
    schema = decay_schema(parameters=parameters, initial=initial)
    layout = WindowLayout(schema, 1)
    values = {"level": 3.0} | {name: float(k) for k, name in enumerate("abcdef")}
    sample = Sample(1, 2, values, {"u0": np.full(N, 7.0)})
    found = layout.start(Encoding(schema).condition(sample)[None])
    np.testing.assert_array_equal(found[0], wanted)
    assert set(layout.schema.parameters) == set(kept)


@pytest.mark.parametrize("ahead", [1, 2, 3, T - 1])
def test_rollouts_of_the_exact_step_are_the_trajectories(ahead):
    model = exact(ahead)
    made = model.predict([item.sample for item in DATA])
    steps = model.predict_steps(DATA)
    for name in "uv":
        truth = np.stack([item.outputs[name] for item in DATA])
        np.testing.assert_allclose(made[name], truth, atol=2e-5)
        np.testing.assert_allclose(steps[name], truth, atol=2e-5)
    assert model.errors(DATA).shape == (40,)
    assert model.step_errors(DATA).shape == (40, T)
    assert model.predict([])["u"].shape == (0, T, N)


def test_errors_of_steps_pile_up_in_rollouts():
    """A step that is 1 % too large: 1 % from the truth, more and more on its own answers."""
    model = exact(1, gain=1.01)
    steps = model.predict_steps(DATA)["u"]
    truth = np.stack([item.outputs["u"] for item in DATA])
    np.testing.assert_allclose(relative_l2(steps, truth, n_kept=2), 0.01, rtol=1e-2)
    grown = relative_l2(model.predict([t.sample for t in DATA])["u"], truth, n_kept=2)
    np.testing.assert_allclose(grown[:, 0], 0.01, rtol=1e-2)
    assert np.all(np.median(grown, axis=0)[1:] > 0.015)
    found = model.validate(DATA)
    assert found["rel_l2"]["median"] < 0.6 * found["rollout"]["median"]
    assert model.validation["p95"] == pytest.approx(found["rollout"]["p95"])


def test_fit_evaluate_save_and_load(tmp_path):
    train = settings(1, n_batches=150, learning_rate=1e-2)
    surrogate = NeuralSurrogate(train=train).fit(DATA, schema=SCHEMA)
    assert isinstance(surrogate, Surrogate)
    fresh = [trajectory(index) for index in range(100, 112)]
    found = evaluate(surrogate, fresh, baseline=DATA)
    for item in found.fields.values():
        assert item.one_step.shape == (12, T)
        assert np.mean(item.errors) < 0.25 * np.mean(item.baseline)
        assert np.mean(item.one_step) < np.mean(item.per_time)
        np.testing.assert_allclose(item.one_step[:, 0], item.per_time[:, 0], rtol=1e-5)
    assert "one step" in str(found)
    back = Evaluation.read(found.write(tmp_path / "evaluation.json"))
    np.testing.assert_allclose(back.fields["u"].one_step, found.fields["u"].one_step)
    facts = found.as_dict()["fields"]["u"]
    assert facts["per_time"][2]["one_step"]["mean"] == pytest.approx(
        found.fields["u"].one_step[:, 2].mean()
    )
    surrogate.save(tmp_path / "model")
    loaded = NeuralSurrogate.load(tmp_path / "model")
    samples = [item.sample for item in fresh]
    np.testing.assert_array_equal(loaded.predict(samples)["v"], surrogate.predict(samples)["v"])
    np.testing.assert_array_equal(loaded.estimate(samples), surrogate.estimate(samples))
    assert loaded.model.one_step == surrogate.model.one_step
    far = Sample(1, 2, {"level": 99.0}, {"u0": np.zeros(N)})
    assert loaded.estimate([far, *samples[:1]]).tolist()[0] == np.inf


def test_a_stopped_training_on_windows_goes_on_bit_for_bit(tmp_path):
    made = settings(2, n_batches=20, pilot=3)
    straight = Trainer(made, SCHEMA)
    straight.run(MemoryStream(DATA, SCHEMA, 5))
    lines = []
    for part in (8, 20):
        trainer = Trainer(
            made, SCHEMA, tmp_path, observers=[lambda kind, **v: lines.append((kind, v))]
        )
        stream = MemoryStream(DATA, SCHEMA, 5)
        assert trainer.resume(stream) == (part == 20)
        trainer.run(stream, DATA[:4], stop=lambda t=trainer, n=part: t.batch >= n)
    other = Model.load(tmp_path).tensors()
    assert all(torch.equal(v, other[n]) for n, v in straight.model.tensors().items())
    last = [values for kind, values in lines if kind == "validation"][-1]
    assert {"rel_l2", "rollout"} <= set(last)


def test_what_does_not_allow_single_steps_is_refused():
    with pytest.raises(ConfigError, match=r"train.ahead = 1.*in which state v begins.*initial"):
        learned_schema(settings(1), decay_schema(initial={"u": "u0"}))
    times = (0.1, 0.2, 0.4, 0.5)
    with pytest.raises(ConfigError, match=r"times 0\.1 to 0\.2 apart"):
        Trainer(settings(1), decay_schema(times=times))
    with pytest.raises(ConfigError, match="windows of 7 steps ahead need"):
        learned_schema(settings(7), SCHEMA)
    with pytest.raises(ConfigError, match=r"operator 'mppde' marches in time by itself"):
        learned_schema(settings(1, operator="mppde"), SCHEMA)
    with pytest.raises(ConfigError, match=r"train\.ahead is 0"):
        Model(settings(0, operator={"kind": "mlp", "hidden": [4]}), SCHEMA).predict_steps(DATA)
    assert learned_schema(settings(0), SCHEMA) is SCHEMA


@pytest.mark.parametrize(
    "wrong",
    [
        {"initial": {"w": "u0"}},
        {"initial": {"u": "v"}},
        {"initial": {"u": ("level",) * (N - 1)}},
        {"fields": (FieldSpec("a", "input", order=1), FieldSpec("u", after="a"), FieldSpec("v"))},
    ],
)
def test_schemas_that_contradict_themselves(wrong):
    with pytest.raises(SchemaError, match="decay: "):
        decay_schema(**{"initial": {}} | wrong)


@pytest.mark.parametrize(
    "kind", ["lorenz", "burgers", "advection_burgers", "heat", "reaction_diffusion"]
)
def test_families_in_time_say_where_they_begin(kind):
    family = families.build({"kind": kind, "n_steps": 5})
    layout = WindowLayout(Schema.from_json(family.schema.to_json()), 1)
    assert layout.has_start
    assert layout.schema.times[0] == pytest.approx(0.0, abs=1e-12)
    mu = family.space.sample(1, 5309)[0]
    start = layout.start(Encoding(family.schema).condition(mu)[None])[0]
    if hasattr(family, "solution"):  # one step from there
        first = next(family.solution(mu))["u"]
        assert np.linalg.norm(first.ravel() - start) < 0.5 * np.linalg.norm(first)
