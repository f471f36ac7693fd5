"""Campaigns of families that step by themselves: data, ranks, solvers refused, failures kept."""

from __future__ import annotations

import json

import numpy as np
import pytest
from commands import simlab

from simlab.core.errors import ConfigError
from simlab.pipeline.campaign import check_case, generate
from simlab.pipeline.case import Case
from simlab.problems.advection_burgers import AdvectionBurgers
from simlab.problems.burgers import Burgers
from simlab.problems.lorenz import Lorenz
from simlab.store.store import SnapshotStore

CASE = """
[family]
kind = "burgers"
points = 24
n_steps = 3
[campaign]
n = 14
seed = 5501
"""


def solutions(store: SnapshotStore) -> dict[int, np.ndarray]:
    return {
        item.sample.index: np.asarray(item.outputs["u"])
        for name in ("train", "valid", "test")
        for item in store.split(name)
    }


def test_groups_of_two_ranks_store_what_the_family_computes(tmp_path) -> None:
    path, out = tmp_path / "case.toml", tmp_path / "run"
    path.write_text(CASE)
    words = ["--set", "campaign.ranks_per_group=2"]
    done = simlab("generate", path, "--out", out, *words, ranks=2)
    assert done.returncode == 0, done.stderr
    store = SnapshotStore.open(out / "store")
    assert not store.verify(deep=True)
    found = solutions(store)
    family = Burgers(points=24, n_steps=3)
    assert sorted(found) == list(range(14))
    for mu in family.space.sample(14, 5501):
        expected = np.array([fields["u"] for fields in family.solution(mu)])
        np.testing.assert_allclose(found[mu.index], expected, rtol=1e-6, atol=1e-7)
    campaign = json.loads((out / "manifest.json").read_text())["campaign"]
    assert "without linear systems" in campaign["reason"]
    assert "iterations_mean" not in campaign
    assert set(store.solves()["iterations"].tolist()) == {0}
    assert np.isnan(store.solves()["true_relres"]).all()


def test_a_solver_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'lorenz' steps by itself .* leave \[solver\] out"):
        check_case(Case(family=Lorenz(n_steps=2), solver="cg_icc"))


def test_what_blows_up_is_recorded_and_the_rest_goes_on(tmp_path) -> None:
    wild = Lorenz(n_steps=3, dt=10.0, substeps=1)
    store = generate(wild, out=tmp_path / "run", n=5, seed=77)
    failed = store.failed()
    assert sorted(failed) == list(range(5))
    assert all("values beyond float32" in str(reason) for reason in failed.values())
    tame = AdvectionBurgers(points=16, n_steps=2)
    assert len(generate(tame, out=tmp_path / "other", n=5, seed=77).done()) == 5
