"""Samplers: the same point whatever is drawn around it, and how evenly the points lie."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from scipy.stats import qmc

from simlab.core.errors import ConfigError
from simlab.core.samples import generator
from simlab.pipeline.campaign import check_case
from simlab.pipeline.case import Case
from simlab.problems.convection import ConvectionDiffusion
from simlab.problems.darcy import Darcy
from simlab.problems.fields import FourParameter
from simlab.problems.heat import Heat
from simlab.problems.samplers import LHS, Listed, samplers
from simlab.problems.spaces import Box, FieldSpace, Product, sampled_by

BOUNDS = {"left": (100.0, 500.0), "speed": (-2.0, -1.0), "rate": (0.0, 1e-3)}
TABLES = ["uniform", "sobol", "halton", {"kind": "lhs", "n": 37}]
SEED = 50923


def label(table):
    return table if isinstance(table, str) else table["kind"]


@pytest.fixture(params=TABLES, ids=label)
def sampler(request):
    return samplers.build(request.param)


def unit(points):
    low, high = np.array(list(BOUNDS.values())).T
    return (points - low) / (high - low)


def test_a_point_depends_on_seed_and_index_only(sampler):
    together = sampler.draw(BOUNDS, 600, SEED)
    for start, n in ((0, 1), (30, 20), (250, 13), (599, 1), (255, 300)):
        np.testing.assert_array_equal(
            sampler.draw(BOUNDS, n, SEED, start), together[start : start + n]
        )
    assert not np.isclose(together, sampler.draw(BOUNDS, 600, SEED + 1)).all(axis=1).any()
    assert len(np.unique(together, axis=0)) == 600
    assert unit(together).min() >= 0
    assert unit(together).max() <= 1


def test_another_process_draws_the_same_points(sampler):
    code = (
        "from simlab.problems.samplers import samplers\n"
        f"made = samplers.build({sampler.kind!r} if {sampler.kind!r} != 'lhs' else "
        "{'kind': 'lhs', 'n': 37})\n"
        f"print(made.draw({BOUNDS!r}, 3, {SEED}, 301).tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(sampler.draw(BOUNDS, 3, SEED, 301).tolist())


def test_uniform_points_are_those_of_earlier_versions():
    low, high = np.array(list(BOUNDS.values())).T
    for index, mu in enumerate(Box(BOUNDS).sample(5, SEED, 11), 11):
        expected = generator(SEED, index, "box left speed rate").uniform(low, high)
        assert list(mu.parameters.values()) == expected.tolist()


@pytest.mark.parametrize("n", [64, 256, 512])
def test_even_spreads_have_a_lower_discrepancy(n):
    def discrepancy(table):
        made = samplers.build(table)
        return np.mean([qmc.discrepancy(unit(made.draw(BOUNDS, n, seed))) for seed in range(7, 12)])

    at_random = discrepancy("uniform")
    assert discrepancy("sobol") < 0.15 * at_random
    assert discrepancy("halton") < 0.3 * at_random
    assert discrepancy({"kind": "lhs", "n": n}) < 0.8 * at_random


def test_sequences_of_different_boxes_are_different():
    one, other = {"a": (0.0, 1.0)}, {"b": (0.0, 1.0)}
    for table in TABLES:
        made = samplers.build(table)
        assert not np.array_equal(made.draw(one, 40, SEED), made.draw(other, 40, SEED))


def test_every_hypercube_has_one_point_per_slice():
    points = unit(LHS(n=37).draw(BOUNDS, 3 * 37, SEED))
    for cube in points.reshape(3, 37, 3):
        np.testing.assert_array_equal(
            np.sort(np.floor(cube * 37), axis=0), np.tile(np.arange(37)[:, None], 3)
        )
    assert not np.array_equal(points[:37], points[37:74])
    with pytest.raises(ConfigError, match="n: required"):
        samplers.build("lhs")


def test_a_list_is_read_by_name_row_by_row(tmp_path):
    rng = np.random.default_rng(SEED)
    low, high = np.array(list(BOUNDS.values())).T
    points = rng.uniform(low, high, (9, 3))
    np.save(tmp_path / "points.npy", points)
    table = "rate, more,left,speed\n" + "".join(
        f"{r!r},x,{a!r},{s!r}\n" for a, s, r in points.tolist()
    )
    (tmp_path / "points.csv").write_text(table)
    for name in ("points.npy", "points.csv"):
        made = Listed(file=tmp_path / name, start=2)
        np.testing.assert_array_equal(made.draw(BOUNDS, 4, SEED, 3), points[5:9])
        with pytest.raises(ConfigError, match=r"holds 9 points, .* enough for n = 7"):
            made.draw(BOUNDS, 5, SEED, 3)


def test_a_bad_list_is_named(tmp_path):
    def refused(text, match, name="points.csv"):
        (tmp_path / name).write_text(text)
        with pytest.raises(ConfigError, match=match):
            Listed(file=tmp_path / name).draw({"left": (0.0, 5.0), "speed": (0.0, 1.0)}, 1, SEED)

    refused("left,sped\n1,2\n", "names no speed; did you mean 'sped'")
    refused("left,speed\n1,0.5\n2,1.5\n", r"point 1: speed = 1.5 is not between 0 and 1")
    refused("left,speed\n1,nan\n", "point 0: speed = nan")
    refused("left,speed\n1,fast\n", "point 0: expected numbers")
    refused("left,speed\n1\n", "point 0: expected numbers")
    refused("", "names no left, speed")
    refused("x", "is a .csv or a .npy file", "points.dat")
    refused("x", "cannot be read", "points.npy")
    with pytest.raises(ConfigError, match="cannot read"):
        Listed(file=tmp_path / "absent.csv").draw(BOUNDS, 1, SEED)


def test_fields_keep_their_draws_when_scalars_are_spread_otherwise():
    space = Product((FieldSpace("a", (5, 4), FourParameter()), Box(BOUNDS)))
    spread = sampled_by(space, samplers.build("sobol"))
    assert spread.names == space.names
    for old, new in zip(space.sample(4, SEED), spread.sample(4, SEED), strict=True):
        np.testing.assert_array_equal(old.fields["a"], new.fields["a"])
        assert old.parameters["mu_1"] == new.parameters["mu_1"]
        assert old.parameters["left"] != new.parameters["left"]
        assert spread.contains(new)


def test_a_case_names_its_sampler_and_old_cases_say_nothing(tmp_path):
    plain = Case(family=Heat(cells=4))
    assert plain.space is plain.family.space
    assert "sampler" not in plain.tables()["campaign"]
    case = Case(family=Heat(cells=4), campaign={"n": 10, "sampler": "sobol"})
    assert case.tables()["campaign"]["sampler"] == {"kind": "sobol"}
    assert dict(case.space.sample(1, 3)[0].parameters) != dict(
        plain.space.sample(1, 3)[0].parameters
    )
    check_case(case)
    short = tmp_path / "points.csv"
    short.write_text("mu_1,mu_2,mu_4\n0,0,0\n")
    flow = ConvectionDiffusion(cells=4, dim=2)
    with pytest.raises(ConfigError, match="holds 1 points"):
        check_case(Case(family=flow, campaign={"n": 2, "sampler": Listed(file=short)}))


def test_a_family_without_a_box_refuses_a_sampler():
    case = Case(family=Darcy(cells=4), campaign={"sampler": "sobol"})
    with pytest.raises(ConfigError, match="draws a otherwise"):
        check_case(case)
    with pytest.raises(ConfigError, match="did you mean 'sobol'"):
        Case(family=Heat(cells=4), campaign={"sampler": "sobl"})
