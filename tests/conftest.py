"""Settings every test shares: one thread, no window, no web logger."""

from __future__ import annotations

import os
import sys
from pathlib import Path

for name, value in {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "MPLBACKEND": "Agg",
    "WANDB_MODE": "disabled",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
}.items():
    os.environ.setdefault(name, value)

sys.path.insert(0, str(Path(__file__).parent / "pipeline"))
