"""Windows of trajectories out of sealed shards, in an order that is random, fixed and resumable.

A window is what a network learns one step from: the parameters and input fields of a sample, and
``1 + ahead`` successive stored steps of its outputs, ``u_k .. u_{k + ahead}``. Which windows there
are follows from the manifest alone, by prefix sums over the trajectories in the order of their ids;
a shard is opened when the first of its values is asked for. The order of an epoch is a permutation
drawn from (seed, epoch) with a counter-based generator, so a position is two small numbers, and
workers that take every n-th batch agree on it without a word.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from simlab.core.errors import ConfigError, StoreError
from simlab.core.samples import generator
from simlab.store.loader_files import ShardReader
from simlab.store.schema import FieldSpec
from simlab.store.storage import stored_dtype
from simlab.store.store import SnapshotStore

__all__ = ["Cursor", "Loader", "Windows"]


@dataclass(frozen=True)
class Cursor:
    """How far a loader has come; :meth:`to_json` gives plain values for a checkpoint.

    Attributes
    ----------
    key : str
        The windows and their order it belongs to.
    epoch : int
    done : int
        Windows of this epoch that were handed out.
    """

    key: str
    epoch: int = 0
    done: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Cursor:
        """Read :meth:`to_json`'s values."""
        return cls(str(plain["key"]), int(plain["epoch"]), int(plain["done"]))


@dataclass(frozen=True, eq=False)
class Windows:
    """A batch of windows; the arrays are the reader's own, to keep or to change.

    Attributes
    ----------
    ids : ndarray of int64, shape (B,)
        Trajectories.
    steps : ndarray of int64, shape (B,)
        Their steps ``k``.
    times : ndarray of float64, shape (B, 1 + ahead)
    parameters : ndarray of float64, shape (B, P)
        Columns in the order of the schema's parameters.
    inputs : dict of str to ndarray, shape (B, *field)
    outputs : dict of str to ndarray, shape (B, 1 + ahead, *field)
        As stored: float32 on the grid, float64 on the vertices of a mesh.
    cursor : Cursor or None
        The position after this batch.
    """

    ids: np.ndarray
    steps: np.ndarray
    times: np.ndarray
    parameters: np.ndarray
    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]
    cursor: Cursor | None = None

    def __len__(self) -> int:
        return len(self.ids)


class Loader:
    """The windows of one split, as it is when the loader is made; what is sealed later is not in.

    Cheap to make and to pickle: an unpickled one has the very same windows. One thread at a time.

    Parameters
    ----------
    store : SnapshotStore
    split : str
    ahead : int
        Steps after the first one; 1 gives pairs. Trajectories that are too short have no window.
    fields : sequence of str, optional
        Only these inputs and outputs; all of them when None.
    shuffle : bool
        Otherwise by trajectory id and step.
    seed : int
        The order depends on it and on the number of the epoch.
    check : bool
        Hold every step against its checksum when this process reads it for the first time.
    cache_bytes : int
        Keep whole trajectories in memory, the first ones asked for, until they take this much in
        each process. Memory maps are served by the system's cache already, so this is for
        compressed shards and slow file systems.

    Attributes
    ----------
    ids : ndarray of int64, shape (n,)
        The trajectories, sorted.
    key : str
        Equal for loaders with the same windows in the same order.
    """

    def __init__(
        self,
        store: SnapshotStore,
        split: str = "train",
        *,
        ahead: int = 0,
        fields: Sequence[str] | None = None,
        shuffle: bool = True,
        seed: int = 0,
        check: bool = True,
        cache_bytes: int = 0,
    ) -> None:
        if ahead < 0:
            raise ConfigError(f"ahead = {ahead}; a window has at least one step: 0 or more")
        self.schema = store.schema
        self._inputs = _chosen(self.schema.inputs, fields)
        self._outputs = _chosen(self.schema.outputs, fields)
        unknown = set(fields or ()) - {spec.name for spec in self.schema.fields}
        if unknown:
            raise ConfigError(
                f"no field {', '.join(sorted(unknown))}; there are "
                f"{', '.join(spec.name for spec in self.schema.fields)}"
            )
        self.split, self.ahead, self.shuffle, self.seed = split, ahead, shuffle, seed
        self._check, self._cache_bytes = check, cache_bytes
        self._data = store.path / "data"
        self._times = np.asarray(self.schema.times, dtype=np.float64)
        store.catalogue.refresh()
        catalogue = store.catalogue
        ids = store.ids(split)
        shard, row = catalogue.where(ids)
        kept = shard >= 0
        self.ids = ids[kept]
        numbers, place = np.unique(shard[kept], return_inverse=True)
        used = [catalogue.shards[number] for number in numbers.tolist()]
        self._shards = [(item.name, item.n_bytes) for item in used]
        lengths = np.array([item.n_steps for item in used], dtype=np.int64)
        self._shard = place.astype(np.int32)
        self._row = row[kept].astype(np.int32)
        n_windows = np.maximum(lengths[self._shard] - ahead, 0)
        self._ends = np.cumsum(n_windows)
        words = f"{store.uuid} {split} {ahead} {shuffle} {seed}"
        digest = hashlib.blake2b(words.encode(), digest_size=12)
        for values in (self.ids, catalogue.done_attempts[self.ids], n_windows):
            digest.update(np.ascontiguousarray(values, dtype="<i8").data)
        self.key = digest.hexdigest()
        self._forget()

    def _forget(self) -> None:
        """Start without any open shard, cached row or order."""
        self._readers: dict[int, ShardReader] = {}
        self._rows: dict[tuple[int, int], dict[str, np.ndarray]] = {}
        self._cache_left = self._cache_bytes
        self._order: tuple[int, np.ndarray] | None = None

    def __getstate__(self) -> dict[str, Any]:
        own = {"_readers", "_rows", "_cache_left", "_order"}
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __repr__(self) -> str:
        return (
            f"Loader({self.split!r}, {len(self)} windows of {1 + self.ahead} steps from "
            f"{len(self.ids)} trajectories of {self.schema.name})"
        )

    def start(self, epoch: int = 0) -> Cursor:
        """Return the position before the first window of an epoch."""
        return Cursor(self.key, epoch)

    def locate(self, windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return which of ``ids``, and which step, windows begin at; both of shape (B,)."""
        windows = np.asarray(windows, dtype=np.int64)
        if len(windows) and not 0 <= windows.min() <= windows.max() < len(self):
            raise IndexError(f"windows {windows.min()} to {windows.max()} of {len(self)}")
        which = np.searchsorted(self._ends, windows, side="right")
        return which, windows - np.where(which > 0, self._ends[which - 1], 0)

    def order(self, epoch: int) -> np.ndarray:
        """Return the numbers of all windows in the order of an epoch, shape (len,)."""
        if self._order is None or self._order[0] != epoch:
            n = len(self)
            order = np.arange(n, dtype=np.int32 if n < 1 << 31 else np.int64)
            if self.shuffle:
                generator(self.seed, epoch, "loader").shuffle(order)
            self._order = (epoch, order)
        return self._order[1]

    def read(self, windows: Sequence[int] | np.ndarray) -> Windows:
        """Return windows by number, in the order asked for.

        Raises
        ------
        StoreError
            When a shard is gone or damaged.
        """
        which, steps = self.locate(np.asarray(windows))
        n = len(which)
        shards, rows = self._shard[which].tolist(), self._row[which].tolist()
        readers = {shard: self._reader(shard) for shard in set(shards)}
        parameters = np.empty((n, len(self.schema.parameters)))
        for i, (shard, row) in enumerate(zip(shards, rows, strict=True)):
            parameters[i] = readers[shard].parameters[row]
        firsts = steps.tolist()
        inputs = {
            spec.name: self._gather(spec, readers, shards, rows, [0] * n, 1)[:, 0]
            for spec in self._inputs
        }
        outputs = {
            spec.name: self._gather(spec, readers, shards, rows, firsts, 1 + self.ahead)
            for spec in self._outputs
        }
        times = self._times[steps[:, None] + np.arange(1 + self.ahead)]
        return Windows(self.ids[which], steps, times, parameters, inputs, outputs)

    def batches(
        self,
        size: int,
        cursor: Cursor | None = None,
        *,
        epochs: int = 1,
        part: tuple[int, int] = (0, 1),
    ) -> Iterator[Windows]:
        """Yield batches from a position to the end of its epoch; the last one may be smaller.

        Parameters
        ----------
        size : int
        cursor : Cursor, optional
            The ``cursor`` of the last batch that was used; None starts at the first epoch.
        epochs : int
            Go on through this many epochs, the one of the cursor included.
        part : (int, int)
            ``(i, n)``: of n parts that take batches in turn, the i-th.

        Raises
        ------
        StoreError
            When the position belongs to other windows or another order.
        """
        if size < 1:
            raise ConfigError(f"batches of {size} windows; at least one is needed")
        if not 0 <= part[0] < part[1]:
            raise ConfigError(f"part {part[0]} of {part[1]}; it is one of 0 to n - 1")
        cursor = cursor or self.start()
        if cursor.key != self.key:
            raise StoreError(
                f"{self._data.parent}: the position is not one of this loader: more was sealed "
                "since, or split, ahead, shuffle or seed differ; start from None"
            )
        turn = 0
        for epoch in range(cursor.epoch, cursor.epoch + epochs):
            for first in range(cursor.done if epoch == cursor.epoch else 0, len(self), size):
                turn += 1
                if (turn - 1) % part[1] != part[0]:
                    continue
                last = min(first + size, len(self))
                after = Cursor(self.key, epoch, last)
                if last == len(self):
                    after = Cursor(self.key, epoch + 1)
                yield replace(self.read(self.order(epoch)[first:last]), cursor=after)

    def _reader(self, number: int) -> ShardReader:
        reader = self._readers.get(number)
        if reader is None:
            name, n_bytes = self._shards[number]
            reader = ShardReader(self._data / name, self.schema, n_bytes, check=self._check)
            mine = self._shard == number
            if not np.array_equal(reader.traj[self._row[mine]], self.ids[mine]):
                raise StoreError(
                    f"{reader.path}: holds other trajectories than the manifest says; "
                    "run `simlab store verify`"
                )
            self._readers[number] = reader
        return reader

    def _gather(
        self,
        spec: FieldSpec,
        readers: Mapping[int, ShardReader],
        shards: Sequence[int],
        rows: Sequence[int],
        firsts: Sequence[int],
        n_steps: int,
    ) -> np.ndarray:
        """Return one field of many windows, shape (B, n_steps, *field)."""
        shape = (len(rows), n_steps, *self.schema.field_shape(spec))
        values = np.empty(shape, dtype=stored_dtype(spec))
        for i, (shard, row, first) in enumerate(zip(shards, rows, firsts, strict=True)):
            kept = self._kept(readers[shard], shard, row) if self._cache_bytes else None
            if kept is None:
                readers[shard].read(spec.name, row, first, values[i])
            else:
                values[i] = kept[spec.name][first : first + n_steps]
        return values

    def _kept(self, reader: ShardReader, shard: int, row: int) -> dict[str, np.ndarray] | None:
        """Return a trajectory from memory, taking it there while there is room."""
        kept = self._rows.get((shard, row))
        if kept is None and self._cache_left > 0:
            kept = {
                spec.name: np.empty(
                    (reader.n_steps(spec.name), *self.schema.field_shape(spec)),
                    dtype=stored_dtype(spec),
                )
                for spec in (*self._inputs, *self._outputs)
            }
            n_bytes = sum(values.nbytes for values in kept.values())
            if n_bytes > self._cache_left:
                self._cache_left = 0
                return None
            for name, values in kept.items():
                reader.read(name, row, 0, values)
            self._rows[shard, row] = kept
            self._cache_left -= n_bytes
        return kept


def _chosen(specs: Sequence[FieldSpec], names: Sequence[str] | None) -> tuple[FieldSpec, ...]:
    return tuple(spec for spec in specs if names is None or spec.name in names)
