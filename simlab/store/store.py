"""The store of one campaign: what may be written, read, followed, sealed and checked, in one place.

Layout of a campaign directory::

    campaign.json              what the campaign is; never changes
    mesh.npz                   its mesh, if it has one
    data/<split>/*.h5          sealed shards: train, valid, test, failed
    inflight/                  segments being written, drafts of shards, the sealing lock
    manifest/*.jsonl           which shards count
    stats.yaml                 The Well's normalisation constants (derived)
    views/                     PDEBench and ParaView views (derived)
    quarantine/                damaged files, each beside its reason
"""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from simlab.core.config import differences
from simlab.core.errors import ConfigError
from simlab.store import files
from simlab.store.campaign import (
    identity,
    publish_mesh,
    read_campaign,
    read_mesh,
    software,
    with_digest,
)
from simlab.store.follow import Event, Position, follow
from simlab.store.inflight import Inflight
from simlab.store.manifest import Catalogue, ManifestWriter
from simlab.store.reader import ShardFiles, Split
from simlab.store.records import step_bytes
from simlab.store.schema import Schema
from simlab.store.seal import SHARD_BYTES, RecoverReport, recover, seal
from simlab.store.segments import SEGMENT_BYTES, Writer
from simlab.store.shards import SCHEMA
from simlab.store.solves import read_solves
from simlab.store.splits import SPLITS, assign, check_fractions
from simlab.store.stats import constants, merged, to_yaml
from simlab.store.storage import Storage
from simlab.store.verify import verify

__all__ = ["DEFAULT_SPLIT", "SnapshotStore", "SplitStatus", "Status"]

DEFAULT_SPLIT = {"train": 0.8, "valid": 0.1, "test": 0.1}
_MISSING, _IN_FLIGHT, _FAILED, _DONE = range(4)


@dataclass(frozen=True)
class SplitStatus:
    """How many trajectories of a split are in which state."""

    done: int
    failed: int
    in_flight: int
    missing: int


@dataclass(frozen=True)
class Status:
    """What a store holds.

    Attributes
    ----------
    splits : dict of str to SplitStatus
    n_bytes : int
        Sealed shards and segments.
    n_shards, n_segments : int
    n_unsealed : int
        Finished trajectories that are in segments only.
    n_superseded : int
        Sealed rows that a higher attempt has replaced.
    """

    splits: dict[str, SplitStatus]
    n_bytes: int
    n_shards: int
    n_segments: int
    n_unsealed: int
    n_superseded: int

    def __str__(self) -> str:
        lines = [f"{'split':8s} {'done':>8s} {'failed':>8s} {'in flight':>9s} {'missing':>8s}"]
        lines += [
            f"{name:8s} {s.done:8d} {s.failed:8d} {s.in_flight:9d} {s.missing:8d}"
            for name, s in self.splits.items()
        ]
        lines.append(
            f"{self.n_bytes / 1e6:.1f} MB in {self.n_shards} shards and {self.n_segments} "
            f"segments; {self.n_unsealed} unsealed, {self.n_superseded} superseded"
        )
        return "\n".join(lines)


@dataclass(eq=False)
class SnapshotStore:
    """A campaign on disk. Made by :meth:`create` or :meth:`open`; cheap to make, safe to pickle.

    Attributes
    ----------
    path : Path
    schema : Schema
    n, seed : int
        Trajectories of the campaign, and the seed of its study.
    config : dict
        What the creator wanted to remember (the resolved case).
    uuid : str
    fractions : dict of str to float
        Share of each split.
    storage : Storage
        How values are laid out in shards.

    Examples
    --------
    >>> import tempfile, numpy as np
    >>> from simlab.core.samples import Sample
    >>> from simlab.store.schema import Axis, FieldSpec
    >>> schema = Schema("toy", (Axis("x", (0.0, 0.5, 1.0)),), (FieldSpec("u"),))
    >>> store = SnapshotStore.create(tempfile.mkdtemp() + "/toy", schema, n=1, seed=11)
    >>> with store.writer() as writer:
    ...     _ = writer.begin(Sample(0, 11))
    ...     writer.append(0, 0, 0.0, {"u": np.arange(3.0)})
    ...     writer.finish(0)
    >>> shards = store.seal(final=True)
    >>> sum(len(store.split(name)) for name in store.fractions)
    1
    """

    path: Path
    schema: Schema
    n: int
    seed: int
    config: dict[str, Any]
    uuid: str
    fractions: dict[str, float]
    storage: Storage = field(default_factory=Storage)
    catalogue: Catalogue = field(init=False, repr=False)
    inflight: Inflight = field(init=False, repr=False)
    files: ShardFiles = field(init=False, repr=False)
    _manifest: ManifestWriter | None = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        self.catalogue = Catalogue(self.path / "manifest", self.n)
        self.inflight = Inflight(self.path / "inflight")
        self.files = ShardFiles(self.path / "data", self.schema)

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return type(self).open, (self.path,)

    @classmethod
    def create(
        cls,
        path: str | Path,
        schema: Schema,
        *,
        n: int,
        seed: int,
        split: Mapping[str, float] = DEFAULT_SPLIT,
        config: Mapping[str, Any] | None = None,
        storage: Storage | None = None,
    ) -> SnapshotStore:
        """Make a store, or open the one that is there if it is the same campaign.

        Any number of processes may call this at once.

        Parameters
        ----------
        storage : Storage, optional
            Profile and precision; The Well's loader reads all of them.

        Raises
        ------
        ConfigError
            When another campaign is there; names the keys that differ.
        """
        path = Path(path).absolute()
        if n < 1:
            raise ConfigError(f"campaign.n: {n} trajectories; at least one is needed")
        spec = schema.to_json()
        mesh = spec.pop("mesh", None)
        content: dict[str, Any] = {
            "schema": SCHEMA,
            "n": n,
            "seed": seed,
            "split": check_fractions(split),
            "spec": spec,
            "mesh": None,
            "config": dict(config or {}),
        }
        kept = (storage or Storage()).to_json()
        if kept is not None:
            content["storage"] = kept
        content = json.loads(json.dumps(content))
        with files.reported(path):
            for name in ("inflight", "manifest", *(f"data/{item}" for item in SPLITS)):
                (path / name).mkdir(parents=True, exist_ok=True)
            if mesh is not None:
                content["mesh"] = publish_mesh(path, schema)
        extra = {
            "uuid": uuid.uuid4().hex,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "software": software(),
        }
        text = with_digest(content | extra)
        with files.reported(path):
            is_new = files.publish(path / "campaign.json", text, overwrite=False)
        if not is_new:
            found = read_campaign(path)
            old, new = (identity(item) for item in (found, content))
            changed = differences(old, new)
            if changed:
                raise ConfigError([_short(line) for line in changed], f"{path}: another campaign")
        return cls.open(path)

    @classmethod
    def open(cls, path: str | Path) -> SnapshotStore:
        """Open a store.

        Raises
        ------
        StoreError
            When there is none, or its description is damaged.
        """
        path = Path(path).absolute()
        found = read_campaign(path)
        spec = dict(found["spec"])
        if found["mesh"] is not None:
            spec["mesh"] = read_mesh(path, found["mesh"])
        return cls(
            path,
            Schema.from_json(spec),
            found["n"],
            found["seed"],
            found["config"],
            found["uuid"],
            check_fractions(found["split"]),
            Storage.from_json(found.get("storage")),
        )

    @property
    def manifest(self) -> ManifestWriter:
        """Where this process writes its manifest lines."""
        if self._manifest is None:
            self._manifest = ManifestWriter(self.path / "manifest")
        return self._manifest

    def refresh(self) -> None:
        """Learn what other processes have written: segments first, then the manifest."""
        self.inflight.refresh()
        self.catalogue.refresh()

    def split_of(self, traj: int) -> str:
        """Return the split of a trajectory; depends on its id, the seed and the fractions only."""
        return list(self.fractions)[self._which[traj]]

    def ids(self, split: str) -> np.ndarray:
        """Return the ids of all trajectories of a split, made or not; int64, sorted."""
        if split not in SPLITS:
            raise ConfigError(f"no split {split!r}; there are {', '.join(SPLITS)}")
        if split not in self.fractions:
            return np.empty(0, dtype=np.int64)
        return np.flatnonzero(self._which == list(self.fractions).index(split))

    def writer(self, *, segment_bytes: int = SEGMENT_BYTES) -> Writer:
        """Return a new writer; use it in a ``with`` block, from one thread."""
        self.refresh()
        return Writer(
            self.path / "inflight",
            self.schema,
            n=self.n,
            campaign=self.uuid,
            split_of=self.split_of,
            last_attempt=self._last_attempt,
            segment_bytes=segment_bytes,
            storage=self.storage,
        )

    def seal(
        self, final: bool = False, *, writer: str = "", shard_bytes: int = SHARD_BYTES
    ) -> list[str]:
        """Turn segments into shards; return the names of the new ones below ``data/``.

        Takes full segments whose trajectories have all ended, and those closed before they were
        full once there are enough for a shard; with ``final`` also those, full or
        not, whose writer is closed or dead, and then writes ``stats.yaml``. Without ``final`` it
        returns at once when another process is sealing. With ``writer``, the id of a closed writer,
        only its segments are taken: several processes may each seal their own at the same time.
        """
        made = seal(self, final=final, writer=writer, shard_bytes=shard_bytes)
        if final and not writer:
            self.stats()
        return made

    def recover(self) -> RecoverReport:
        """Put right what a crash left behind and say what was done; harms no live writer."""
        return recover(self)

    def verify(self, deep: bool = False) -> list[str]:
        """Return the problems found, one line each; none when the store is good.

        Deep: every value of every shard and segment is read and held against its checksums.
        """
        return verify(self, deep)

    def status(self) -> Status:
        """Count trajectories and bytes. Reads the manifest and new records only, no shard."""
        state = self._state()
        table = np.zeros((len(self.fractions), 4), dtype=np.int64)
        np.add.at(table, (self._which, state), 1)
        splits = {
            name: SplitStatus(
                int(row[_DONE]), int(row[_FAILED]), int(row[_IN_FLIGHT]), int(row[_MISSING])
            )
            for name, row in zip(self.fractions, table, strict=True)
        }
        shards = self.catalogue.live_shards
        segments = self.inflight.segments.values()
        sealed = int(np.count_nonzero(self.catalogue.done_attempts))
        return Status(
            splits,
            sum(shard.n_bytes for shard in shards) + sum(item.size for item in segments),
            len(shards),
            len(self.inflight.segments),
            int(np.count_nonzero(state == _DONE)) - sealed,
            self.catalogue.n_superseded,
        )

    def done(self) -> set[int]:
        """Return the ids of finished trajectories, sealed or not."""
        return set(np.flatnonzero(self._state() == _DONE).tolist())

    def failed(self) -> dict[int, str]:
        """Return the trajectories whose last attempt failed, with the reasons."""
        state = self._state()
        latest = dict(self.catalogue.failed)
        for segment in self.inflight.segments.values():
            for run in segment.ended:
                if run.status == "failed" and run.attempt > latest.get(run.traj, (0, ""))[0]:
                    latest[run.traj] = (run.attempt, run.reason)
        return {traj: latest[traj][1] for traj in np.flatnonzero(state == _FAILED).tolist()}

    def is_complete(self) -> bool:
        """Return whether every trajectory has finished or failed."""
        return bool(np.all(self._state() >= _FAILED))

    def follow(self, position: Position | None, at_most: int) -> tuple[list[Event], Position]:
        """Return up to ``at_most`` new events of all writers, and the position after them.

        Parameters
        ----------
        position : Position or None
            None starts at the very beginning. Keep the returned one together with what was made
            of the events; a restart from it loses and repeats nothing.

        Returns
        -------
        list of Begin, StepRecord and End
            In order within a trajectory. Empty when there is nothing new.
        Position
        """
        return follow(self, position, at_most)

    def split(self, name: str) -> Split:
        """Return the sealed, finished trajectories of a split."""
        self.catalogue.refresh()
        ids = self.ids(name)
        shard, row = self.catalogue.where(ids)
        kept = shard >= 0
        names = [self.catalogue.shards[number].name for number in shard[kept].tolist()]
        return Split(name, self.schema, ids[kept], names, row[kept], self.files)

    def solves(self, split: str | None = None) -> np.ndarray:
        """Return how every step of the finished trajectories was solved, sealed or not.

        Parameters
        ----------
        split : str, optional

        Returns
        -------
        structured ndarray, shape (steps of all trajectories,)
            ``index``, ``step`` and the attributes of :class:`simlab.core.reports.Provenance`,
            sorted as the data are; ``np.sort(found, order="order")`` is the order of solving.
        """
        return read_solves(self, split)

    def stats(self) -> dict[str, dict[str, Any]]:
        """Return mean, std, rms and those of the steps' differences per field, from train only.

        Also writes them to ``stats.yaml`` for The Well's loader. Reads the manifest only.
        """
        self.catalogue.refresh()
        train = [shard for shard in self.catalogue.live_shards if shard.split == "train"]
        values = constants(self.schema, merged(shard.moments for shard in train))
        text = to_yaml(values, sorted(shard.name for shard in train))
        with files.reported(self.path):
            files.publish(self.path / "stats.yaml", text)
        return values

    @cached_property
    def step_bytes(self) -> int:
        """Bytes of one step in a segment."""
        schema = self.schema
        return step_bytes(
            self.storage.record_dtype(spec).itemsize * math.prod(schema.field_shape(spec))
            for spec in schema.outputs
        )

    @cached_property
    def _which(self) -> np.ndarray:
        """Number of every trajectory's split, in the order of the fractions."""
        return assign(np.arange(self.n), self.seed, self.fractions).astype(np.int8)

    def _last_attempt(self, traj: int, writer: str) -> int:
        """Return the highest attempt in the store, apart from what this writer itself wrote."""
        self.inflight.refresh(skip=writer)
        self.catalogue.refresh()
        return max(self.inflight.last_attempt(traj), self.catalogue.last_attempt(traj))

    def _state(self) -> np.ndarray:
        """Return for each trajectory: missing, in flight, failed or done."""
        self.refresh()
        state = np.full(self.n, _MISSING)
        state[list(self.catalogue.failed)] = _FAILED
        attempts = {traj: attempt for traj, (attempt, _) in self.catalogue.failed.items()}
        done = []
        for name, segment in self.inflight.segments.items():
            for run in segment.ended:
                if run.status == "done":
                    done.append(run.traj)
                elif run.status == "failed" and run.attempt > attempts.get(run.traj, 0):
                    attempts[run.traj] = run.attempt
                    state[run.traj] = _FAILED
            if segment.runs and self.inflight.is_writable(name):
                for run in segment.runs.values():
                    if run.attempt > attempts.get(run.traj, 0):
                        attempts[run.traj] = run.attempt
                        state[run.traj] = _IN_FLIGHT
        state[done] = _DONE
        state[self.catalogue.done_attempts > 0] = _DONE
        return state


def _short(line: str) -> str:
    return line if len(line) <= 200 else line[:197] + "..."
