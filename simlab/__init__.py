"""simlab: sequences of PDE systems, crash-safe data campaigns, online training of neural operators.

Importing this package loads none of torch, PETSc, MPI or matplotlib; names are found on first use.
"""

__version__ = "0.1.0"
