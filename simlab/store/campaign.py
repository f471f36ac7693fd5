"""The file ``campaign.json``, and the mesh beside it: what a campaign is, with a checksum."""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

import simlab
from simlab.core.errors import StoreError
from simlab.store import files
from simlab.store.schema import Schema
from simlab.store.shards import READABLE

__all__ = ["identity", "publish_mesh", "read_campaign", "read_mesh", "software", "with_digest"]

_IDENTITY = ("n", "seed", "split", "spec", "mesh", "config", "storage")


def identity(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return what two descriptions must share to be the same campaign.

    Statements about resampling and initial states, which stores made before do not have, do not
    count.
    """
    found = {key: content.get(key) for key in _IDENTITY}
    spec = {key: value for key, value in content["spec"].items() if key != "initial"}
    spec["fields"] = [
        {key: value for key, value in item.items() if key != "resampling"}
        for item in spec["fields"]
    ]
    return found | {"spec": spec}


def with_digest(content: Mapping[str, Any]) -> str:
    """Return the text of ``campaign.json``."""
    text = json.dumps(content, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return json.dumps({**content, "digest": digest}, sort_keys=True, indent=1) + "\n"


def read_campaign(path: Path) -> dict[str, Any]:
    """Return what ``campaign.json`` in a directory says, or raise StoreError."""
    try:
        content: dict[str, Any] = json.loads((path / "campaign.json").read_text(encoding="utf-8"))
        digest = content.pop("digest")
    except FileNotFoundError:
        raise StoreError(f"{path} is not a store: it has no campaign.json") from None
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise StoreError(f"{path}/campaign.json cannot be read: {error}") from None
    if hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest() != digest:
        raise StoreError(f"{path}/campaign.json was changed or damaged; restore it from a copy")
    if content["schema"].split(".")[0] not in READABLE:
        raise StoreError(
            f"{path}: store of format {content['schema']}, this simlab reads "
            f"{' and '.join(READABLE)}: use the simlab that wrote it, or a newer one"
        )
    return content


def publish_mesh(path: Path, schema: Schema) -> dict[str, str]:
    """Write the mesh of a schema, or check the one that is there; return its entry."""
    assert schema.mesh is not None
    buffer = io.BytesIO()
    cells: dict[str, Any] = {
        f"cells_{kind}": np.asarray(c, np.int64) for kind, c in schema.mesh.cells.items()
    }
    np.savez(buffer, points=np.asarray(schema.mesh.points, np.float64), **cells)
    data = buffer.getvalue()
    name = "mesh.npz"
    digest = _mesh_digest(schema.mesh.points, cells)
    if not files.publish(path / name, data, overwrite=False):
        read_mesh(path, {"file": name, "sha256": digest})
    return {"file": name, "sha256": digest}


def read_mesh(path: Path, entry: Mapping[str, str]) -> dict[str, Any]:
    """Return points and cells of the mesh that an entry names."""
    try:
        with np.load(path / entry["file"]) as arrays:
            points = arrays["points"]
            cells = {name: arrays[name] for name in arrays.files if name.startswith("cells_")}
    except (OSError, ValueError, KeyError) as error:
        raise StoreError(f"{path / entry['file']} cannot be read: {error}") from None
    if _mesh_digest(points, cells) != entry["sha256"]:
        raise StoreError(f"{path / entry['file']} is damaged or belongs to another campaign")
    return {"points": points, "cells": {k.removeprefix("cells_"): v for k, v in cells.items()}}


def _mesh_digest(points: np.ndarray, cells: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256(np.ascontiguousarray(points, np.float64).data)
    for name in sorted(cells):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(cells[name], np.int64).data)
    return digest.hexdigest()


def software() -> dict[str, str]:
    """Return the versions a store is made with, and where."""
    return {
        "simlab": simlab.__version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "h5py": h5py.__version__,
        "hdf5": h5py.version.hdf5_version,
        "host": platform.node(),
        "pid": str(os.getpid()),
    }
