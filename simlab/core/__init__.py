"""Errors, communicators, configuration, progress, run directories and reports: the bottom layer.

Nothing here imports petsc4py, torch or h5py, and mpi4py is imported only when a communicator is
asked for.
"""
