"""Reading sealed shards: splits as sequences of trajectories, file handles kept open in turn."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, SupportsIndex, overload

import h5py
import numpy as np

from simlab.core.errors import StoreError
from simlab.core.samples import Sample, Trajectory
from simlab.store.schema import Schema
from simlab.store.shards import exact_path, field_path

__all__ = ["ShardFiles", "Split"]

_MAX_HANDLES = 64


def _unreadable(path: Path, error: Exception) -> StoreError:
    return StoreError(f"{path}: cannot be read ({error}); run `simlab store verify`")


class _OpenShard:
    """An open shard, with the small columns read once."""

    def __init__(self, path: Path) -> None:
        try:
            self.file = h5py.File(path, "r")
            log = self.file["simlab"]
            self.traj = log["traj_id"][:].astype(np.int64)
            self.attempt = log["attempt"][:].astype(np.int64)
            self.seed = log["seed"][:]
            self.parameters = log["parameters"][:]
            self.n_steps = len(self.file["dimensions/time"])
            self._datasets: dict[str, h5py.Dataset] = {}
        except (OSError, KeyError) as error:
            raise _unreadable(path, error) from error

    @cached_property
    def solvers(self) -> list[str] | None:
        """The words of the solvers; None for a shard of format 1, which does not name them.

        Nobody else's reading looks at them: in shards of earlier versions they are text of variable
        length, for which HDF5 has no checksum, and it may search a damaged one for ever.
        """
        try:
            if "solve" not in self.file:
                return None
            words = self.file["solve"].attrs["solver"].tolist()
        except (OSError, KeyError) as error:
            raise _unreadable(Path(self.file.filename), error) from error
        return [word.decode() if isinstance(word, bytes) else word for word in words]

    def dataset(self, name: str) -> h5py.Dataset:
        """Return a dataset; looking it up costs as much as reading a small row, so it is kept."""
        found = self._datasets.get(name)
        if found is None:
            found = self._datasets[name] = self.file[name]
        return found


class ShardFiles:
    """The most recently used shards of one store, opened lazily in each process."""

    def __init__(self, data: Path, schema: Schema) -> None:
        self._data = data
        self._schema = schema
        self._open: OrderedDict[str, _OpenShard] = OrderedDict()
        self._pid = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {"_data": self._data, "_schema": self._schema}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**{key.lstrip("_"): value for key, value in state.items()})  # type: ignore[misc]

    def get(self, name: str) -> _OpenShard:
        """Return an open shard by its name below ``data/``."""
        if self._pid != os.getpid():  # HDF5 handles do not cross a fork
            self._open, self._pid = OrderedDict(), os.getpid()
        shard = self._open.get(name)
        if shard is None:
            shard = self._open[name] = _OpenShard(self._data / name)
            if len(self._open) > _MAX_HANDLES:
                self._open.popitem(last=False)[1].file.close()
        self._open.move_to_end(name)
        return shard

    def values(self, name: str, dataset: str, key: Any) -> np.ndarray:
        """Read part of one dataset."""
        try:
            values: np.ndarray = self.get(name).dataset(dataset)[key]
        except (OSError, KeyError) as error:
            raise StoreError(
                f"{self._data / name}: {dataset} cannot be read ({error}); "
                "run `simlab store verify --deep`"
            ) from error
        return values

    def sample(self, name: str, row: int) -> Sample:
        """Return the sample of one row; its fields are the stored values as float64."""
        shard = self.get(name)
        return Sample(
            index=int(shard.traj[row]),
            seed=int(shard.seed[row]),
            parameters=dict(
                zip(self._schema.parameters, shard.parameters[row].tolist(), strict=True)
            ),
            fields={
                spec.name: self.values(name, field_path(spec), row).astype(np.float64)
                for spec in self._schema.inputs
            },
        )

    def trajectory(self, name: str, row: int) -> Trajectory:
        """Return one whole row."""
        n_steps = self.get(name).n_steps
        return Trajectory(
            sample=self.sample(name, row),
            times=np.asarray(self._schema.times[:n_steps]),
            outputs={
                spec.name: self.values(name, field_path(spec), row) for spec in self._schema.outputs
            },
        )


class Split(Sequence[Trajectory]):
    """The sealed, finished trajectories of one split, in the order of their ids.

    Made by :meth:`simlab.store.store.SnapshotStore.split`; what is sealed later is not in it.
    Values come as stored: float32 on the grid, float64 on the vertices of a mesh.

    Attributes
    ----------
    name : str
    schema : Schema
    ids : ndarray of int64, shape (len,)
    """

    def __init__(
        self,
        name: str,
        schema: Schema,
        ids: np.ndarray,
        shards: Sequence[str],
        rows: np.ndarray,
        shard_files: ShardFiles,
    ) -> None:
        self.name = name
        self.schema = schema
        self.ids = ids
        self._shards = list(shards)
        self._rows = rows
        self._files = shard_files

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, index: SupportsIndex) -> Trajectory: ...

    @overload
    def __getitem__(self, index: slice) -> Split: ...

    def __getitem__(self, index: SupportsIndex | slice) -> Trajectory | Split:
        if isinstance(index, slice):
            return Split(
                self.name,
                self.schema,
                self.ids[index],
                self._shards[index],
                self._rows[index],
                self._files,
            )
        where = range(len(self))[index]
        return self._files.trajectory(self._shards[where], int(self._rows[where]))

    def __iter__(self) -> Iterator[Trajectory]:
        return (self[i] for i in range(len(self)))

    def places(self) -> list[tuple[str, int]]:
        """Return for each trajectory the shard, by its name below ``data/``, and the row in it."""
        return list(zip(self._shards, self._rows.tolist(), strict=True))

    def arrays(self, exact: bool = False) -> dict[str, np.ndarray]:
        """Return everything stacked: parameters (B,), inputs (B, *grid), outputs (B, T, *grid).

        Each shard is read once, in one piece per field.

        Parameters
        ----------
        exact : bool
            Grid fields in double precision, of a store that keeps them (``Storage.float64``).
        """
        path = exact_path if exact else field_path
        schema = self.schema
        n = len(self)
        found: dict[str, np.ndarray] = {name: np.empty(n) for name in schema.parameters}
        by_shard: dict[str, list[int]] = {}
        for position, shard in enumerate(self._shards):
            by_shard.setdefault(shard, []).append(position)
        for spec in schema.fields:
            time = (len(schema.times),) if spec.role == "output" else ()
            dtype = np.float64 if exact or spec.location == "vertex" else np.float32
            found[spec.name] = np.empty((n, *time, *schema.field_shape(spec)), dtype=dtype)
        for shard, positions in by_shard.items():
            rows = self._rows[positions]
            parameters = self._files.get(shard).parameters[rows]
            for column, name in enumerate(schema.parameters):
                found[name][positions] = parameters[:, column]
            for spec in schema.fields:
                low, high = int(rows.min()), int(rows.max()) + 1
                values = self._files.values(shard, path(spec), slice(low, high))
                found[spec.name][positions] = values[rows - low]
        return found

    def __repr__(self) -> str:
        return f"Split({self.name!r}, {len(self)} trajectories of {self.schema.name})"
