"""Random fields: law, streams, kinds."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simlab.core.config import as_table
from simlab.core.errors import ConfigError
from simlab.problems.fields import (
    FourParameter,
    Lognormal,
    TwoPhase,
    Wavenumber,
    cell_centres,
    fields,
    gaussian,
)
from simlab.problems.fields_path import Path

SHAPES = [(17,), (12, 9), (6, 5, 4)]
RANDOM_KINDS = [
    Lognormal(),
    Lognormal(spectrum="neumann", alpha=3.0, tau=2.0, sigma=1.5),
    TwoPhase(low=1.0, high=7.5),
    FourParameter(),
    Wavenumber(mean=7.0, contrast=0.2),
    Path(epsilon=0.4, scale=1.5),
]


@pytest.mark.parametrize("spectrum", ["periodic", "neumann"])
@pytest.mark.parametrize("shape", [(64,), (16, 24), (8, 8, 10)])
def test_variance_is_the_sum_over_modes(spectrum, shape):
    alpha, tau, sigma = 2.2, 4.0, 3.0
    if spectrum == "periodic":
        waves = [2 * np.pi * n * np.fft.fftfreq(n) for n in shape]
    else:
        waves = [np.pi * np.arange(n) for n in shape]
    square = sum(w**2 for w in np.meshgrid(*waves, indexing="ij"))
    variance = sigma**2 * (square + tau**2) ** -alpha
    expected = variance.sum() - variance.flat[0]
    random = np.random.default_rng(9127)
    draws = [gaussian(shape, random, spectrum, alpha, tau, sigma) for _ in range(1500)]
    assert np.mean(np.square(draws)) == pytest.approx(expected, rel=0.12)
    assert np.abs(np.mean(draws, axis=tuple(range(1, len(shape) + 1)))).max() < 1e-12


def test_periodic_field_has_the_published_law_of_its_lowest_mode():
    # g = Re ifft(N sqrt(2) sigma L zeta) gives cos(2 pi x) a coefficient of variance 2 (sigma L)^2
    alpha, tau, shape = 2.5, 7.0, (20, 20)
    sigma = tau**1.5
    random = np.random.default_rng(5519)
    x = cell_centres(20)[:, None]
    coefficients = [
        2 * np.mean(gaussian(shape, random, "periodic", alpha, tau) * np.cos(2 * np.pi * x))
        for _ in range(3000)
    ]
    expected = 2 * (sigma * (4 * np.pi**2 + tau**2) ** (-alpha / 2)) ** 2
    assert np.var(coefficients) == pytest.approx(expected, rel=0.12)


@pytest.mark.parametrize("shape", [(9,), (6, 9), (4, 5, 6)])
def test_default_amplitude_is_tau_to_the_alpha_minus_half_the_dimension(shape):
    alpha, tau = 2.5, 7.0
    default, given = (
        gaussian(shape, np.random.default_rng(5), "periodic", alpha, tau, sigma)
        for sigma in (None, tau ** (alpha - len(shape) / 2))
    )
    np.testing.assert_array_equal(default, given)


def test_default_lognormal_has_the_published_spread_and_range():
    draws = np.array([draw.values for draw in Lognormal().draw((100, 100), 30, seed=31)])
    assert 0.16 < np.log(draws).std() < 0.20
    assert 0.35 < draws.min() < 0.7
    assert 1.5 < draws.max() < 2.6


def test_scale_multiplies_the_logarithm():
    (one,) = Lognormal().draw((14, 14), 1, seed=5)
    (five,) = Lognormal(scale=5.0).draw((14, 14), 1, seed=5)
    np.testing.assert_allclose(np.log(five.values), 5 * np.log(one.values), rtol=1e-10, atol=1e-12)


def test_neumann_field_is_not_periodic():
    draws = [d.values for d in Lognormal(spectrum="neumann").draw((40, 40), 40, seed=3)]
    wrap = np.mean([np.abs(a[0] - a[-1]).mean() for a in draws])
    step = np.mean([np.abs(a[0] - a[1]).mean() for a in draws])
    assert wrap > 5 * step
    draws = [d.values for d in Lognormal().draw((40, 40), 40, seed=3)]
    wrap = np.mean([np.abs(a[0] - a[-1]).mean() for a in draws])
    step = np.mean([np.abs(a[0] - a[1]).mean() for a in draws])
    assert wrap < 2 * step


@pytest.mark.parametrize("field", RANDOM_KINDS, ids=repr)
@pytest.mark.parametrize("shape", SHAPES)
def test_draws_depend_on_seed_index_and_name_only(field, shape):
    eight = field.draw(shape, 8, seed=907)
    tail = field.draw(shape, 5, seed=907, start=3)
    for one, other in zip(eight[3:], tail, strict=True):
        np.testing.assert_array_equal(one.values, other.values)
        assert dict(one.parameters) == dict(other.parameters)
    assert eight[0].values.shape == shape
    assert eight[0].values.dtype == np.float64
    for other in (
        eight[1],
        field.draw(shape, 1, seed=908)[0],
        field.draw(shape, 1, 907, name="k")[0],
    ):
        assert not np.array_equal(eight[0].values, other.values)


@pytest.mark.parametrize("field", RANDOM_KINDS, ids=repr)
def test_draws_are_contained_and_spoiled_ones_are_not(field):
    (draw,) = field.draw((11, 13), 1, seed=61)
    assert field.contains(draw.values, draw.parameters)
    assert set(draw.parameters) == set(field.parameters)
    for bad in (-1.0, 0.0, np.nan):
        values = draw.values.copy()
        values[4, 5] = bad
        assert not field.contains(values, draw.parameters)


def test_two_phases_and_their_sign():
    field = TwoPhase(low=2.0, high=9.0)
    (draw,) = field.draw((30, 30), 1, seed=8)
    assert set(np.unique(draw.values)) == {2.0, 9.0}
    (mirrored,) = TwoPhase(low=9.0, high=2.0).draw((30, 30), 1, seed=8)
    np.testing.assert_array_equal(draw.values + mirrored.values, 11.0)
    assert not field.contains(np.full((3, 3), 5.0), {})


def test_four_parameter_formula_and_record():
    (draw,) = FourParameter().draw((10, 20), 1, seed=4407, start=12)
    mu = [draw.parameters[f"mu_{q}"] for q in (1, 2, 3, 4)]
    assert all(abs(value) <= 1 for value in mu)
    x, y = (3 + 0.5) / 10, (15 + 0.5) / 20
    phi = [
        np.sin(np.pi * x) * np.sin(np.pi * y),
        np.cos(np.pi * x),
        np.cos(np.pi * y),
        np.sin(2 * np.pi * x) * np.sin(2 * np.pi * y),
    ]
    assert draw.values[3, 15] == pytest.approx(np.exp(np.dot(mu, phi)), rel=1e-12)
    moved = dict(draw.parameters) | {"mu_2": mu[1] + 1e-3}
    assert not FourParameter().contains(draw.values, moved)


@given(seed=st.integers(0, 2**63), index=st.integers(0, 10**6))
def test_every_seed_and_index_gives_a_positive_field(seed, index):
    (draw,) = Lognormal(scale=5.0).draw((8, 8), 1, seed, index)
    assert np.all(draw.values > 0)
    assert np.all(np.isfinite(draw.values))


@pytest.mark.parametrize("field", RANDOM_KINDS, ids=repr)
def test_tables_round_trip(field):
    assert fields.build(json.loads(json.dumps(as_table(field)))) == field


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"kind": "lognormal", "alpa": 2.0}, "did you mean 'alpha'"),
        ({"kind": "two_phase", "low": -3.0}, "low"),
        ({"kind": "lognormal", "spectrum": "dirichlet"}, "periodic"),
        ({"kind": "lognorml"}, "did you mean 'lognormal'"),
    ],
)
def test_wrong_tables_are_refused(table, message):
    with pytest.raises(ConfigError, match=message):
        fields.build(table)
