"""The benches: one format, fair turns, every solver in the table, losing ones too."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from simlab.bench import darcy, runner
from simlab.core.errors import ConfigError


def test_the_darcy_table_has_every_solver_and_the_agreed_keys(tmp_path, capsys):
    result = darcy.run(sizes=[(22, 2), (8, 3)], n_samples=5, ranks=False)
    runner.save(result, tmp_path / "darcy.json")
    saved = json.loads((tmp_path / "darcy.json").read_text())
    assert saved["name"] == "darcy"
    assert saved["machine"]["cores"] >= 1
    cases = {(row["family"], row["n"]) for row in saved["rows"]}
    assert cases == {("C1", 484), ("C1", 512), ("two_phase", 484), ("two_phase", 512)}
    assert len(saved["rows"]) == len(darcy.SOLVERS) * len(cases)
    for row in saved["rows"]:
        keys = {"family", "n", "solver", "iterations", "cpu_ms", "assembly_ms", "true_relres"}
        assert keys <= set(row)
        assert 0 < row["true_relres"] <= darcy.RTOL
        assert row["cpu_ms"] > 0
        assert row["assembly_ms"] > 0
    assert {"auto_over_best", "amg_over_fast_400", "amg_over_fast_421"} <= set(saved["ratios"])
    assert saved["ratios"]["auto_over_best"] > 0
    assert saved["ratios"]["amg_over_fast_400"] is None  # that size was not asked for
    assert "CG+BoomerAMG" in capsys.readouterr().out


def test_turns_alternate_and_slow_ones_stop():
    log = []
    contest = runner.Contest(
        {"a": lambda item: log.append(("a", item)), "b": lambda item: log.append(("b", item))}
    )
    contest.run([1, 2, 3])
    assert log == [("a", 1), ("b", 1), ("b", 2), ("a", 2), ("a", 3), ("b", 3)]
    assert [len(turns) for turns in contest.seconds.values()] == [3, 3]
    once = runner.Contest({"slow": lambda item: item}, too_slow=-1.0)
    once.run([1, 2, 3])
    assert once.answers["slow"] == [1]


def test_medians_skip_the_first_turn():
    contest = runner.Contest({"a": lambda item: item})
    contest.seconds["a"] = [9.0, 0.001, 0.003, 0.002]
    assert contest.milliseconds("a") == pytest.approx(2.0)
    contest.seconds["a"] = [9.0]
    assert contest.milliseconds("a") == pytest.approx(9000.0)


def test_an_unknown_bench_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match="darcy"):
        runner.bench_module("darci")


def test_the_command_lists_the_benches():
    done = subprocess.run(
        [sys.executable, "-m", "simlab", "bench"], capture_output=True, text=True, check=True
    )
    assert "darcy" in done.stdout
