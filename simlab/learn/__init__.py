"""Neural operators, buffers and the trainer, on torch; never PETSc, never MPI."""
