"""Training on two processes over gloo: the steps of one, no hanging, resume."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from simlab.learn.ranks import Ranks

WORKER = Path(__file__).parents[1] / "ranks_worker.py"


def launch(task, directory, size, *more, seconds=240):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = os.environ | {
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(WORKER), task, str(directory), *more]
    running = [
        subprocess.Popen(
            command, env=shared | {"RANK": str(rank)}, stderr=subprocess.PIPE, text=True
        )
        for rank in range(size)
    ]
    try:
        for process in running:
            _, error = process.communicate(timeout=seconds)
            assert process.returncode == 0, error
    finally:
        for process in running:
            process.kill()
            process.wait()


def read(directory, name):
    return json.loads((directory / f"{name}.json").read_text())


def test_two_ranks_take_the_steps_of_one_with_twice_the_batch(tmp_path):
    for size in (1, 2):
        launch("equal", tmp_path, size)
    one, two = read(tmp_path, "equal-1-0"), read(tmp_path, "equal-2-0")
    other = read(tmp_path, "equal-2-1")
    assert len(one["losses"]) == len(two["losses"]) == 100
    assert other["losses"] == []  # only rank 0 talks
    np.testing.assert_allclose(two["losses"], one["losses"], rtol=1e-5)
    assert one["losses"][-1] < 0.9 * one["losses"][0]
    assert two["weights"] == other["weights"]
    assert two["ranges"] == other["ranges"] == one["ranges"]
    for name, values in one["weights"].items():
        np.testing.assert_allclose(two["weights"][name], values, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("n", [14, pytest.param(100, marks=pytest.mark.slow)])
def test_uneven_streams_never_hang(n, tmp_path):
    """Random lengths and pauses; every seventh time one rank alone stops after 2 batches."""
    launch("uneven", tmp_path, 2, str(n))
    one, two = read(tmp_path, "uneven-0"), read(tmp_path, "uneven-1")
    assert one["counts"] == two["counts"]
    assert one["counts"] == [2 if case % 7 == 0 else 4 for case in range(n)]


def test_resumed_ranks_equal_straight_ones(tmp_path):
    launch("resume", tmp_path, 2)
    assert read(tmp_path, "resume-0") == read(tmp_path, "resume-1")
    folder = tmp_path / "parts"
    assert (folder / "model.json").is_file()
    assert (folder / "checkpoints-1" / "batch-00000040" / "COMMIT").is_file()
    assert (folder / "arrivals-1.log").is_file()


def test_one_rank_needs_no_launcher(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    ranks = Ranks.join()
    assert (ranks.rank, ranks.size) == (0, 1)
    assert ranks.any(True)
    assert not ranks.any(False)
