"""Ingress: how fast a trainer's process gets records, through either channel.

A log is written first, with everything in the page cache; then one process follows it from its
beginning and drops what it gets, by ``tail`` or, over ``ipc`` and ``tcp``, by ``stream`` from a
server process on this host. A sample is one step of one float32 field, its checksum checked, as an
array. Rates are per wall second, the median of three passes; CPU microseconds per sample are those
of the follower and of the server, which runs beside it. Wall rates count what else the machine
does: on a busy one, see the CPU times.

Ratios: ``*_samples_s`` at 64^2, ``*_gb_s`` at 512^2.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from simlab.bench.runner import outcome, print_ratios, print_table
from simlab.core.errors import StoreError
from simlab.core.samples import Sample
from simlab.store.channel import Channel, open_channel
from simlab.store.follow import StepRecord
from simlab.store.schema import Axis, FieldSpec, Schema
from simlab.store.store import SnapshotStore
from simlab.store.stream import ENDPOINT, LOOPBACK

__all__ = ["ingress_rate", "run"]

SEED = 40961
CHANNELS = ("tail", "ipc", "tcp")
GOALS = {
    **{f"{channel}_samples_s": ">= 10000" for channel in CHANNELS},
    **{f"{channel}_gb_s": ">= 1" for channel in CHANNELS},
}
_N_STEPS = 50


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
        for name in (("samples_s",) if row["side"] == 64 else ("gb_s",))
    }
    print_ratios(ratios, GOALS)
    return outcome("ingress", rows, ratios)


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
            rows.append(
                {
                    "channel": channel,
                    "side": side,
                    "samples": n,
                    "samples_s": n / wall,
                    "gb_s": 4e-9 * side**2 * n / wall,
                    "follower_us": 1e6 * own / n,
                    "server_us": 1e6 * others / n,
                }
            )
    return rows


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
