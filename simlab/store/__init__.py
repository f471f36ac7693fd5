"""Crash-safe campaigns on disk: append-only segments, sealed HDF5 shards, manifest and views. Serial h5py only."""
