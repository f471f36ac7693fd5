"""Unusual schemas and values: kept as they are, or refused before anything is computed."""

import json

import numpy as np
import pytest
from store_helpers import SEED, make_schema, sample_of, step_of

from simlab.core.errors import SchemaError
from simlab.core.samples import Sample
from simlab.store.loader import Loader
from simlab.store.schema import Axis, Boundary, FieldSpec, Mesh, Schema
from simlab.store.store import SnapshotStore

NAN = float("nan")
LINE = Axis("x", (0.0, 1.0, 2.0))
U = FieldSpec("u")


def schema_with(**changes):
    return Schema(**{"name": "odd", "axes": (LINE,), "fields": (U,)} | changes)


def made(path, schema, n=2, **parameters):
    """A finished store; all its values are random."""
    store = SnapshotStore.create(path, schema, n=n, seed=SEED, split={"train": 1.0})
    with store.writer() as writer:
        for traj in range(n):
            writer.begin(Sample(traj, SEED, parameters))
            for step, time in enumerate(schema.times):
                writer.append(traj, step, time, step_of(schema, traj, step))
            writer.finish(traj)
    store.seal(final=True)
    return store


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"axes": (Axis("x", ()),)}, "axis 'x': at least one number"),
        ({"axes": (Axis("x", (0.0, NAN)),)}, "axis 'x': .* finite"),
        ({"axes": ()}, "'u' is on a grid without axes"),
        ({"axes": (LINE, LINE)}, "axes x, x"),
        ({"times": ()}, "times: at least one number"),
        ({"times": (0.0, NAN)}, "times: .* finite"),
        ({"constants": {"rho": NAN}}, "constant 'rho' is nan"),
        ({"constants": {"n_trajectories": 2.0}}, "attribute of that name"),
        ({"constants": {"simlab_schema": 2.0}}, "attribute of that name"),
        ({"parameters": {".": "1"}}, "'.': a name is not"),
        ({"fields": (FieldSpec(""),)}, "'': a name is not"),
        ({"fields": (FieldSpec("a\0b"),)}, "no zero byte"),
        ({"fields": (U, FieldSpec("u.delta"))}, "'u.delta': statistics"),
        ({"fields": (FieldSpec("u", order=3),)}, "order 3"),
        ({"boundaries": (Boundary("q"),)}, "boundary of 'q'"),
        ({"boundaries": (Boundary("x"), Boundary("x"))}, "given twice"),
        ({"boundaries": (Boundary("x", "sticky"),)}, "'sticky': it is periodic"),
        ({"mesh": Mesh(np.empty((0, 2)), {})}, "mesh has no points"),
    ],
)
def test_what_no_shard_can_hold_is_refused_at_once(changes, words):
    with pytest.raises(SchemaError, match=words):
        schema_with(**changes)


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("n_axes", [3, 4, 5])
def test_fields_of_many_axes_are_kept(tmp_path, n_axes, order):
    axes = tuple(Axis(letter, (0.0, 1.0)) for letter in "vwxyz"[:n_axes])
    schema = schema_with(axes=axes, fields=(FieldSpec("u", order=order),))
    store = made(tmp_path / "s", schema)
    assert store.verify(deep=True) == []
    found = store.split("train").arrays()["u"]
    windows = next(iter(Loader(store, shuffle=False).batches(2))).outputs["u"]
    for traj in range(2):
        expected = step_of(schema, traj, 0)["u"].astype(np.float32)
        assert np.array_equal(found[traj, 0], expected)
        assert np.array_equal(windows[traj, 0], expected)


def test_unusual_names_are_kept(tmp_path):
    names = ('"q"', "a\nb", "a\\b", "..", "# ü", "x" * 300, "time", "field_names")
    schema = schema_with(fields=tuple(map(FieldSpec, names)), parameters={"'mu: ": "1"})
    store = made(tmp_path / "[a]*\n ü", schema, **{"'mu: ": 1.5})
    assert store.verify(deep=True) == []
    (found,) = [item for item in SnapshotStore.open(store.path).split("train") if item.sample.index]
    for name, values in step_of(schema, 1, 0).items():
        assert np.array_equal(found.outputs[name][0], values.astype(np.float32))
    yaml = pytest.importorskip("yaml")
    with open(store.path / "stats.yaml") as stream:
        assert yaml.safe_load(stream)["mean"].keys() == set(names)


def test_numbers_of_a_schema_may_be_numpy_s(tmp_path):
    given = {"times": tuple(np.arange(2)), "constants": {"rho": np.float32(2.5)}}
    schema = schema_with(axes=(Axis("x", tuple(np.arange(3))),), **given)
    assert Schema.from_json(json.loads(json.dumps(schema.to_json()))).times == (0.0, 1.0)
    store = made(tmp_path / "s", schema)
    made_again = SnapshotStore.create(
        store.path, store.schema, n=2, seed=SEED, split={"train": 1.0}
    )
    assert len(made_again.split("train")) == 2


@pytest.mark.parametrize(
    "values",
    [
        np.array([1j, 2j, 3j]),
        np.array(["1", "2", "3"]),
        np.array([1.0, None, 3.0], dtype=object),
        np.array(["2001-01-01"] * 3, dtype="M8[D]"),
        np.ma.masked_equal([1.0, 2.0, 3.0], 2.0),
    ],
)
def test_what_is_no_real_number_is_refused(tmp_path, values):
    store = SnapshotStore.create(tmp_path / "s", schema_with(), n=1, seed=SEED)
    with store.writer() as writer:
        writer.begin(Sample(0, SEED))
        with pytest.raises(SchemaError, match="real numbers"):
            writer.append(0, 0, 0.0, {"u": values})
        writer.append(0, 0, 0.0, {"u": np.arange(3, dtype=">i2")})  # what is one in any type
        writer.finish(0)
    store.seal(final=True)
    assert all(item.outputs["u"].tolist() == [[0, 1, 2]] for item in store.split("train"))


def test_a_parameter_that_is_no_number_is_refused(tmp_path):
    schema = make_schema(1, 1)
    store = SnapshotStore.create(tmp_path / "s", schema, n=1, seed=SEED)
    sample = sample_of(schema, 0)
    with store.writer() as writer, pytest.raises(SchemaError, match="parameter 'mu' is nan"):
        writer.begin(Sample(0, SEED, {**sample.parameters, "mu": NAN}, sample.fields))
