"""The surrogate protocol, for every network there is."""

import json

import numpy as np
import pytest
import torch
from learn_helpers import (
    SMALL,
    field_schema,
    heat_schema,
    marching_schema,
    sample_of,
    trajectories,
)

from simlab.core.errors import ConfigError, SchemaError, StoreError
from simlab.core.samples import Sample
from simlab.core.surrogate import Surrogate
from simlab.learn.operators import MLP, operators
from simlab.learn.settings import TrainSettings
from simlab.learn.surrogate import NeuralSurrogate

KINDS = sorted(operators.kinds())
SCHEMAS = {  # of the kinds that cannot learn field_schema
    "mlp": lambda: heat_schema(8, 3),
    "mppde": lambda: marching_schema(12, 3),
}


def schema_for(kind):
    return SCHEMAS[kind]() if kind in SCHEMAS else field_schema(12)


def make(kind, **train):
    train = {"n_batches": 120, "batch": 8, "learning_rate": 5e-3, "threads": 1} | train
    return NeuralSurrogate(
        operators.build({"kind": kind, **SMALL.get(kind, {})}), TrainSettings(**train)
    )


@pytest.fixture(scope="module", params=KINDS)
def fitted(request):
    schema = schema_for(request.param)
    data = trajectories(schema, 40)
    return make(request.param).fit(data, schema=schema), schema, data


def test_answers_the_protocol(fitted):
    assert isinstance(fitted[0], Surrogate)


def test_predict_gives_every_output(fitted):
    model, schema, _ = fitted
    samples = [sample_of(schema, index) for index in range(100, 107)]
    fields = model.predict(samples)
    assert set(fields) == {spec.name for spec in schema.outputs}
    for spec in schema.outputs:
        assert fields[spec.name].shape == (7, len(schema.times), *schema.field_shape(spec))
        assert fields[spec.name].dtype == np.float32
    assert {name: v.shape[0] for name, v in model.predict([]).items()} == dict.fromkeys(fields, 0)


def test_beats_the_mean(fitted):
    model, schema, data = fitted
    test = trajectories(schema, 20, start=200)
    mean = {n: np.mean([t.outputs[n] for t in data], axis=0) for n in data[0].outputs}
    fields = model.predict([t.sample for t in test])
    for name in mean:
        truth = np.stack([t.outputs[name] for t in test])
        assert np.linalg.norm(fields[name] - truth) < 0.7 * np.linalg.norm(mean[name] - truth)


def test_batching_changes_nothing(fitted):
    model, schema, _ = fitted
    samples = [sample_of(schema, index) for index in range(130, 220)]
    together = model.predict(samples)
    for name, values in together.items():
        for i in (0, 63, 64, 89):
            alone = model.predict(samples[i : i + 1])[name][0]
            np.testing.assert_allclose(values[i], alone, rtol=1e-4, atol=1e-5)


def test_save_and_load_bit_for_bit(fitted, tmp_path):
    model, schema, _ = fitted
    model.save(tmp_path / "model")
    again = NeuralSurrogate.load(tmp_path / "model")
    samples = [sample_of(schema, index) for index in range(300, 305)]
    for name, values in model.predict(samples).items():
        np.testing.assert_array_equal(again.predict(samples)[name], values)
    np.testing.assert_array_equal(again.estimate(samples), model.estimate(samples))
    assert again.train == model.train
    assert again.model.schema.to_json() == schema.to_json()
    facts = json.loads((tmp_path / "model" / "model.json").read_text())
    assert facts["class"] == "NeuralSurrogate"
    assert {"torch", "numpy"} <= set(facts["versions"])


def test_estimate_is_the_validated_error_inside_and_inf_outside(fitted):
    model, schema, data = fitted
    inside = [t.sample for t in data[1:6]]
    estimates = model.estimate(inside)
    assert np.isfinite(estimates).all()
    held_out = model.model.errors(data[::10])
    np.testing.assert_allclose(estimates, np.quantile(held_out, 0.95), rtol=1e-6)
    name = next(iter(schema.parameters))
    far = Sample(7, 1, {**data[1].sample.parameters, name: 30.0}, data[1].sample.fields)
    assert model.estimate([far]) == np.inf
    for spec in schema.inputs:
        fields = {spec.name: 50.0 * data[1].sample.fields[spec.name]}
        assert model.estimate([Sample(7, 1, data[1].sample.parameters, fields)]) == np.inf


def test_same_seed_same_model(fitted):
    model, schema, data = fitted
    torch.manual_seed(1)
    before = torch.get_rng_state()
    again = make(model.train.operator.kind).fit(data, schema=schema)
    assert torch.equal(torch.get_rng_state(), before)
    samples = [sample_of(schema, 400)]
    for name, values in model.predict(samples).items():
        np.testing.assert_array_equal(again.predict(samples)[name], values)


def test_schema_from_bare_trajectories():
    data = trajectories(field_schema(12), 24)
    model = make("fno", n_batches=3).fit(data)
    assert model.predict([data[0].sample])["u"].shape == (1, 1, 12, 12)


def test_without_validation_there_is_no_estimate():
    schema = heat_schema(8, 3)
    model = make("mlp", n_batches=3).fit(trajectories(schema, 8), schema=schema)
    assert model.estimate([sample_of(schema, 3)]) == np.inf


def test_own_validation_is_used():
    schema = heat_schema(8, 3)
    other = trajectories(schema, 5, start=70)
    model = make("mlp").fit(trajectories(schema, 12), schema=schema, validation=other)
    expected = np.quantile(model.model.errors(other), 0.95)
    np.testing.assert_allclose(model.estimate([sample_of(schema, 5)]), expected, rtol=1e-6)


def test_not_fitted_says_so():
    with pytest.raises(ConfigError, match="not fitted"):
        NeuralSurrogate(MLP()).predict([])


def test_nothing_to_fit_says_so():
    with pytest.raises(ConfigError, match="no trajectories"):
        NeuralSurrogate(MLP()).fit([])


def test_missing_input_is_named(fitted):
    model, schema, _ = fitted
    name = next(iter(schema.parameters))
    with pytest.raises(SchemaError, match=f"sample 9: {name}"):
        model.predict([Sample(9, 1, {}, {})])


def test_load_of_nothing(tmp_path):
    with pytest.raises(StoreError, match="holds no model"):
        NeuralSurrogate.load(tmp_path)
    (tmp_path / "model.json").write_text("{}")
    (tmp_path / "model.pt").write_bytes(b"PK broken")
    with pytest.raises(StoreError, match="holds no model"):
        NeuralSurrogate.load(tmp_path)
