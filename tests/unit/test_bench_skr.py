"""The recycling bench: the same systems for all, losing rows and absent ones named."""

from __future__ import annotations

import csv
import time
from dataclasses import replace

import numpy as np
import pytest

from simlab.bench import _skr_figures, _skr_goals, _skr_scaling, _skr_studies, skr
from simlab.bench._skr_families import FAMILIES, Study
from simlab.bench._skr_solvers import SOLVERS, TABLE, preconditioner
from simlab.bench._skr_table import RTOL, measured, ratios
from simlab.cli.bench import bench
from simlab.core.errors import ConfigError

HEAD = {"family", "n", "pc", "solver", "iterations", "operator_applies", "pc_applies"}
COSTS = {"cpu_ms", "wall_ms", "true_relres", "n_systems"}


@pytest.fixture(scope="module")
def lognormal():
    return measured("C1", 400, "ilu", n_samples=8)


def test_every_solver_is_in_the_table_of_a_family_that_all_can_take(lognormal):
    assert [row["solver"] for row in lognormal.rows] == [name for name in TABLE if name != "lu"]
    assert lognormal.left_out == {}
    for row in lognormal.rows:
        assert set(row) >= HEAD | COSTS
        assert (row["family"], row["n"], row["pc"]) == ("C1", 400, "ilu")
        assert 0 < row["true_relres"] <= RTOL
        assert row["failed"] == 0
        assert row["cpu_ms"] > 0


def test_all_solvers_meet_the_same_systems(lognormal):
    for name, turns in lognormal.turns.items():
        assert sorted(turn.index for turn in turns) == list(range(8)), name
    unsorted = [turn.index for turn in lognormal.turns["carried_unsorted"]]
    assert unsorted == list(range(8))
    assert [turn.index for turn in lognormal.turns["carried_greedy"]] != unsorted


def test_rows_count_what_recycling_costs(lognormal):
    row = {row["solver"]: row for row in lognormal.rows}
    for name in ("notcarried", "carried_greedy", "static", "static_carried"):
        assert row[name]["pc_applies"] == row[name]["iterations"]  # no hidden ones
    assert row["static"]["operator_applies"] == row["static"]["iterations"] + 21
    assert row["carried_paper"]["pc_applies"] == row["carried_paper"]["iterations"] + 20
    assert row["static"]["seed_ms"] > 0
    assert row["notcarried"]["seed_ms"] is None
    assert row["auto"]["pilot_ms"] > row["auto"]["cpu_ms"]


def test_ratios_are_those_of_the_rows(lognormal):
    row = {row["solver"]: row for row in lognormal.rows}
    found = ratios(lognormal)
    carried = row["carried_greedy"]["iterations"] / row["notcarried"]["iterations"]
    assert found["carried_over_notcarried"] == pytest.approx(carried)
    assert found["carried_over_notcarried"] < 1
    assert found["k0_difference"] <= 1
    rivals = [r["cpu_ms"] for r in lognormal.rows if r["solver"] != "auto"]
    assert found["auto_over_best"] == pytest.approx(row["auto"]["cpu_ms"] / min(rivals))
    per_iteration = row["static"]["cpu_ms"] / row["static"]["iterations"]
    plain = row["gmres40"]["cpu_ms"] / row["gmres40"]["iterations"]
    assert found["overhead_static"] == pytest.approx(per_iteration / plain)
    failed = replace(lognormal, rows=[r | {"failed": 1} for r in lognormal.rows])
    assert ratios(failed)["auto_over_best"] is None


def test_a_solver_that_cannot_take_a_family_is_named(capsys):
    result = skr.run(quick=True, family="C5", n=343, samples=3)
    said = capsys.readouterr().out
    present = {row["solver"] for row in result["rows"]}
    assert {"gmres40", "carried_greedy", "static", "lu", "auto"} <= present
    for name in ("deflated_cg", "cg_icc", "cholesky", "fast"):
        assert name not in present
        assert f"left out: {name}" in said


def test_a_preconditioner_of_blocks_and_one_without_entries():
    asm = measured("C1", 400, "asm8", n_samples=3, names=("gmres40", "notcarried"))
    assert {row["method"] for row in asm.rows} == {"gmres+asm", "gcrodr(40,0+20)+asm"}
    free = measured("C9", 400, "ilu", n_samples=3, names=("gmres40", "fast"))
    assert [row["solver"] for row in free.rows] == ["fast"]
    assert "entries" in free.left_out["gmres40"]
    with pytest.raises(ConfigError, match="asm64"):
        preconditioner("amg")


def test_the_budget_ends_turns_and_the_row_says_how_many_count():
    short = measured("C1", 400, "none", n_samples=6, names=("gmres40",), budget=0.0)
    assert short.rows[0]["n_systems"] == 1
    assert len(short.turns["gmres40"]) == 1


def test_one_matrix_is_factored_once():
    found, shares = _skr_studies.constant("thermal", 700, 4)
    cpu = {row["solver"]: row["cpu_ms"] for row in found.rows}
    assert "cholesky" not in cpu
    assert shares["carried_unsorted_over_factor_once"] > 3
    assert shares["auto_over_factor_once"] < 3


def test_the_ablation_says_what_each_ingredient_brings():
    found, shares = _skr_studies.ablation("F0", 400, 5)
    its = {row["solver"]: row["iterations"] for row in found.rows}
    assert set(its) == {"gmres40", "gmres200", "notcarried", "carried_unsorted", "carried_greedy"}
    assert shares["gmres40_over_notcarried"] > 2  # restarting alone, without any sequence
    assert shares["carried_over_notcarried"] == its["carried_greedy"] / its["notcarried"]


def test_the_gate_row_says_when_and_why():
    row = _skr_studies.gate("C5", 512, 33)
    assert 4 < row["carrying_ended_after"] <= 33  # carrying cannot pay on so small a problem
    assert "carrying ends" in row["why"]


def test_goals_hold_for_their_table_only(capsys):
    head = {"family": "C1", "n": 10_000, "pc": "ilu"}
    rows = _skr_goals.with_goals([head | {"solver": "static", "iterations": 47.0}])
    assert rows[0]["goal"] == "<= 46"
    assert _skr_goals.with_goals([head | {"solver": "static", "n": 400}])[0]["goal"] is None
    missed = _skr_goals.named({"auto_over_best": 1.16}, head)
    assert missed[0].has_goal
    assert missed[0].key == "auto_over_best_C1_10000_ilu"
    _skr_goals.print_goals("ratios", missed)
    assert "missed" in capsys.readouterr().out
    assert not _skr_goals.named({"auto_over_best": 1.16}, head | {"family": "mine"})[0].has_goal


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_family_has_about_the_size_asked_for(name):
    study = Study(name, 500, 3)
    assert 0.6 * 500 < study.n < 1.6 * 500
    walks = [(s["sample"].index, s["greedy"].index) for s in study.systems()]
    assert sorted(i for i, _ in walks) == sorted(j for _, j in walks) == [0, 1, 2]
    study.destroy()


def test_the_family_of_a_case_file(tmp_path, capsys):
    case = tmp_path / "mine.toml"
    case.write_text('title = "mine"\n[family]\nkind = "darcy"\ncells = 12\n[campaign]\nn = 4\n')
    result = skr.run(family=str(case), samples=3)
    assert {(row["family"], row["n"]) for row in result["rows"]} == {("mine", 144)}
    assert "auto_over_best_mine_144_ilu" in result["ratios"]
    with pytest.raises(ConfigError, match="known: C1"):
        skr.run(family="C11")


def test_figures_come_with_their_numbers(tmp_path):
    pictures = _skr_figures.draw(tmp_path, 400, 4)
    assert [path.name for path in pictures] == [
        "skr_convergence.png",
        "skr_chain.png",
        "skr_spectra.png",
    ]
    assert all(path.stat().st_size > 10_000 for path in pictures)
    with (tmp_path / "skr_convergence.csv").open(encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    for name in ("C1_gmres40", "C1_static", "C2_deflated_cg"):
        history = [float(row[name]) for row in table if row[name]]
        assert history[-1] <= RTOL < history[-2]
    with (tmp_path / "skr_spectra.csv").open(encoding="utf-8") as file:
        spectra = [float(row["eigenvalues of one system"]) for row in csv.DictReader(file)]
    assert np.all(np.diff(spectra) >= 0)
    assert spectra[0] > 0


def test_several_ranks_solve_the_same_systems():
    try:
        rows = _skr_scaling.together(256, 2, (1, 2))
    except _skr_scaling.NotMeasured as why:
        pytest.skip(str(why))
    assert [row["ranks"] for row in rows] == [1, 2]
    assert rows[1]["iterations_off"] <= 0.02
    assert rows[1]["solution_off"] <= 10 * RTOL


def test_without_a_launcher_nothing_is_made_up(monkeypatch):
    monkeypatch.setenv("SIMLAB_MPIRUN", "no-such-launcher")
    with pytest.raises(_skr_scaling.NotMeasured, match="no-such-launcher"):
        _skr_scaling.together(256, 2)


def test_options_are_refused_by_benches_that_have_none():
    with pytest.raises(ConfigError, match="darcy has no option --family"):
        bench("darcy", family="C1")


def test_all_names_build():
    for name, table in SOLVERS.items():
        assert table("ilu")["kind"], name


@pytest.mark.slow
def test_the_quick_table_takes_less_than_a_minute_of_cpu():
    start = time.process_time()
    result = skr.run(quick=True)
    assert time.process_time() - start < 60
    tables = {row["table"] for row in result["rows"]}
    assert {"main", "ablation", "constant", "goal", "ordering", "auto"} <= tables
    assert {row["family"] for row in result["rows"] if row["table"] == "main"} >= {
        f"C{i}" for i in range(1, 10)
    }
