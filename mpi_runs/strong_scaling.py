"""Strong scaling: the same samples on more ranks, one rank per sample.

    .venv/bin/python mpi_runs/strong_scaling.py cases/darcy.toml --ranks 1 2 --samples 400

For several ranks per system add ``--set campaign.ranks_per_group=2 --ranks 2 4``: efficiencies are
relative to the smallest number of ranks.
"""

import sys

from scaling import main

if __name__ == "__main__":
    sys.exit(main("strong_scaling", __doc__ or "", lambda base, ranks: base))
