"""The store's windows as torch data sets, for training loops of one's own.

``window_batches`` is the short way: a ``DataLoader`` of ready batches, with or without worker
processes, which delivers the same batches in the same order for any number of workers. Workers are
spawned, never forked: neither HDF5 nor MPI survives a fork. A script that uses workers guards its
main part with ``if __name__ == "__main__":``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from simlab.store.loader import Cursor, Loader, Windows

__all__ = ["WindowBatches", "WindowDataset", "WindowTensors", "window_batches"]


class WindowTensors(NamedTuple):
    """Windows as tensors; arrays as in :class:`simlab.store.loader.Windows`.

    ``parameters`` and ``times`` are float32; ``cursor`` is the position after the batch.
    """

    ids: torch.Tensor
    steps: torch.Tensor
    times: torch.Tensor
    parameters: torch.Tensor
    inputs: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]
    cursor: Cursor | None


class WindowDataset(Dataset[dict[str, torch.Tensor]]):
    """Window by window, for samplers and collate functions of one's own.

    An item is a dict of all inputs and outputs by name, and ``parameters``, ``times``, ``id`` and
    ``step``; the ``DataLoader`` of torch stacks it as it is.
    """

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def __len__(self) -> int:
        return len(self._loader)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        found = _tensors(self._loader.read([index]))
        item = {name: values[0] for name, values in (found.inputs | found.outputs).items()}
        item |= {"parameters": found.parameters[0], "times": found.times[0]}
        return item | {"id": found.ids[0], "step": found.steps[0]}


class WindowBatches(IterableDataset[WindowTensors]):
    """Whole batches in the loader's order, each with the position after it.

    Parameters
    ----------
    loader : Loader
    batch_size : int
    cursor : Cursor, optional
        Where to go on; ``cursor`` of the last batch that was used.
    epochs : int
        Passes, the one of the cursor included.
    """

    def __init__(
        self, loader: Loader, batch_size: int, cursor: Cursor | None = None, *, epochs: int = 1
    ) -> None:
        self._loader, self._batch_size = loader, batch_size
        self._cursor, self._epochs = cursor, epochs

    def __iter__(self) -> Iterator[WindowTensors]:
        worker = get_worker_info()
        part = (0, 1) if worker is None else (worker.id, worker.num_workers)
        batches = self._loader.batches(
            self._batch_size, self._cursor, epochs=self._epochs, part=part
        )
        return map(_tensors, batches)


def window_batches(
    loader: Loader,
    batch_size: int,
    cursor: Cursor | None = None,
    *,
    epochs: int = 1,
    workers: int = 0,
) -> DataLoader[WindowTensors]:
    """Return torch's loader of :class:`WindowTensors`, in the same order for any ``workers``."""
    return DataLoader(
        WindowBatches(loader, batch_size, cursor, epochs=epochs),
        batch_size=None,
        num_workers=workers,
        multiprocessing_context="spawn" if workers else None,
    )


def _tensors(windows: Windows) -> WindowTensors:
    return WindowTensors(
        torch.from_numpy(windows.ids),
        torch.from_numpy(windows.steps),
        torch.from_numpy(windows.times).float(),
        torch.from_numpy(windows.parameters).float(),
        {name: torch.from_numpy(values) for name, values in windows.inputs.items()},
        {name: torch.from_numpy(values) for name, values in windows.outputs.items()},
        windows.cursor,
    )
