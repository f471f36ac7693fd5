"""Weak scaling: as many samples per rank on more ranks, one rank per sample.

.venv/bin/python mpi_runs/weak_scaling.py cases/darcy.toml --ranks 1 2 --samples 200
"""

import sys

from scaling import main

if __name__ == "__main__":
    sys.exit(main("weak_scaling", __doc__ or "", lambda base, ranks: base * ranks))
