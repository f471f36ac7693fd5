"""Neural operators, buffers and the trainer that follows a store. Imports no PETSc, no MPI."""
