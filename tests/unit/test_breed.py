"""Active sampling: the law of the draws, unbiased weights, restarts, and what it is good for."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.interpolate import LinearNDInterpolator, NearestNDInterpolator

from simlab.core.errors import ConfigError
from simlab.problems.breed import Breed, Breeder, Fitness, Generation
from simlab.problems.samplers import Uniform

BOUNDS = {"a": (100.0, 500.0), "b": (-1.0, 3.0)}
SEED = 23053


def scaled(points):
    return (points - [100.0, -1.0]) / [400.0, 4.0]


def started(breed, n, seed=SEED):
    """A breeder that has drawn ``n`` uniform points."""
    breeder = Breeder(breed, BOUNDS, seed)
    breeder.record(dict.fromkeys(range(n), 0))
    return breeder


def bred(share=0.7, sigma=0.15, n=300, **settings):
    """A breeder in its first bred generation, whose parents lie at the corner of the box."""
    breeder = started(Breed(share=(share, share), sigma=sigma, **settings), n)
    corner = np.flatnonzero((scaled(breeder.draw(range(n), 0)) < 0.25).all(axis=1))
    breeder.evolve(corner, 1.0 + np.arange(len(corner)))
    return breeder


def centres(n):
    x = (np.arange(n) + 0.5) / n
    grid = np.stack(np.meshgrid(x, x, indexing="ij"), -1).reshape(-1, 2)
    return [100.0, -1.0] + grid * [400.0, 4.0]


@pytest.mark.parametrize("sigma", [0.05, 0.15, 2.0])
def test_the_density_is_that_of_the_draws(sigma):
    n = 6_000
    breeder = bred(sigma=sigma, tries=3)
    expected = n * breeder.density(centres(200), 1) / 200**2
    expected = expected.reshape(8, 25, 8, 25).sum((1, 3))
    assert expected.sum() == pytest.approx(n, rel=2e-3)
    places = np.floor(scaled(breeder.draw(range(300, 300 + n), 1)) * 8).astype(int)
    found = np.zeros((8, 8))
    np.add.at(found, tuple(places.T), 1)
    chi_square = ((found - expected) ** 2 / expected).sum()
    assert chi_square < 63 + 4 * np.sqrt(2 * 63)


def test_weighted_means_are_those_of_the_uniform_law():
    breeder, n = bred(clip=1e6), 8_000
    breeder.record(dict.fromkeys(range(300, n), 1))
    points = breeder.draw(range(n), breeder.generations_of(range(n)))
    w = breeder.weights(range(n))
    np.testing.assert_array_equal(w[:300], np.ones(300))
    np.testing.assert_allclose(w[300:], 1 / breeder.density(points[300:], 1), rtol=1e-12)
    assert w.mean() == pytest.approx(1.0, abs=4 * w.std() / np.sqrt(n))
    for f in (scaled(points)[:, 0], np.cos(3 * scaled(points)).prod(1)):
        exact = 0.5 if f.min() >= 0 else (np.sin(3) / 3) ** 2
        error = abs((w * f).mean() - exact)
        assert error < 4 * (w * f).std() / np.sqrt(n)
        assert error < 0.2 * abs(f.mean() - exact)


def test_parents_do_not_weigh_less_for_having_children():
    # twenty generations in five dimensions, each bred from the hard corner as it is known by then
    bounds, found = dict.fromkeys("abcde", (0.0, 1.0)), []
    for seed in range(7001, 7007):
        breeder, is_hard = Breeder(Breed(), bounds, seed), np.zeros(0, dtype=bool)
        for start in range(0, 800, 40):
            ids = np.arange(start, start + 40)
            breeder.record(dict.fromkeys(ids.tolist(), breeder.newest))
            points = breeder.draw(ids, breeder.newest)
            is_hard = np.append(is_hard, (points[:, :2] < 0.05**0.5).all(axis=1))
            late = np.arange(len(is_hard))[-200:]
            breeder.evolve(late, np.where(is_hard[late], 1.0, 0.05))
        w = breeder.weights(range(800))
        found.append((is_hard.mean(), w.mean(), (w * is_hard).mean()))
    share, mean, hard = np.array(found).T
    spread = np.std([mean, hard], axis=1, ddof=1) / len(found) ** 0.5
    assert share.mean() > 0.25
    assert mean.mean() == pytest.approx(1.0, abs=3.5 * spread[0])
    assert hard.mean() == pytest.approx(0.05, abs=3.5 * spread[1])
    assert (spread < [0.05, 0.005]).all()


def test_draws_depend_on_seed_id_and_generation_only():
    breeder = bred()
    together = breeder.draw(range(700), 1)
    np.testing.assert_array_equal(breeder.draw(range(250, 263), 1), together[250:263])
    other = Breeder(breeder.breed, BOUNDS, SEED)
    made = breeder.evolve([40, 65], [2.0, 1.0])
    first = json.loads(json.dumps(breeder.generation(1).to_json()))
    for generation in (Generation.from_json(first), made):
        other.add(generation)
    np.testing.assert_array_equal(other.draw(range(700), 1), together)
    mixed = np.arange(90) % 3
    np.testing.assert_array_equal(other.draw(range(90), mixed), breeder.draw(range(90), mixed))
    assert ((scaled(together) >= 0) & (scaled(together) <= 1)).all()


def test_uniform_draws_are_those_of_a_campaign_without_a_sampler():
    breeder = bred(share=0.6)
    uniform = Uniform().draw(BOUNDS, 400, SEED)
    np.testing.assert_array_equal(breeder.draw(range(400), 0), uniform)
    np.testing.assert_array_equal(breeder.breed.draw(BOUNDS, 400, SEED), uniform)
    kept = (breeder.draw(range(400), 1) == uniform).all(axis=1).mean()
    assert kept == pytest.approx(0.4, abs=0.1)


def test_weights_are_clipped():
    breeder = bred(share=0.95)
    breeder.record(dict.fromkeys(range(300, 5000), 1))
    w = breeder.weights(range(5000))
    assert w.max() == 5.0
    assert w.min() < 0.2
    assert breeder.weights([77777]).tolist() == [1.0]  # not on record


def test_too_few_effective_samples_lead_back_to_the_uniform_law():
    late = dict.fromkeys(range(300, 4300), 1)
    breeder = bred(share=0.95, sigma=0.02)
    assert breeder.effective_share() == pytest.approx(1.0)
    breeder.record(late)
    assert breeder.effective_share() < 0.2
    assert breeder.evolve([2000], [1.0]).bred == 0
    points = scaled(breeder.draw(range(4300, 6300), breeder.newest))
    assert np.abs(points.mean(0) - 0.5).max() < 0.03
    tolerant = bred(share=0.95, sigma=0.02, least_ess=0.0)
    tolerant.record(late)
    assert tolerant.evolve([2000], [1.0]).bred == 0.95


def test_the_bred_share_rises_over_generations():
    breeder = started(Breed(), 40)
    shares = [breeder.evolve(np.arange(40), np.ones(40)).bred for _ in range(6)]
    np.testing.assert_allclose(shares, [0, 0.7 / 3, 1.4 / 3, 0.7, 0.7, 0.7])
    assert breeder.evolve([], []).bred == 0  # nobody was hard to learn
    assert breeder.evolve([811], [2.0]).bred == 0  # not on record
    assert breeder.newest == 8


def test_fitness_is_the_excess_over_the_batch():
    fitness = Fitness()
    fitness.add([[4, 0], [4, 1], [8, 0], [15, 0]], np.array([1.0, 1.0, 1.0, 5.0]))
    fitness.add([[8, 0], [16, 3]], np.array([3.0, 1.0]))
    fitness.add([[7, 2]], np.array([9.0]))
    again = Fitness()
    again.restore(json.loads(json.dumps(fitness.state())))
    for each in (fitness, again):
        ids, values = each.candidates(Breed(seen=0.0))
        assert ids.tolist() == [4, 8, 15, 16, 7]
        np.testing.assert_allclose(values, [0.0, 0.5, 3 / np.sqrt(3), 0.0, 0.0])
        # a quarter of eight steps; the same step twice counts once
        assert each.candidates(Breed(), n_steps=8)[0].tolist() == [4]
        # the latest that were met, whatever their ids
        assert each.candidates(Breed(seen=0.0, window=2))[0].tolist() == [16, 7]


def test_wrong_settings_are_refused():
    with pytest.raises(ConfigError, match="share: expected first <= last"):
        Breed(share=(0.5, 0.2))
    with pytest.raises(ConfigError, match="low < high"):
        Breeder(Breed(), {"a": (1.0, 1.0)}, 3)


SIDE = 0.05**0.5  # the hard corner is a twentieth of the box
SQUARE = {"x": (0.0, 1.0), "y": (0.0, 1.0)}


def hard_corner(points):
    x, y = points.T
    window = (np.clip(1 - (points / SIDE) ** 2, 0, None) ** 2).prod(1)
    return np.sin(2 * x + y) + np.cos(30 * x) * np.cos(30 * y) * window


class Interpolant:
    """Piecewise linear between the runs: as good as they are dense. Weights mean nothing to it."""

    def __init__(self, points, weights):
        self._inside = LinearNDInterpolator(points, hard_corner(points))
        self._outside = NearestNDInterpolator(points, hard_corner(points))

    def __call__(self, points):
        values = self._inside(points)
        return np.where(np.isnan(values), self._outside(points), values)


class LeastSquares:
    """196 bells by weighted least squares: too few for the corner, however many runs it has."""

    def __init__(self, points, weights):
        A = self._bells(points)
        gram = A.T @ (weights[:, None] * A) + 1e-6 * len(points) * np.eye(A.shape[1])
        self._c = np.linalg.solve(gram, A.T @ (weights * hard_corner(points)))

    def __call__(self, points):
        return self._bells(points) @ self._c

    @staticmethod
    def _bells(points, n=14):
        centre = (np.arange(n) + 0.5) / n
        along = np.exp(-0.5 * ((points[:, :, None] - centre) * n) ** 2)
        return (along[:, 0, :, None] * along[:, 1, None, :]).reshape(len(points), -1)


CHOSEN_ON = range(6101, 6107)
FRESH = range(90401, 90407)


def learn(learner, breed, reweight, seeds, n=600, period=60):
    """Return mean error and its 99th percentile over the uniform law, means over the seeds."""
    judged = np.random.default_rng(20117).random((6000, 2))
    found = []
    for seed in seeds:
        breeder, fitness, model = Breeder(breed, SQUARE, seed), Fitness(), None
        points = np.zeros((0, 2))
        for start in range(0, n, period):
            ids = np.arange(start, start + period)
            breeder.record(dict.fromkeys(ids.tolist(), breeder.newest))
            new = breeder.draw(ids, breeder.newest)
            points = np.concatenate([points, new])
            if model is not None:
                losses = np.abs(model(new) - hard_corner(new))
                fitness.add(np.stack([ids, np.zeros_like(ids)], axis=1), losses)
            w = breeder.weights(range(len(points))) if reweight else np.ones(len(points))
            model = learner(points, w / w.mean())
            breeder.evolve(*fitness.candidates(breed))
        error = np.abs(model(judged) - hard_corner(judged))
        found.append((error.mean(), np.quantile(error, 0.99)))
    return np.mean(found, axis=0)


UNIFORM = Breed(share=(0.0, 0.0))


SEEDS = pytest.mark.parametrize(
    "seeds",
    [
        pytest.param(CHOSEN_ON, id="chosen on"),
        pytest.param(FRESH, id="fresh", marks=pytest.mark.slow),
    ],
)


@SEEDS
def test_a_learner_short_of_runs_gains_in_the_hard_corner_and_on_average(seeds):
    mean, worst = learn(Interpolant, UNIFORM, False, seeds)
    bred_mean, bred_worst = learn(Interpolant, Breed(), True, seeds)
    assert bred_worst < 0.8 * worst
    assert bred_mean < 1.05 * mean


@SEEDS
def test_weights_give_a_learner_short_of_capacity_most_of_its_average_back(seeds):
    mean, worst = learn(LeastSquares, UNIFORM, False, seeds)
    bare_mean, bare_worst = learn(LeastSquares, Breed(), False, seeds)
    weighted_mean, weighted_worst = learn(LeastSquares, Breed(), True, seeds)
    assert bare_worst < worst
    assert weighted_worst < worst
    assert bare_mean > 1.05 * mean
    assert weighted_mean - mean < 0.5 * (bare_mean - mean)
