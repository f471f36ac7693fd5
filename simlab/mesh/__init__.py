"""Unstructured meshes: read, check, partition, resample."""
