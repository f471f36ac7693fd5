"""Wrong input: one clear line, exit code 2 or 1, before any work, and nothing left on the disk."""

from __future__ import annotations

import time

import numpy as np
import pytest
from commands import CASES, simlab
from test_campaign import scripted

DARCY = '[family]\nkind = "darcy"\ncells = 8\n[campaign]\nn = 4\n'
OWN = DARCY.replace("[campaign]", 'fields = {{ file = "{file}", dataset = "a" }}\n[campaign]')


def fields(value: float) -> np.ndarray:
    made = np.ones((4, 8, 8))
    made[2, 3, 4] = value
    return made


@pytest.mark.parametrize(
    ("case", "stored", "words"),
    [
        (DARCY.replace("cells", "cels"), None, ["cels", "unknown key", "cells"]),
        (DARCY.replace("darcy", "darci"), None, ["unknown family kind 'darci'", "'darcy'"]),
        (DARCY.replace("8", "-8"), None, ["family.cells", "-8"]),
        (DARCY + "train = 0.5\n", None, ["campaign", "must add up to 1"]),
        (OWN, None, ["missing.npz"]),
        (OWN, fields(np.nan), ["sample 2", "nan", "finite"]),
        (OWN, fields(-3.0), ["sample 2", "-3", "positive"]),
        (OWN.replace('"a"', '"b"'), fields(1.0), ["'b'", "a"]),
        (OWN.replace("n = 4", "n = 9"), fields(1.0), ["4 fields", "9 are asked", "n = 4"]),
    ],
)
def test_a_wrong_case_is_one_line_and_no_work(tmp_path, case, stored, words) -> None:
    name = "missing.npz" if stored is None else "own.npz"
    if stored is not None:
        np.savez(tmp_path / name, a=stored)
    path = tmp_path / "case.toml"
    path.write_text(case.format(file=name) if "{file}" in case else case)
    done = simlab("generate", path, "--out", tmp_path / "run")
    assert done.returncode in (1, 2), done.stderr
    assert not (tmp_path / "run").exists()
    lines = [line for line in done.stderr.splitlines() if line]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]


def test_a_mesh_without_the_named_group_is_one_line(tmp_path) -> None:
    done = simlab(
        "generate",
        CASES / "poisson_gmsh.toml",
        "--out",
        tmp_path / "run",
        "--set",
        "family.dirichlet={chimney = 1.0}",
    )
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert "chimney" in done.stderr
    assert not (tmp_path / "run").exists()


def test_every_rank_ends_when_the_case_is_wrong(tmp_path) -> None:
    path = tmp_path / "case.toml"
    path.write_text(DARCY.replace("cells", "cels"))
    script = tmp_path / "late.py"  # rank 0 speaks for all, also when it is the last
    late = "import os, time; time.sleep(2 * (os.environ['OMPI_COMM_WORLD_RANK'] == '0'))"
    script.write_text(f"{late}\nfrom simlab.cli import main\nmain()\n")
    begun = time.monotonic()
    done = scripted(script, path, tmp_path / "run", ranks=2)
    assert done.returncode == 2
    assert time.monotonic() - begun < 30
    assert done.stderr.count("error: ") == 1
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_there_is_not_overwritten(tmp_path) -> None:
    path = tmp_path / "case.toml"
    path.write_text(DARCY)
    out = tmp_path / "run"
    assert simlab("generate", path, "--out", out).returncode == 0
    before = sorted(p.stat().st_mtime_ns for p in (out / "store").rglob("*.h5"))
    again = simlab("generate", path, "--out", out)
    assert again.returncode == 2
    assert "--resume" in again.stderr
    changed = simlab("generate", path, "--out", out, "--resume", "--set", "family.cells=9")
    assert changed.returncode == 2
    assert "family.cells: 8 -> 9" in changed.stderr
    assert sorted(p.stat().st_mtime_ns for p in (out / "store").rglob("*.h5")) == before


def test_dry_run_touches_nothing(tmp_path) -> None:
    path = tmp_path / "case.toml"
    path.write_text(DARCY)
    done = simlab("generate", path, "--out", tmp_path / "run", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "8 x 8" in done.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["case.toml"]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["generate"], "Missing argument"),
        (["generate", "no-such-file.toml"], "no case file"),
        (["generat", "x"], "No such command"),
        (["generate", str(CASES / "darcy.toml"), "--shard", "3/3"], "--shard 3/3"),
        (["evaluate", "no-such-run"], "not a run directory"),
        (["cases", "no-such-directory"], "no case files"),
    ],
)
def test_wrong_usage_says_so(words, text) -> None:
    done = simlab(*words)
    assert done.returncode in (1, 2)
    assert text in done.stderr
    assert "Traceback" not in done.stderr
