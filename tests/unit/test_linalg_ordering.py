"""Orders of samples: permutations, short, the same everywhere; keys; cuts."""

import itertools
import resource
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from simlab.bench._skr_ordering import COLUMNS, measured, two_opt
from simlab.core.config import as_table
from simlab.core.errors import ConfigError
from simlab.core.samples import Sample
from simlab.linalg import path_moves
from simlab.linalg.ordering import (
    Greedy,
    Hilbert,
    KeyReduction,
    cut,
    improved,
    orderings,
    path_length,
    sample_keys,
)
from simlab.linalg.paths import hilbert_path, lattice, neighbours
from simlab.problems.fields import FourParameter, Lognormal, TwoPhase
from simlab.problems.spaces import Box, FieldSpace, Product

KINDS = ["sample", "greedy", "hilbert"]
SORTED = [Greedy(), Greedy(improve=False), Greedy(group=37), Hilbert(), Hilbert(dimensions=2)]

some_keys = hnp.arrays(
    np.float64,
    st.tuples(st.integers(0, 40), st.integers(1, 5)),
    elements=st.one_of(
        st.integers(-2, 2).map(float), st.floats(-1e6, 1e6), st.floats(-1e300, 1e300)
    ),
)


def _points(n, d, seed=6151):
    return np.random.default_rng(seed).random((n, d))


def _over_random(keys, path):
    shuffled = np.random.default_rng(733).permutation(len(keys))
    return path_length(keys, path) / path_length(keys, shuffled)


# orders


@pytest.mark.parametrize("kind", KINDS)
@given(keys=some_keys)
@settings(max_examples=60, deadline=None)
def test_order_is_a_permutation(kind, keys):
    order = orderings.build(kind).order(keys)
    assert order.dtype == np.int64
    np.testing.assert_array_equal(np.sort(order), np.arange(len(keys)))


@pytest.mark.parametrize("ordering", SORTED, ids=repr)
@pytest.mark.parametrize(
    "keys",
    [
        np.zeros((0, 3)),
        np.zeros((1, 3)),
        np.array([[1.0], [1.0]]),
        np.full((30, 4), 7.5),
        np.zeros((5, 0)),
        np.repeat([[0.0, 1.0], [2.0, 0.0], [0.0, 1.0]], 20, axis=0),
        np.full((6, 2), 1e308) * np.array([[1], [-1], [1], [0.5], [0], [-1]]),
    ],
    ids=["none", "one", "two equal", "constant", "no columns", "copies", "huge"],
)
def test_degenerate_keys(ordering, keys):
    np.testing.assert_array_equal(np.sort(ordering.order(keys)), np.arange(len(keys)))


@pytest.mark.parametrize("ordering", SORTED, ids=repr)
def test_keys_that_are_not_finite_are_named(ordering):
    keys = _points(9, 2)
    keys[4, 1] = np.nan
    keys[7, 0] = np.inf
    with pytest.raises(ConfigError, match=r"row 4 .*2 such rows"):
        ordering.order(keys)


@pytest.mark.parametrize("ordering", SORTED, ids=repr)
@pytest.mark.parametrize("d", [1, 2, 6])
def test_sorted_is_shorter_than_random(ordering, d):
    keys = _points(300, d)
    bound = {1: 0.2, 2: 0.25, 6: 0.7}[d]
    if ordering == Hilbert(dimensions=2):
        bound = {1: 0.2, 2: 0.25, 6: 0.95}[d]
    assert _over_random(keys, ordering.order(keys)) < bound


@pytest.mark.parametrize("ordering", [Greedy(), Greedy(improve=False), Hilbert()], ids=repr)
def test_points_on_a_line_are_walked_along(ordering):
    values = np.random.default_rng(87).permutation(200).astype(float)
    walked = values[ordering.order(values[:, None])]
    assert np.all(np.diff(walked) == 1) or np.all(np.diff(walked) == -1)


@pytest.mark.parametrize("ordering", SORTED, ids=repr)
def test_equal_keys_stand_together(ordering):
    keys = np.random.default_rng(12).integers(0, 4, (200, 2)).astype(float)
    labels = (keys @ [10, 1])[ordering.order(keys)]
    n_runs = 1 + np.count_nonzero(np.diff(labels))
    assert n_runs == len(np.unique(labels))


def test_copies_do_not_hide_the_other_points():
    """More copies of every point than a list of neighbours is long."""
    keys = _points(60, 2, seed=37)
    copies = np.repeat(keys, 40, axis=0)
    length = path_length(copies, Greedy().order(copies))
    assert length == pytest.approx(path_length(keys, Greedy().order(keys)), rel=1e-12)


def test_greedy_takes_the_nearest_that_is_left():
    keys = _points(150, 3)
    path = Greedy(improve=False).order(keys)
    assert path[0] == np.square(keys - keys.mean(axis=0)).sum(axis=1).argmax()
    for j, place in enumerate(path[:-1]):
        distances = np.linalg.norm(keys[path[j + 1 :]] - keys[place], axis=1)
        assert distances[0] <= distances.min() + 1e-5


def test_ties_go_to_the_lower_index():
    square = np.array([[0.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, 0.0]])
    assert Greedy(improve=False).order(square).tolist() == [0, 1, 2, 3]
    nearest, squares = neighbours(lattice(np.zeros((5, 2))), 2)
    assert nearest.tolist() == [[1, 2], [0, 2], [0, 1], [0, 1], [0, 1]]
    assert not squares.any()


@pytest.mark.parametrize("ordering", SORTED, ids=repr)
def test_order_does_not_depend_on_rounding_of_the_linear_algebra(ordering):
    """Sums in another order (columns permuted and mirrored) give the same path."""
    keys = np.random.default_rng(3).integers(0, 50, (250, 6)) / 64.0
    keys *= [6.0, 5.0, 4.0, 3.0, 2.0, 1.0]
    if isinstance(ordering, Hilbert) or ordering.group < len(keys):
        other = keys.copy(order="F")
    else:
        other = keys[:, [3, 0, 5, 1, 4, 2]] * [1, -1, 1, 1, -1, 1]
    np.testing.assert_array_equal(ordering.order(other), ordering.order(keys))


def test_neighbours_are_exact():
    points = lattice(_points(700, 5))
    nearest, squares = neighbours(points, 6)
    full = np.square(points[:, None] - points).sum(axis=2)
    np.fill_diagonal(full, np.inf)
    np.testing.assert_array_equal(squares, np.sort(full, axis=1)[:, :6])
    np.testing.assert_array_equal(np.take_along_axis(full, nearest, axis=1), squares)


@pytest.mark.parametrize(("dim", "side"), [(1, 16), (2, 16), (3, 8), (4, 4)])
def test_hilbert_curve_steps_to_adjacent_cells(dim, side):
    cells = np.array(list(itertools.product(range(side), repeat=dim)), dtype=float)
    np.random.default_rng(64).shuffle(cells)
    walked = cells[hilbert_path(cells, dim)]
    assert np.all(np.abs(np.diff(walked, axis=0)).sum(axis=1) == 1)


@pytest.mark.parametrize(("d", "bound"), [(2, 1.0), (8, 1.25)])
def test_greedy_is_as_short_as_two_opt(d, bound):
    keys = _points(500, d, seed=29)
    greedy = Greedy(improve=False).order(keys)
    best = path_length(keys, two_opt(keys, greedy))
    assert path_length(keys, greedy) <= 1.25 * best
    assert path_length(keys, Greedy().order(keys)) <= 1.02 * best


def test_settings_are_a_table():
    ordering = orderings.build({"kind": "greedy", "improve": False})
    assert orderings.build(as_table(ordering)) == ordering
    assert set(KINDS) <= set(orderings)
    assert [orderings.build(kind).needs_keys for kind in KINDS] == [False, True, True]
    with pytest.raises(ConfigError, match="improve"):
        orderings.build({"kind": "greedy", "improved": True})


# improvement


@given(keys=some_keys, random=st.randoms(use_true_random=False))
@settings(max_examples=80, deadline=None)
def test_improved_path_visits_the_same_and_is_not_longer(keys, random):
    path = random.sample(range(len(keys)), k=random.randint(0, len(keys)))
    keys = np.clip(keys, -1e150, 1e150)
    found = improved(keys, path)
    assert sorted(found.tolist()) == sorted(path)
    assert path_length(keys, found) <= path_length(keys, path)


def test_improved_finds_the_best_path_of_few_points():
    n_best = 0
    for seed in range(20):
        keys = _points(6, 2, seed=seed + 900)
        best = min(path_length(keys, path) for path in itertools.permutations(range(6)))
        n_best += path_length(keys, improved(keys, range(6))) <= best * (1 + 1e-12)
    assert n_best >= 14


def _one_move_away(path):
    """Yield every path that one reversal or one transfer of up to three points makes."""
    n = len(path)
    for i, j in itertools.combinations(range(n + 1), 2):
        yield path[:i] + path[i:j][::-1] + path[j:]
        if j - i <= 3:
            segment, rest = path[i:j], path[:i] + path[j:]
            for gap in range(len(rest) + 1):
                yield rest[:gap] + segment + rest[gap:]
                yield rest[:gap] + segment[::-1] + rest[gap:]


@pytest.mark.parametrize("seed", range(311, 323))
def test_improved_leaves_nothing_to_single_moves(seed):
    """Of eleven points everybody is a neighbour, so all moves are looked at."""
    keys = _points(11, 2, seed=seed)
    path = improved(keys, range(11)).tolist()
    assert path_length(keys, path) <= min(path_length(keys, p) for p in _one_move_away(path)) + 1e-6


def test_every_move_gains_what_it_promised(monkeypatch):
    """The steps a move joins are shorter than those it breaks by what the path gets shorter."""
    n_made = {"_reverse": 0, "_transfer": 0}

    def watched(name, broken, joined):
        make = getattr(path_moves._Path, name)

        def watch(self, *nodes):
            def length(pairs):
                known = [(nodes[i], nodes[j]) for i, j in pairs]
                return sum(path_length(self._points, p) for p in known if max(p) < self._n)

            before = path_length(self._points, self._path)
            promised = length(broken) - length(joined)
            made = make(self, *nodes)
            if made:
                n_made[name] += 1
                after = path_length(self._points, self._path)
                assert before - after == pytest.approx(promised, rel=1e-6, abs=1e-6 * before)
                assert promised > 0
            return made

        monkeypatch.setattr(path_moves._Path, name, watch)

    watched("_reverse", [(0, 1), (2, 3)], [(0, 2), (1, 3)])
    watched("_transfer", [(2, 0), (1, 3), (4, 5)], [(2, 3), (4, 0), (1, 5)])
    keys = _points(50, 2, seed=515)
    path = improved(keys, np.random.default_rng(4).permutation(50))
    assert min(n_made.values()) >= 5
    assert path_length(keys, two_opt(keys, path)) >= 0.98 * path_length(keys, path)


def test_long_steps_between_clusters_are_mended():
    """No point has a neighbour outside of its cluster."""
    random = np.random.default_rng(41)
    keys = np.repeat(random.random((30, 6)), 25, axis=0) + 1e-3 * random.standard_normal((750, 6))
    path = improved(keys, random.permutation(750))
    assert path_length(keys, path) < 1.1 * path_length(keys, Greedy().order(keys))


@pytest.mark.parametrize("seed", range(5))
def test_path_is_never_longer_by_rounding_to_the_lattice(seed):
    cluster = _points(10, 2, seed=seed + 70)
    path = improved(cluster, range(10))
    keys = np.vstack([cluster * 2.0**-20, [[1.0, 1.0]]])
    path = np.append(path, 10)
    assert path_length(keys, improved(keys, path)) <= path_length(keys, path)


def test_long_paths_are_improved_in_windows(monkeypatch):
    monkeypatch.setattr(path_moves, "_WINDOW", 64)
    keys = _points(300, 2, seed=77)
    hilbert = Hilbert().order(keys)
    path = improved(keys, hilbert)
    assert sorted(path.tolist()) == list(range(300))
    assert (path[0], path[-1]) == (hilbert[0], hilbert[-1])
    assert path_length(keys, path) < 0.92 * path_length(keys, hilbert)


def test_groups_are_walked_one_after_the_other():
    keys = _points(600, 2, seed=41)
    whole = path_length(keys, Greedy(improve=False).order(keys))
    parted = path_length(keys, Greedy(improve=False, group=20).order(keys))
    assert parted < 1.25 * whole


@pytest.mark.parametrize("path", [[0, 1, 1], [0, 5], [-1, 0], [0.0, 1.0], [[0, 1]]])
def test_path_that_is_none(path):
    for use in (path_length, improved, lambda keys, path: cut(keys, path, 2)):
        with pytest.raises(ConfigError, match="path"):
            use(np.zeros((5, 2)), path)


# cuts


@given(
    n=st.integers(0, 60),
    n_chains=st.integers(1, 12),
    slack=st.floats(0, 2),
    data=st.data(),
)
@settings(max_examples=150, deadline=None)
def test_cut_is_a_partition_without_empty_chains(n, n_chains, slack, data):
    cost = data.draw(hnp.arrays(float, n, elements=st.floats(0, 1e6)))
    path = np.random.default_rng(n).permutation(n)
    chains = cut(_points(n, 2), path, n_chains, cost, slack)
    assert len(chains) == n_chains
    np.testing.assert_array_equal(np.concatenate(chains), path)
    assert sum(len(chain) > 0 for chain in chains) == min(n, n_chains)


def test_cuts_balance_cost_within_the_slack():
    random = np.random.default_rng(61)
    keys, cost = random.random((1000, 3)), random.uniform(0.5, 1.5, 1000)
    path = random.permutation(1000)
    for n_chains in (2, 3, 8):
        chains = cut(keys, path, n_chains, cost)
        shares = np.array([cost[chain].sum() for chain in chains]) * n_chains / cost.sum()
        assert np.all(np.abs(shares - 1) <= 0.1)
    dear_end = np.where(path[:, None] == path[-1], 50.0, 1.0).ravel()
    chains = cut(keys, path, 2, dear_end[np.argsort(path)])
    assert len(chains[0]) > len(chains[1])


def test_cuts_fall_on_the_longest_step_nearby():
    keys = np.arange(100.0)[:, None]
    keys[53:] += 20
    keys[90:] += 500  # longer, but far from the middle
    first, second = cut(keys, np.arange(100), 2, slack=0.1)
    assert (len(first), len(second)) == (53, 47)
    first, _ = cut(keys, np.arange(100), 2, slack=0.02)
    assert len(first) == 50


def test_costs_follow_the_rows_not_the_path():
    cost = np.array([9.0, 1.0, 1.0, 1.0, 1.0, 5.0])
    chains = cut(np.zeros((6, 1)), [5, 4, 3, 2, 1, 0], 2, cost, slack=0)
    assert [chain.tolist() for chain in chains] == [[5, 4, 3, 2, 1], [0]]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"n_chains": 0}, "n_chains = 0"),
        ({"n_chains": 2, "cost": [1.0, -1.0, 1.0]}, "negative"),
        ({"n_chains": 2, "cost": [1.0, np.nan, 1.0]}, "not finite"),
        ({"n_chains": 2, "cost": [1.0]}, "shape"),
    ],
)
def test_cut_refuses(words, says):
    with pytest.raises(ConfigError, match=says):
        cut(np.zeros((3, 1)), [0, 1, 2], **words)


# keys


def _field_samples(arrays, parameters=None):
    return [
        Sample(i, 5, {} if parameters is None else parameters[i], {"a": array})
        for i, array in enumerate(arrays)
    ]


def _distances(keys):
    keys = np.asarray(keys, dtype=float)
    return np.linalg.norm(keys[:, None] - keys, axis=2)[np.triu_indices(len(keys), 1)]


@pytest.mark.parametrize(("shape", "kept"), [((30,), 144), ((20, 26), 12), ((9, 10, 11), 5)])
def test_key_distances_are_those_of_the_low_modes(shape, kept):
    """Against a full FFT with the centred block of modes cut out."""
    fields = np.random.default_rng(18).standard_normal((12, *shape))
    spectra = np.fft.fftn(fields, axes=range(1, len(shape) + 1))
    for axis, n in enumerate(shape, 1):
        modes = (np.arange(min(kept, n)) - min(kept, n) // 2) % n
        spectra = np.take(spectra, modes, axis=axis)
    expected = _distances(
        np.concatenate([s.reshape(12, -1).T for s in (spectra.real, spectra.imag)]).T
    )
    found = _distances(sample_keys(_field_samples(fields)))
    np.testing.assert_allclose(found / found[0], expected / expected[0], rtol=2e-5)


def test_small_fields_keep_all_their_distances():
    fields = np.random.default_rng(2).standard_normal((9, 4, 5))
    expected = _distances(fields.reshape(9, -1))
    found = _distances(sample_keys(_field_samples(fields)))
    np.testing.assert_allclose(found / found[0], expected / expected[0], rtol=2e-5)


def test_lognormal_fields_are_compared_by_their_logarithms():
    logs = np.array(
        [x.fields["a"] for x in FieldSpace("a", (16, 16), Lognormal(scale=5)).sample(40, 9)]
    )
    of_logs = sample_keys(_field_samples(np.log(logs)))
    np.testing.assert_allclose(
        _distances(sample_keys(_field_samples(logs))), _distances(of_logs), rtol=1e-4
    )
    normal = 10 + np.log(logs)  # positive, but no log-normal law: taken as it is
    np.testing.assert_allclose(
        _distances(sample_keys(_field_samples(normal))), _distances(of_logs), rtol=1e-4
    )


def test_one_field_with_a_zero_keeps_all_from_the_logarithm():
    fields = np.exp(np.random.default_rng(8).standard_normal((20, 12)))
    fields[13, 5] = 0.0
    expected = _distances(fields)
    found = _distances(sample_keys(_field_samples(fields)))
    np.testing.assert_allclose(found / found[0], expected / expected[0], rtol=2e-5)


def test_keys_do_not_depend_on_units():
    random = np.random.default_rng(71)
    fields = random.standard_normal((30, 8, 8))
    scalars = random.random((30, 2))

    def keys(factor, field_factor):
        named = [{"p": 1e5 + s[0] * factor, "q": s[1] * 1e-9 * factor} for s in scalars]
        return sample_keys(_field_samples(fields * field_factor, named))

    np.testing.assert_allclose(_distances(keys(1.0, 1.0)), _distances(keys(40.0, 1e12)), rtol=1e-4)


def test_neither_part_swamps_the_other():
    random = np.random.default_rng(19)
    fields = random.standard_normal((60, 40, 40))
    scalars = random.random(60)
    samples = _field_samples(fields, [{"k": 1e-3 * s} for s in scalars])
    mixed = _distances(sample_keys(samples, n_columns=400)) ** 2
    of_fields = _distances(sample_keys(_field_samples(fields), n_columns=400)) ** 2
    of_scalars = (
        _distances(sample_keys([Sample(i, 5, {"k": s}) for i, s in enumerate(scalars)])) ** 2
    )
    assert np.median(of_fields) == pytest.approx(1, rel=1e-3)
    assert np.median(of_scalars) == pytest.approx(1, rel=1e-3)
    np.testing.assert_allclose(mixed, of_fields + of_scalars, rtol=1e-4)


def test_constant_parts_have_no_say():
    samples = [
        Sample(i, 5, {"k": float(i), "fixed": 3.7}, {"a": np.full((6, 6), 2.5)}) for i in range(8)
    ]
    alone = [Sample(i, 5, {"k": float(i)}) for i in range(8)]
    np.testing.assert_allclose(_distances(sample_keys(samples)), _distances(sample_keys(alone)))
    nothing = sample_keys([Sample(i, 5) for i in range(4)])
    assert nothing.shape[0] == 4
    assert not nothing.any()
    assert sample_keys([]).shape[0] == 0


def test_rare_flag_still_counts():
    """More than half of all pairs are equal, so the median distance of the flag is 0."""
    flags = [float(i % 10 == 0) for i in range(60)]
    samples = [Sample(i, 5, {"flag": flag, "k": i / 59}) for i, flag in enumerate(flags)]
    squares = _distances(sample_keys(samples)) ** 2
    differs = _distances(np.array(flags)[:, None]) > 0
    assert 1 < squares[differs].mean() / squares[~differs].mean() < 20


def test_columns_are_those_of_largest_spread():
    samples = FieldSpace("a", (24, 24), Lognormal()).sample(50, 313)
    full = sample_keys(samples, n_columns=400)
    keys = sample_keys(samples, n_columns=10)
    assert keys.dtype == np.float32
    assert keys.shape == (50, 10)
    spread = keys.astype(float).var(axis=0)
    assert np.all(np.diff(spread) <= 1e-6)
    values = np.linalg.svd(full - full.mean(axis=0), compute_uv=False)[:10] ** 2 / 50
    np.testing.assert_allclose(spread, values, rtol=1e-4)


def test_rows_may_be_reduced_anywhere():
    """Two ranks that reduce half of the samples each give the keys of one."""
    space = Product((FieldSpace("a", (10, 12), TwoPhase()), Box({"k": (0.0, 3.0)})))
    samples = space.sample(20, 47)
    reduction = KeyReduction.of(samples[7])
    halves = [np.stack([KeyReduction.of(s).reduced(s) for s in samples[r::2]]) for r in (0, 1)]
    rows = np.empty((20, reduction.width))
    rows[0::2], rows[1::2] = halves
    np.testing.assert_array_equal(reduction.keys(rows), sample_keys(iter(samples)))
    with pytest.raises(ConfigError, match="rows of shape"):
        reduction.keys(rows[:, 1:])


@pytest.mark.parametrize(
    ("sample", "says"),
    [
        (Sample(17, 5, {"k": 1.0}, {"a": np.array([1.0, np.nan, np.inf])}), r"17: a has 2 values"),
        (Sample(17, 5, {"k": np.nan}, {"a": np.ones(3)}), r"17: k has 1 value"),
        (Sample(17, 5, {"k": 1.0}, {"a": np.ones(4)}), r"17: .*differ"),
        (Sample(17, 5, {"j": 1.0}, {"a": np.ones(3)}), r"17: .*differ"),
    ],
)
def test_sample_without_a_key_is_named(sample, says):
    good = Sample(3, 5, {"k": 1.0}, {"a": np.ones(3)})
    with pytest.raises(ConfigError, match=says):
        sample_keys([good, sample])


def test_order_of_four_parameter_fields_is_that_of_the_parameters():
    """The key of the fields alone finds the four numbers behind them."""
    samples = FieldSpace("a", (32, 32), FourParameter()).sample(300, 83)
    fields_only = [Sample(s.index, s.seed, {}, s.fields) for s in samples]
    mu = np.array([list(s.parameters.values()) for s in samples])
    assert _over_random(mu, Greedy().order(sample_keys(fields_only))) < 0.45


# size


def test_bench_row():
    row = measured("C1", 60, 16)
    assert tuple(row) == COLUMNS
    assert row["improved_over_two_opt"] < 1.1
    assert row["improved_over_random"] < row["hilbert_over_random"] < 1
    assert row["fields_over_random"] < 0.95


def test_samples_are_let_go_one_by_one():
    space = FieldSpace("a", (64, 64), Lognormal())
    next(iter(space.sample(1, 2)))
    tracemalloc.start()
    keys = sample_keys(space.sample(1, 2, i)[0] for i in range(600))
    Greedy().order(keys)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 600 * 64 * 64 * 8


@pytest.mark.slow
def test_ten_thousand_fields_in_a_minute_and_a_gibibyte():
    start = time.process_time()
    row = measured("C1", 10_000, 128)
    assert row["key_s"] + row["improved_s"] <= 60
    assert row["peak_mib"] <= 1024
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 < 3000
    assert row["improved_over_random"] < 0.55
    print(row, time.process_time() - start)
