"""Every shipped case runs its [smoke] size end to end; reading one loads no heavy library."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib

import pytest
from commands import CASES, simlab

from simlab.pipeline.case import load_case
from simlab.store.store import SnapshotStore

ALL = sorted(CASES.glob("*.toml"))


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_a_case_runs_end_to_end(path, tmp_path) -> None:
    out = tmp_path / "run"
    done = simlab("run", path, "--smoke", "--out", out, timeout=240)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["state"] == "done"
    store = SnapshotStore.open(out / "store")
    assert store.is_complete()
    assert len(store.done()) == manifest["case"]["campaign"]["n"]
    assert not store.verify(deep=True)
    page = (out / "report.html").read_text()
    assert manifest["case"]["title"].split(":")[0] in page
    case = load_case(path, smoke=True)
    assert tomllib.loads((out / "case.toml").read_text()) == case.tables()
    if case.train is None:
        return
    evaluation = json.loads((out / "evaluation.json").read_text())
    assert evaluation["n_test"] == len(store.split("test"))
    for entry in evaluation["fields"].values():
        assert {"mean", "median", "p95", "p99", "max"} <= set(entry["rel_l2"])
        assert 0 < entry["rel_l2"]["median"] <= entry["rel_l2"]["max"]
    losses = [
        json.loads(line)["loss"]
        for line in (out / "metrics.jsonl").read_text().splitlines()
        if json.loads(line)["kind"] == "train"
    ]
    assert losses
    assert losses[-1] < losses[0]
    assert list((out / "figures").glob("*.png"))


def test_reading_cases_loads_neither_petsc_nor_mpi_nor_torch() -> None:
    script = (
        "import sys\nfrom simlab.pipeline.case import load_case\n"
        "from simlab.pipeline.campaign import check_case\n"
        f"for path in {[str(path) for path in ALL]!r}:\n    check_case(load_case(path))\n"
        "heavy = {'petsc4py.PETSc', 'mpi4py.MPI', 'torch', 'matplotlib', 'neuralop'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_case_has_a_title_and_a_smoke_table() -> None:
    assert {"darcy", "darcy_online", "darcy_own_fields", "heat_online", "poisson_gmsh"} <= {
        path.stem for path in ALL
    }
    for path in ALL:
        tables = tomllib.loads(path.read_text())
        assert tables.get("title"), path
        assert tables.get("smoke"), path
