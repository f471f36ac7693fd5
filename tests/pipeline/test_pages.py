"""Code on the pages runs as it stands: the README's lines, and the newcomer's PDE."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from commands import ROOT, environment

SMALLER = {
    "cells=64": "cells=16",
    "n=200": "n=40",
    "sl.FNO(modes=12)": "sl.FNO(modes=4), sl.TrainSettings(n_batches=30)",
}


def test_the_seven_lines_run(tmp_path) -> None:
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    assert len([line for line in code.splitlines() if line]) <= 7
    for long, short in SMALLER.items():
        assert long in code
        code = code.replace(long, short)
    code += "assert model.predict(family.space.sample(1, seed=5))['u'].shape == (1, 1, 16, 16)\n"
    done = python(code, tmp_path)
    assert "relative L2 error on 4 test samples" in done.stdout


def test_the_newcomer_s_pde_runs_in_a_campaign(tmp_path) -> None:
    page = (ROOT / "docs" / "problems.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    code = next(block for block in blocks if "@families.register" in block)
    assert len(code.splitlines()) < 80
    code += """
import simlab as sl
store = sl.generate(families.build({"kind": "screened", "cells": 8}), n=10, out="run")
found = {item.sample.parameters["s"]: item.outputs["u"] for item in store.split("train")}
assert len(found) == 8
by_s = [found[s].mean() for s in sorted(found)]
assert by_s == sorted(by_s, reverse=True) and by_s[-1] > 0  # more screening, smaller solution
"""
    python(code, tmp_path)


def python(code: str, directory: Path) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own and expect it to succeed."""
    script = directory / "page.py"
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, script],
        cwd=directory,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done
