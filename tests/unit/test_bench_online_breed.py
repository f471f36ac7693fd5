"""The comparison of active sampling with uniform draws: same runs, one difference."""

from __future__ import annotations

import numpy as np
import pytest

from simlab.bench import _online_breed as bench
from simlab.core.samples import Sample


def test_the_corner_is_a_twentieth_of_the_box_and_nothing_else_changes():
    family = bench.HardHeat(cells=4, n_steps=2)
    samples = family.space.sample(3000, 61657)
    hard = [mu for mu in samples if family.hardened(mu) is not mu]
    assert len(hard) / len(samples) == pytest.approx(0.05, abs=0.015)
    for mu in hard:
        other = family.hardened(mu).parameters
        assert {k: v for k, v in other.items() if k != "right"} == {
            k: v for k, v in mu.parameters.items() if k != "right"
        }
        assert 0 <= other["right"] - mu.parameters["right"] <= family.swing
    edge = Sample(0, 1, dict(mu.parameters) | {"left": 100.0 + 400 * 0.05**0.5 - 1e-9})
    assert family.hardened(edge).parameters["right"] == pytest.approx(mu.parameters["right"])


@pytest.mark.slow
def test_rows_say_what_each_arm_did():
    rows = bench.rows(seeds=(3011,), group="explore", is_small=True)
    assert [row["draws"] for row in rows] == list(bench.ARMS)
    uniform, bred, weighted, oracle = rows
    assert uniform["ess"] == 1.0
    assert bred["ess"] < 1.0
    assert all(np.isfinite(row["p99_K"]) and row["p99_K"] > row["mean_K"] > 0 for row in rows)
    assert bred["mean_K"] != uniform["mean_K"]
    assert weighted["p99_K"] != bred["p99_K"]
    assert oracle["runs_in_corner"] > 0.5 > uniform["runs_in_corner"]
    again = bench.rows(seeds=(3011,), group="explore", is_small=True)
    assert again == rows
    assert bench.ratios(rows)["breed_p99_over_uniform"] == bred["p99_K"] / uniform["p99_K"]
