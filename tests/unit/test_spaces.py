"""Parameter spaces: streams, bounds, products."""

import numpy as np
import pytest

from simlab.core.samples import Sample
from simlab.problems.fields import FourParameter, Lognormal, TwoPhase
from simlab.problems.spaces import Box, FieldSpace, Product

BOX = Box({"left": (100.0, 500.0), "speed": (-2.0, -1.0)})
FIELD = FieldSpace("a", (6, 7), FourParameter())
SPACES = [BOX, FIELD, Product((BOX, FIELD, FieldSpace("k", (6, 7), Lognormal())))]


@pytest.mark.parametrize("space", SPACES, ids=lambda s: type(s).__name__)
def test_samples_depend_on_seed_and_index_only(space):
    eight, tail = space.sample(8, seed=313), space.sample(5, seed=313, start=3)
    for one, other in zip(eight[3:], tail, strict=True):
        assert (one.index, one.seed) == (other.index, other.seed)
        assert dict(one.parameters) == dict(other.parameters)
        assert set(one.parameters) | set(one.fields) == set(space.names)
        for name, values in one.fields.items():
            np.testing.assert_array_equal(values, other.fields[name])
    assert [mu.index for mu in tail] == [3, 4, 5, 6, 7]
    first, other = eight[0], space.sample(1, seed=314)[0]
    assert dict(first.parameters) != dict(other.parameters)
    assert dict(first.parameters) != dict(eight[1].parameters)
    assert all(space.contains(mu) for mu in eight)


def test_box_is_uniform_and_bounded():
    values = np.array([list(mu.parameters.values()) for mu in BOX.sample(4000, seed=17)])
    unit = (values - [100.0, -2.0]) / [400.0, 1.0]
    assert unit.min() >= 0
    assert unit.max() <= 1
    np.testing.assert_allclose(unit.mean(0), 0.5, atol=0.02)
    np.testing.assert_allclose(unit.std(0), 12**-0.5, rtol=0.04)
    assert abs(np.corrcoef(unit.T)[0, 1]) < 0.05


def test_box_refuses_what_is_missing_or_outside():
    assert BOX.contains(Sample(0, 0, {"left": 100.0, "speed": -1.0, "more": 9.0}))
    assert not BOX.contains(Sample(0, 0, {"left": 100.0}))
    assert not BOX.contains(Sample(0, 0, {"left": 99.9, "speed": -1.0}))
    assert not BOX.contains(Sample(0, 0, {"left": np.nan, "speed": -1.0}))


def test_field_space_refuses_wrong_shapes_and_values():
    space = FieldSpace("a", (6, 7), TwoPhase())
    assert space.contains(Sample(0, 0, {}, {"a": np.full((6, 7), 3.0)}))
    assert not space.contains(Sample(0, 0, {}, {"a": np.full((7, 6), 3.0)}))
    assert not space.contains(Sample(0, 0, {}, {"a": np.full((6, 7), 4.0)}))
    assert not space.contains(Sample(0, 0, {}, {}))


def test_parts_of_a_product_are_independent():
    fields = Product(tuple(FieldSpace(name, (8, 8), Lognormal()) for name in "ab"))
    mu = fields.sample(1, seed=99)[0]
    assert abs(np.corrcoef(mu.fields["a"].ravel(), mu.fields["b"].ravel())[0, 1]) < 0.99
    boxes = Product((Box({"p": (0.0, 1.0)}), Box({"q": (0.0, 1.0)})))
    pairs = np.array([list(mu.parameters.values()) for mu in boxes.sample(2000, seed=6)])
    assert abs(np.corrcoef(pairs.T)[0, 1]) < 0.1
    with pytest.raises(ValueError, match="share a name"):
        Product((BOX, Box({"speed": (0.0, 1.0)})))
