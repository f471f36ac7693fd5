"""Families with one matrix: ``auto`` factors once, says so, and the run keeps the word."""

from __future__ import annotations

import json
import logging

import pytest
from commands import CASES, simlab

from simlab.core.comm import self_comm
from simlab.linalg.advisor import chosen
from simlab.pipeline.case import load_case


@pytest.mark.parametrize("name", ["thermal", "poisson_square"])
def test_auto_factors_once_and_says_so(name, caplog) -> None:
    case = load_case(CASES / f"{name}.toml", ["family.mesh.size=0.06"], smoke=True)
    case.family.validate()
    workspace = case.family.setup(self_comm())
    reports, state = [], None
    with caplog.at_level(logging.INFO, logger="simlab.linalg.advisor"):
        for mu in case.family.space.sample(6, seed=90121):
            system = case.family.assemble(mu, workspace)
            state = case.solver.init(system) if state is None else state
            result, state = case.solver.solve(system, state)
            result.report.check()
            assert system.residual(result.x) <= case.solver.rtol
            reports.append(result.report)
    assert chosen(state).kind == "direct"
    assert "constant matrix: factor once" in state.reason
    assert state.reason in caplog.text
    assert [report.note for report in reports] == ["", *["factor kept"] * 5]
    # a kept factor: triangular solves, and one product to check with
    assert {report.operator_applies for report in reports} == {1}
    state.destroy()
    workspace.destroy()


def test_auto_does_not_say_so_where_the_matrix_varies() -> None:
    case = load_case(CASES / "thermal_block.toml", ["family.mesh.size=0.06"], smoke=True)
    workspace = case.family.setup(self_comm())
    state = None
    for mu in case.family.space.sample(1 + case.solver.pilot, seed=90121):
        system = case.family.assemble(mu, workspace)
        state = case.solver.init(system) if state is None else state
        result, state = case.solver.solve(system, state)
        assert system.residual(result.x) <= case.solver.rtol
    assert chosen(state) is not None
    assert "once" not in state.reason
    state.destroy()
    workspace.destroy()


def test_a_run_records_the_reason(tmp_path) -> None:
    done = simlab("generate", CASES / "thermal.toml", "--smoke", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["state"] == "done"
    assert "constant matrix: factor once" in json.dumps(manifest)
    assert "factor once" in done.stderr + done.stdout
