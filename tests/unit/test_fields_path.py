"""The path of fields: the law of the recurrence, reproducible from anywhere, cheap in sequence."""

import numpy as np
import pytest

from simlab.core.errors import ConfigError
from simlab.problems import fields_path
from simlab.problems.fields import Lognormal, fields
from simlab.problems.fields_path import Path

SHAPE = (9, 7)


@pytest.fixture(autouse=True)
def _nothing_is_kept():
    fields_path._walk.cache_clear()
    yield
    fields_path._walk.cache_clear()


def logs(law, n, seed, start=0, shape=SHAPE):
    """The Gaussian fields behind a path, shape (n, *shape)."""
    return np.log([draw.values for draw in law.draw(shape, n, seed, start)]) / law.scale


@pytest.fixture
def drawn(monkeypatch):
    """Count Gaussian fields."""
    counted = []
    real = Lognormal.gaussian

    def counting(self, shape, random):
        counted.append(shape)
        return real(self, shape, random)

    monkeypatch.setattr(Lognormal, "gaussian", counting)
    return counted


def test_every_way_to_a_field_gives_the_same_bits():
    law = Path(epsilon=0.3)
    in_sequence = [draw.values for draw in law.draw(SHAPE, 40, seed=11)]
    for index in (0, 1, 2, 3, 4, 17, 31, 32, 33, 39):
        fields_path._walk.cache_clear()
        (alone,) = law.draw(SHAPE, 1, seed=11, start=index)
        np.testing.assert_array_equal(alone.values, in_sequence[index])
    for index in (39, 5, 16, 5, 0, 38):  # from whatever the last one left behind
        (jumped,) = law.draw(SHAPE, 1, seed=11, start=index)
        np.testing.assert_array_equal(jumped.values, in_sequence[index])


def test_seeds_names_and_settings_have_paths_of_their_own():
    (one,) = Path().draw(SHAPE, 1, seed=3, start=6)
    others = [
        Path().draw(SHAPE, 1, seed=4, start=6),
        Path().draw(SHAPE, 1, seed=3, start=6, name="b"),
        Path(epsilon=0.06).draw(SHAPE, 1, seed=3, start=6),
        Path(spectrum="neumann").draw(SHAPE, 1, seed=3, start=6),
    ]
    assert all(not np.allclose(one.values, other[0].values) for other in others)


@pytest.mark.parametrize("epsilon", [0.05, 0.3])
def test_the_path_has_the_law_of_the_recurrence(epsilon):
    # covariances over many paths of every pair of the first 14 fields: c^|i - j| times the variance
    n, law = 14, Path(epsilon=epsilon, alpha=2.0, tau=9.0)
    paths = np.array([logs(law, n, seed=seed) for seed in range(700, 1000)])
    flat = np.moveaxis(paths, 1, 0).reshape(n, -1)
    covariance = flat @ flat.T / flat.shape[1]
    single = np.log(
        [Lognormal(alpha=2.0, tau=9.0).draw(SHAPE, 1, seed)[0].values for seed in range(300)]
    )
    variance = np.mean(single**2)
    steps = np.abs(np.subtract.outer(np.arange(n), np.arange(n)))
    c = np.sqrt(1 - epsilon**2)
    np.testing.assert_allclose(covariance / variance, c**steps, atol=0.06)
    innovations = (flat[1:] - c * flat[:-1]) / epsilon
    gram = innovations @ innovations.T / innovations.shape[1] / variance
    np.testing.assert_allclose(gram, np.eye(n - 1), atol=0.06)
    against_past = innovations @ flat[:-1].T / innovations.shape[1] / variance
    past = np.tril(np.ones((n - 1, n - 1), dtype=bool))
    np.testing.assert_allclose(against_past[past], 0, atol=0.06)


def test_far_apart_fields_are_independent_and_as_large_as_any():
    law = Path(epsilon=0.3)
    g = logs(law, 1, 5, start=10**6, shape=(40, 40))[0]
    h = logs(law, 1, 5, start=10**6 + 400, shape=(40, 40))[0]
    expected = np.log(Lognormal().draw((40, 40), 20, seed=6)[0].values).std()
    assert g.std() == pytest.approx(expected, rel=0.35)
    assert abs(np.corrcoef(g.ravel(), h.ravel())[0, 1]) < 0.4


def test_scale_and_spectrum_are_those_of_lognormal():
    one, three = (Path(scale=scale).draw(SHAPE, 1, 8, 5)[0].values for scale in (1.0, 3.0))
    np.testing.assert_allclose(np.log(three), 3 * np.log(one), rtol=1e-12)
    assert fields.build("path") == Path(scale=3.0, epsilon=0.05)


def test_in_sequence_a_sample_costs_about_one_gaussian_field(drawn):
    law = Path()
    law.draw(SHAPE, 1, seed=2)
    drawn.clear()
    for index in range(1, 501):
        law.draw(SHAPE, 1, seed=2, start=index)
    assert 500 <= len(drawn) <= 520


@pytest.mark.parametrize("index", [1, 2, 100, 1023, 1024, 99_999])
def test_from_nothing_a_sample_costs_a_logarithm(drawn, index):
    Path().draw(SHAPE, 1, seed=2, start=index)
    assert len(drawn) <= 2 * np.log2(index) + 2
    assert len(drawn) > 1


def test_contrast_of_the_default_is_high_but_finite():
    for draw in Path().draw((32, 32), 3, seed=9, start=50):
        assert Path().contains(draw.values, draw.parameters)
        assert 5 < draw.values.max() / draw.values.min() < 200


@pytest.mark.parametrize("epsilon", [0.0, 1.0, -0.1])
def test_senseless_steps_are_refused(epsilon):
    with pytest.raises(ConfigError, match="epsilon"):
        Path(epsilon=epsilon)
