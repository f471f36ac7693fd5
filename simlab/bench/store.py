"""The store: appending, sealing, and reading random pairs beside The Well's loader and h5py.

Writing: steps of 512^2 float32 of one trajectory after the other, as a solver's root would append
them, then sealing what was written; megabytes per CPU second of this process, helper thread
included, and the wall seconds beside them.

Reading: pairs ``u_k, u_{k+1}`` of 128^2 float32, the same random pairs of the same shards for
every contestant, per storage profile; page cache warm, CPU seconds, medians. ``first pass`` looks
at every checksum, as the native loader does when a process reads a step for the first time; later
passes do not. h5py keeps its files and datasets open. The Well's loader opens the file for each
pair and returns grid and boundary conditions too; ``fields only`` is told to leave them out.

Ratios: ``loader_pairs_s`` is that of profile ``fast``, ``loader_over_*`` compare on the shards of
profile ``default``, with the faster of the two for The Well's.
"""

from __future__ import annotations

import importlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from rich.console import Console

from simlab.bench.runner import Contest, outcome, print_ratios, print_table
from simlab.core.samples import Sample
from simlab.store.loader import Loader
from simlab.store.schema import Axis, FieldSpec, Schema
from simlab.store.storage import PROFILES, Storage
from simlab.store.store import SnapshotStore

__all__ = ["run"]

SEED = 71093
GOALS = {
    "append_mb_s": ">= 500",
    "append_over_solve": "<= 0.02",
    "seal_mb_s": ">= 150",
    "loader_pairs_s": ">= 30000",
    "welldataset_pairs_s": "",
    "loader_over_welldataset": ">= 3",
    "loader_over_h5py": "",
}
_BATCH = 32
_SOLVE_SECONDS = 0.05


def run(quick: bool = False) -> dict[str, Any]:
    """Measure, print and return the table.

    Parameters
    ----------
    quick : bool
        48 MB instead of 256, fewer and shorter turns.
    """
    with tempfile.TemporaryDirectory(prefix="simlab-bench-") as folder:
        writing = _writing(Path(folder), n_trajectories=6 if quick else 32)
        print_table("writing, 512^2 float32", writing)
        sizes = (8, 26, 5, 64) if quick else (40, 51, 11, 256)
        reading = []
        for profile in ("default", "fast") if quick else PROFILES:
            reading += _reading(Path(folder) / profile, profile, *sizes)
        print_table("random pairs of 128^2 float32", reading)
    append, seal = writing
    speed = {(row["profile"], row["contestant"]): row["pairs_s"] for row in reading}
    loader = speed["default", "loader"]
    wells = [value for key, value in speed.items() if key[0] == "default" and "Well" in key[1]]
    well = max(wells, default=None)
    ratios = {
        "append_mb_s": append["mb_cpu_s"],
        "append_over_solve": append["step_ms"] / (1e3 * _SOLVE_SECONDS),
        "seal_mb_s": seal["mb_cpu_s"],
        "loader_pairs_s": speed["fast", "loader"],
        "welldataset_pairs_s": well,
        "loader_over_welldataset": loader / well if well else None,
        "loader_over_h5py": loader / speed["default", "h5py"],
    }
    print_ratios(ratios, GOALS)
    return outcome("store", [*writing, *reading], ratios)


def _campaign(
    path: Path, cells: int, n: int, n_steps: int, profile: str = "default"
) -> SnapshotStore:
    centres = tuple(((np.arange(cells) + 0.5) / cells).tolist())
    schema = Schema(
        "bench",
        (Axis("x", centres), Axis("y", centres)),
        (FieldSpec("u"),),
        times=tuple(range(n_steps)),
        parameters={"mu": "1"},
    )
    return SnapshotStore.create(
        path, schema, n=n, seed=SEED, split={"train": 1.0}, storage=Storage(profile)
    )


def _append(store: SnapshotStore) -> list[float]:
    """Fill a store; return the CPU seconds of this thread for every step."""
    generator = np.random.default_rng(SEED)
    shape = store.schema.shape
    frames = [generator.standard_normal(shape, dtype=np.float32) for _ in range(8)]
    seconds = []
    with store.writer() as writer:
        for traj in range(store.n):
            writer.begin(Sample(traj, SEED, {"mu": float(traj)}))
            for step, at in enumerate(store.schema.times):
                fields = {"u": frames[(traj + step) % len(frames)]}
                start = time.thread_time()
                writer.append(traj, step, at, fields)
                seconds.append(time.thread_time() - start)
            writer.finish(traj)
    return seconds


def _writing(folder: Path, n_trajectories: int, n_steps: int = 8) -> list[dict[str, Any]]:
    rows: dict[str, list[tuple[float, float, float]]] = {"append": [], "seal": []}
    n_bytes = n_trajectories * n_steps * 512 * 512 * 4
    for turn in range(3):
        store = _campaign(folder / f"write{turn}", 512, n_trajectories, n_steps)
        steps: list[float] = []

        def append(store: SnapshotStore = store, steps: list[float] = steps) -> None:
            steps += _append(store)

        def seal(store: SnapshotStore = store) -> None:
            store.seal(final=True)

        work: dict[str, Callable[[], None]] = {"append": append, "seal": seal}
        for name, do in work.items():
            wall, cpu = time.perf_counter(), time.process_time()
            do()
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            rows[name].append((cpu, wall, float(np.median(steps))))
    found = []
    for name, turns in rows.items():
        cpu, wall, step = np.median(np.array(turns), axis=0).tolist()
        found.append(
            {
                "contestant": name,
                "megabytes": n_bytes / 1e6,
                "mb_cpu_s": n_bytes / 1e6 / cpu,
                "wall_s": wall,
                "step_ms": 1e3 * step if name == "append" else None,
            }
        )
    return found


def _reading(
    path: Path, profile: str, n: int, n_steps: int, n_turns: int, n_pairs: int
) -> list[dict[str, Any]]:
    store = _campaign(path, 128, n, n_steps, profile)
    _append(store)
    store.seal(final=True)
    plain = Loader(store, ahead=1)
    cached = Loader(store, ahead=1, cache_bytes=1 << 40)
    unread = iter([_opened(store, n) for _ in range(n_turns)])
    contestants: dict[str, Callable[[np.ndarray], Any]] = {
        "loader": lambda pairs: _batches(plain, pairs),
        "loader, in memory": lambda pairs: _batches(cached, pairs),
        "loader, first pass": lambda pairs: _batches(next(unread), pairs),
        "h5py": _H5py(store, plain),
    }
    contestants |= _wells(store, plain)
    everything = np.arange(len(plain))
    for loader in (plain, cached):  # every checksum looked at, every page touched
        _batches(loader, everything)
    generator = np.random.default_rng(SEED)
    turns = [generator.integers(len(plain), size=n_pairs) for _ in range(n_turns)]
    contest = Contest(contestants)
    contest.run(turns)
    for name, answers in contest.answers.items():
        if not np.array_equal(answers, contest.answers["h5py"]):
            raise AssertionError(f"{name} read other values than h5py")
    return [
        {
            "profile": profile,
            "contestant": name,
            "pairs_s": 1e3 * n_pairs / contest.milliseconds(name),
            "us_per_pair": 1e3 * contest.milliseconds(name) / n_pairs,
            "pairs": n_pairs * (n_turns - 1),
        }
        for name in contestants
    ]


def _opened(store: SnapshotStore, n: int) -> Loader:
    """Return a loader that knows its shards and has checked one pair of each trajectory only."""
    loader = Loader(store, ahead=1)
    loader.read(np.arange(n) * (len(loader) // n))
    return loader


def _batches(loader: Loader, pairs: np.ndarray) -> list[float]:
    """Read pairs in batches; return one number of each second state, to compare answers by."""
    seen: list[float] = []
    for first in range(0, len(pairs), _BATCH):
        seen += loader.read(pairs[first : first + _BATCH]).outputs["u"][:, 1, 5, 7].tolist()
    return seen


def _places(store: SnapshotStore, loader: Loader) -> Iterator[tuple[str, int, int]]:
    """Yield shard, row and first step of every pair."""
    places = store.split("train").places()
    for traj, step in zip(*loader.locate(np.arange(len(loader))), strict=True):
        yield *places[traj], int(step)


class _H5py:
    """Plain h5py with files and datasets kept open."""

    def __init__(self, store: SnapshotStore, loader: Loader) -> None:
        self._places = list(_places(store, loader))
        names = {name for name, _, _ in self._places}
        files = {name: h5py.File(store.path / "data" / name, "r") for name in names}
        self._data = {name: file["t0_fields/u"] for name, file in files.items()}

    def __call__(self, pairs: np.ndarray) -> list[float]:
        seen = []
        for pair in pairs.tolist():
            name, row, step = self._places[pair]
            seen.append(float(self._data[name][row, step : step + 2][1, 5, 7]))
        return seen


def _wells(store: SnapshotStore, loader: Loader) -> dict[str, Callable[[np.ndarray], Any]]:
    """Return The Well's own loader, as it comes and told to read nothing but the fields."""
    try:
        data = importlib.import_module("the_well.data")  # not needed by anything else here
    except ImportError:
        Console().print("the-well is not installed: nothing to compare with")
        return {}
    folder = str(store.path)
    whole = data.WellDataset(path=folder, well_split_name="train")
    fields = data.WellDataset(
        path=folder, well_split_name="train", return_grid=False, boundary_return_type=None
    )
    first = {
        os.path.basename(path): max(int(offset), 0)
        for path, offset in zip(whole.files_paths, whole.file_index_offsets, strict=False)
    }
    per_row = len(store.schema.times) - 1
    numbers = [
        first[os.path.basename(name)] + row * per_row + step
        for name, row, step in _places(store, loader)
    ]

    def reads(dataset: Any) -> Callable[[np.ndarray], Any]:
        return lambda pairs: [
            float(dataset[numbers[pair]]["output_fields"][0, 5, 7, 0]) for pair in pairs.tolist()
        ]

    return {"WellDataset": reads(whole), "WellDataset, fields only": reads(fields)}
