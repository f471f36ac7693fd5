"""Crash-safe campaigns on disk: segments, sealed HDF5 shards, manifest, views. Serial h5py."""
