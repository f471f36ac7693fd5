"""The README's lines of Python run as they stand, at a smaller size."""

from __future__ import annotations

import re
import subprocess
import sys

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
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "relative L2 error on 4 test samples" in done.stdout
