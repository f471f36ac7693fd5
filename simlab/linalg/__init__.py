"""Linear systems and the solvers that remember between them, on PETSc."""
