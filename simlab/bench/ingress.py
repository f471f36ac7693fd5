"""Ingress: how fast a trainer's process gets records, and its buffer takes and hands them out.

A log is written first, with everything in the page cache; then one process follows it from its
beginning and drops what it gets, by ``tail`` or, over ``ipc`` and ``tcp``, by ``stream`` from a
server process on this host. A sample is one step of one float32 field, its checksum checked, as an
array. Rates are per wall second, the median of three passes; CPU microseconds per sample are those
of the follower and of the server, which runs beside it. Wall rates count what else the machine
does. Busy rates do not: they are per CPU second of whichever of the two takes longer, which is what
a core for each would give.

Buffers take samples of 16 KiB one by one and hand out a batch of eight after every eight. What the
same copies take without a buffer is subtracted.

Ratios: ``*_samples_s`` at 64^2, ``*_gb_s`` at 512^2, ``*_put_get_us`` in CPU microseconds.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from simlab.bench.runner import outcome, print_ratios, print_table
from simlab.core.errors import StoreError
from simlab.core.samples import Sample
from simlab.learn.buffers import Buffer, buffers
from simlab.store.channel import Channel, open_channel
from simlab.store.follow import StepRecord
from simlab.store.schema import Axis, FieldSpec, Schema
from simlab.store.store import SnapshotStore
from simlab.store.stream import ENDPOINT, LOOPBACK

__all__ = ["buffer_times", "ingress_rate", "run"]

SEED = 40961
CHANNELS = ("tail", "ipc", "tcp")
BUFFERS = ("fifo", "firo", "reservoir", "batch_reservoir", "time_stratified")
GOALS = {
    **{f"{one}_{kind}samples_s": ">= 10000" for one in CHANNELS for kind in ("", "busy_")},
    **{f"{one}_{kind}gb_s": ">= 1" for one in CHANNELS for kind in ("", "busy_")},
    **{f"{one}_put_get_us": "<= 30" for one in BUFFERS},
}
_N_STEPS = 50
_BATCH = 8


def run(quick: bool = False) -> dict[str, Any]:
    """Measure, print and return the table.

    Parameters
    ----------
    quick : bool
        An eighth of the data.
    """
    share = 8 if quick else 1
    rows = []
    for side, n_samples, at_most in ((64, 24_000 // share, 1000), (512, 800 // share, 64)):
        rows += ingress_rate(side, n_samples, at_most)
    print_table("ingress", rows)
    ratios = {
        f"{row['channel']}_{name}": row[name]
        for row in rows
        for name in (
            ("samples_s", "busy_samples_s") if row["side"] == 64 else ("gb_s", "busy_gb_s")
        )
    }
    kept = buffer_times(16_000 // share)
    print_table("buffers", kept)
    ratios |= {f"{row['buffer']}_put_get_us": row["put_get_us"] for row in kept}
    print_ratios(ratios, GOALS)
    return outcome("ingress", rows + kept, ratios)


def ingress_rate(side: int, n_samples: int, at_most: int) -> list[dict[str, Any]]:
    """Return one row per channel: rates and CPU times for samples of ``side`` x ``side``."""
    with tempfile.TemporaryDirectory(prefix="simlab-bench-") as folder:
        path = Path(folder)
        n_trajectories = -(-n_samples // _N_STEPS)
        _write(path, side, n_trajectories)
        rows = []
        for channel in CHANNELS:
            passes = []
            with _opened(channel, path) as (follower, server):
                for _ in range(3):
                    passes.append(_follow(follower, server, n_trajectories * _N_STEPS, at_most))
            wall, own, others = np.median(passes, axis=0).tolist()
            n = n_trajectories * _N_STEPS
            busy = max(own, others)
            rows.append(
                {
                    "channel": channel,
                    "side": side,
                    "samples": n,
                    "samples_s": n / wall,
                    "gb_s": 4e-9 * side**2 * n / wall,
                    "busy_samples_s": n / busy,
                    "busy_gb_s": 4e-9 * side**2 * n / busy,
                    "follower_us": 1e6 * own / n,
                    "server_us": 1e6 * others / n,
                }
            )
    return rows


def buffer_times(n_samples: int) -> list[dict[str, Any]]:
    """Return one row per buffer: CPU microseconds per sample, of the copies, and apart from them.

    All take turns, so that what else the machine does favours none.
    """
    values = np.random.default_rng(SEED).standard_normal((64, 64 * 64), dtype=np.float32)
    capacity = min(2000, n_samples // 2)
    contestants: dict[str, Callable[[int], int]] = {"copy": _copier(capacity, values)}
    for kind in BUFFERS:
        settings = buffers.build({"kind": kind, "capacity": capacity})
        contestants[kind] = _exchanger(settings.build(values.shape[1], SEED), values)
    for turn in contestants.values():
        turn(capacity // 2)
    seconds = {name: 0.0 for name in contestants}
    handed = {name: 0 for name in contestants}
    for _ in range(10):
        for name, turn in contestants.items():
            begun = time.process_time()
            handed[name] += turn(n_samples // 10)
            seconds[name] += time.process_time() - begun
    used = {name: 1e6 * seconds[name] / handed[name] for name in contestants}
    return [
        {
            "buffer": kind,
            "samples": handed[kind],
            "us": used[kind],
            "copy_us": used["copy"],
            "put_get_us": used[kind] - used["copy"],
        }
        for kind in BUFFERS
    ]


def _exchanger(buffer: Buffer, values: np.ndarray) -> Callable[[int], int]:
    """Return a function that puts so many samples and returns how many were handed out."""

    def exchange(n: int) -> int:
        before = buffer.n_got
        for i in range(n):
            if not buffer.put(values[i % len(values)], i % _N_STEPS, i):
                raise StoreError(f"{buffer!r} is full")
            if i % _BATCH == _BATCH - 1:
                buffer.get(_BATCH)
        return buffer.n_got - before

    return exchange


def _copier(capacity: int, values: np.ndarray) -> Callable[[int], int]:
    """Return the same without a buffer: values copied in, and scattered ones copied out."""
    rows = np.empty((capacity, values.shape[1]), dtype=np.float32)
    picks = np.random.default_rng(SEED).integers(capacity, size=(256, _BATCH)).tolist()

    def copy(n: int) -> int:
        for i in range(n):
            rows[i % capacity] = values[i % len(values)]
            if i % _BATCH == _BATCH - 1:
                rows[picks[i // _BATCH % len(picks)]]
        return n

    return copy


def _write(path: Path, side: int, n_trajectories: int) -> None:
    centres = tuple(((np.arange(side) + 0.5) / side).tolist())
    axes = (Axis("x", centres), Axis("y", centres))
    schema = Schema("bench", axes, (FieldSpec("u"),), tuple(map(float, range(_N_STEPS))))
    store = SnapshotStore.create(path, schema, n=n_trajectories, seed=SEED, split={"train": 1.0})
    values = np.random.default_rng(SEED).standard_normal((8, side, side), dtype=np.float32)
    with store.writer() as writer:
        for traj in range(n_trajectories):
            writer.begin(Sample(traj, SEED))
            for step, at in enumerate(schema.times):
                writer.append(traj, step, at, {"u": values[(traj + step) % 8]})
            writer.finish(traj)


@contextmanager
def _opened(channel: str, path: Path) -> Iterator[tuple[Channel, int]]:
    """Yield a channel and the number of the process that serves it, 0 without one."""
    if channel == "tail":
        yield open_channel(path), 0
        return
    address = LOOPBACK if channel == "tcp" else f"ipc://{path}/socket"
    command = [sys.executable, "-m", "simlab", "store", "serve", str(path), "--address", address]
    server = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert server.stdout is not None
    try:
        if not server.stdout.readline():
            raise StoreError(f"{path}: the server did not start")
        follower = open_channel(path / ENDPOINT)
        yield follower, server.pid
        follower.close()
    finally:
        server.terminate()
        server.wait()
        server.stdout.close()


def _follow(channel: Channel, server: int, n: int, at_most: int) -> tuple[float, float, float]:
    """Follow a log once; return wall seconds, and CPU seconds of follower and server."""
    served, own, wall = _cpu_seconds(server), time.process_time(), time.perf_counter()
    position = None
    n_steps = 0
    while n_steps < n:
        records, position = channel.records(position, at_most)
        n_steps += sum(isinstance(record, StepRecord) for record in records)
    wall, own = time.perf_counter() - wall, time.process_time() - own
    return wall, own, _cpu_seconds(server) - served


def _cpu_seconds(process: int) -> float:
    """Return the CPU seconds a process has used; 0 for none, NaN where /proc does not say."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text() if process else ") " + "0 " * 15
    except FileNotFoundError:
        return float("nan")
    words = stat.rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")
