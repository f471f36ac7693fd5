"""Checkpoints that are there whole or not at all.

    batch-00000400/state.pt     nested dicts of tensors and plain values
    batch-00000400/COMMIT       written last; a directory without it is ignored and swept

Written to a temporary directory, synced, renamed; the newest two are kept. What an earlier training
left of later batches goes with the first one that is written.
"""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from simlab.core.errors import StoreError

if TYPE_CHECKING:
    from simlab.learn.buffers import Recall
    from simlab.learn.stream import Stream

__all__ = ["newest", "read_tensors", "recall", "write"]

_KEEP = 2
_NEEDED = {"batch", "settings", "schema", "network", "optimizer", "buffer", "feed"}


def write(directory: Path, batch: int, state: dict[str, Any]) -> Path:
    """Write a checkpoint and return its directory; one of the same batch is replaced.

    Raises
    ------
    StoreError
        When there is no room for it, or no right to write; those there are stay.
    """
    final = directory / _name(batch)
    part, replaced = (directory / f".{word}-{os.getpid()}" for word in ("part", "replaced"))
    try:
        directory.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        with (part / "state.pt").open("wb") as file:
            torch.save(_tensors(state), file)
            file.flush()
            os.fsync(file.fileno())
        with (part / "COMMIT").open("w") as file:
            file.write(f"{batch}\n")
            file.flush()
            os.fsync(file.fileno())
        _sync(part)
    except (OSError, RuntimeError) as error:  # torch's writer makes some of its own
        shutil.rmtree(part, ignore_errors=True)
        raise StoreError(f"checkpoint {final} cannot be written ({error})") from error
    if final.exists():
        final.rename(replaced)
    part.rename(final)
    _sync(directory)
    kept = [path for path in _committed(directory) if path.name <= final.name][-_KEEP:]
    for path in directory.iterdir():
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)
    return final


def newest(directory: Path, batch: int | None = None) -> dict[str, Any] | None:
    """Read the newest committed checkpoint, or that of a batch; None when there is none.

    Raises
    ------
    StoreError
        When it cannot be read.
    """
    committed = _committed(directory)
    if batch is not None:
        committed = [path for path in committed if path.name == _name(batch)]
    if not committed:
        return None
    try:
        state: dict[str, Any] = _arrays(read_tensors(committed[-1] / "state.pt"))
        if lacking := _NEEDED - state.keys():
            raise StoreError(f"it lacks {', '.join(sorted(lacking))}")
    except StoreError as error:
        raise StoreError(
            f"checkpoint {committed[-1]} cannot be read ({error}); delete it to go on from the one "
            "before"
        ) from error
    return state


def read_tensors(path: Path) -> dict[str, Any]:
    """Read a dict of tensors and plain values; code that a file may bring is never run.

    Raises
    ------
    StoreError
        When the file holds anything else, or is torn.
    """
    try:
        found = torch.load(path, weights_only=True)
    except pickle.UnpicklingError as error:  # torch's message says how to run what the file brings
        raise StoreError(f"{path} holds more than tensors and plain values") from error
    except Exception as error:  # a torn file makes torch raise almost anything
        said = str(error).partition("\n")[0] or type(error).__name__
        raise StoreError(f"{path}: {said}") from error
    if not isinstance(found, dict):
        raise StoreError(f"{path} holds one {type(found).__name__}, no tensors by name")
    return found


def recall(stream: Stream | None, is_final: bool = False) -> Recall | None:
    """Return how a buffer reads an item once more; None when the stream has no way to.

    With ``is_final`` only what will stay as it is, after a crash of this machine too: steps of a
    trajectory that may still be attempted again are not what ``row`` returns later.
    """
    if stream is None or not stream.sync():
        return None
    finished = set(stream.finished) if is_final else None

    def row(traj: int, step: int) -> np.ndarray | None:
        if finished is not None and traj not in finished:
            return None
        try:
            return stream.row(traj, step)
        except StoreError:
            return None

    return row


def _name(batch: int) -> str:
    return f"batch-{batch:08d}"


def _committed(directory: Path) -> list[Path]:
    return sorted(path.parent for path in directory.glob("batch-*/COMMIT"))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _tensors(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return {"numpy": torch.from_numpy(np.ascontiguousarray(value))}
    if isinstance(value, dict):
        return {key: _tensors(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_tensors(entry) for entry in value]
    return value


def _arrays(value: Any) -> Any:
    if isinstance(value, dict):
        if value.keys() == {"numpy"}:
            return value["numpy"].numpy()
        return {key: _arrays(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_arrays(entry) for entry in value]
    return value
