"""A training through the files or through a server is the same one, also when that is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import typer
from commands import ROOT, command, environment, simlab
from learn_helpers import bare_schema

from simlab.cli import store as store_commands
from simlab.core.errors import ConfigError, StoreError
from simlab.learn.settings import TrainSettings
from simlab.pipeline.processes import end_heirs, heirs
from simlab.store.channel import TailChannel, open_channel, received_split
from simlab.store.store import SnapshotStore
from simlab.store.stream import StreamServer

N_SAMPLES, N_BATCHES = 160, 60
CASE = f"""
[family]
kind = "darcy"
cells = 12
[solver]
kind = "direct"     # what it gives does not depend on the samples before
[campaign]
n = {N_SAMPLES}
seed = 52361
[train]
operator = {{ kind = "deeponet" }}
buffer = {{ kind = "reservoir", capacity = 120, threshold = 8 }}
mode = "deterministic"
n_batches = {N_BATCHES}
batch = 2
threads = 1
log_every = 1
channel = "stream"
"""


def weights(out: Path) -> dict[str, torch.Tensor]:
    return torch.load(out / "model" / "model.pt", weights_only=True)


def last_validation(out: Path) -> dict:
    found = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [line["rel_l2"] for line in found if line["kind"] == "validation"][-1]


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@contextmanager
def served(store: Path, *words: str | Path) -> Iterator[str]:
    """Run ``simlab store serve``; yield its first line."""
    process = subprocess.Popen(
        command(["store", "serve", store, *words]),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process.stdout.readline()
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 0


def run_and_kill_the_server(case: Path, out: Path) -> None:
    """Run the case; the server dies as soon as there is training."""
    process = subprocess.Popen(
        command(["run", case, "--out", out]),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    metrics = out / "metrics.jsonl"
    try:
        end = time.monotonic() + 120
        while not (metrics.exists() and '"train"' in metrics.read_text()):
            assert time.monotonic() < end
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.02)
        (server,) = heirs("SIMLAB_SIDE", f"server of {out}")
        os.kill(server, signal.SIGKILL)
        _, errors = process.communicate(timeout=180)
        assert process.returncode == 0, errors
    finally:
        process.kill()
        for side in ("solvers", "trainer", "server"):
            end_heirs("SIMLAB_SIDE", f"{side} of {out}")


@pytest.mark.parametrize(
    "address",
    ["ipc://{}/socket", pytest.param("tcp://127.0.0.1:*", marks=pytest.mark.slow)],
)
def test_weights_are_equal_through_files_and_from_another_host(tmp_path, address) -> None:
    """A trainer on another host has the case and the file of the server, and no store."""
    case, out, away = tmp_path / "case.toml", tmp_path / "run", tmp_path / "away"
    case.write_text(CASE)
    assert simlab("generate", case, "--out", out).returncode == 0
    done = simlab("train", case, "--out", out, "--set", "train.channel=tail")
    assert done.returncode == 0, done.stderr
    address, file = address.format(tmp_path), tmp_path / "copied.json"
    with served(out, "--address", address, "--endpoint", file) as line:
        assert line.startswith(address.rstrip("*"))
        assert line.endswith(f", token in {file}\n")
        done = simlab("train", case, "--out", away, "--set", f"train.channel={file}")
    assert done.returncode == 0, done.stderr
    assert not (away / "store").exists()
    assert_equal(weights(away), weights(out))
    assert last_validation(away) == last_validation(out)


@pytest.mark.slow
def test_a_run_keeps_a_server_and_training_goes_on_when_it_is_killed(tmp_path) -> None:
    case, out = tmp_path / "case.toml", tmp_path / "run"
    case.write_text(CASE)
    run_and_kill_the_server(case, out)
    manifest = json.loads((out / "manifest.json").read_text())
    assert [entry["side"] for entry in manifest["restarts"]] == ["server"]
    assert manifest["state"] == "done"
    assert manifest["server"]["state"] == "done"
    assert not heirs("SIMLAB_SIDE", f"server of {out}")
    stream, errors = weights(out), last_validation(out)
    tail = ["train", case, "--out", out, "--fresh", "--set", "train.channel=tail"]
    assert simlab(*tail).returncode == 0
    assert_equal(weights(out), stream)
    assert last_validation(out) == errors


def test_a_received_split_is_that_of_the_files(tmp_path) -> None:
    case = tmp_path / "case.toml"
    case.write_text(CASE)
    out = tmp_path / "run"
    assert simlab("generate", case, "--out", out, "--set", "campaign.n=30").returncode == 0
    store = SnapshotStore.open(out / "store")
    expected = store.split("test")
    with StreamServer(store.path) as server:
        stream = open_channel(server.endpoint)
        for channel in (TailChannel(store.path), stream):
            found = received_split(channel, "test")
            assert [t.sample.index for t in found] == expected.ids.tolist()
            for mine, theirs in zip(found, expected, strict=True):
                assert mine.sample.parameters == theirs.sample.parameters
                assert mine.times.tobytes() == theirs.times.tobytes()
                for name, values in theirs.sample.fields.items():
                    assert mine.sample.fields[name].tobytes() == values.tobytes()
                for name, values in theirs.outputs.items():
                    assert mine.outputs[name].tobytes() == values.tobytes()
            assert received_split(channel, "valid", stop=lambda: True) is None
        stream.close()


def test_waiting_for_a_server_ends_when_a_stop_is_asked_for(tmp_path) -> None:
    begun = time.monotonic()
    with pytest.raises(StoreError, match="before a stop"):
        open_channel(tmp_path / "stream.json", stop=lambda: time.monotonic() > begun + 0.2)
    assert time.monotonic() < begun + 60


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ({"channel": "tcp"}, "neither 'tail' nor 'stream'"),
        ({"channel": "stream", "mode": "replay", "arrivals": "x.log"}, "needs the files"),
        ({"channel": "a/stream.json", "buffer": {"kind": "replay"}}, "needs the files"),
    ],
)
def test_what_cannot_be_is_said_at_once(words, what) -> None:
    with pytest.raises(ConfigError, match=what):
        TrainSettings(**words)


def test_a_run_follows_its_own_store(tmp_path) -> None:
    case = tmp_path / "case.toml"
    case.write_text(CASE.replace('"stream"', '"other/stream.json"'))
    done = simlab("run", case, "--out", tmp_path / "run")
    assert done.returncode == 2
    assert "use `simlab train`" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_server_whose_run_is_gone_ends_when_nobody_asks(tmp_path, monkeypatch) -> None:
    SnapshotStore.create(tmp_path / "store", bare_schema(), n=3, seed=977)
    parents = iter([4711, 4711])
    monkeypatch.setattr(os, "getppid", lambda: next(parents, 1))
    monkeypatch.setattr(store_commands, "_ORPHAN_SECONDS", 0.3)
    begun = time.monotonic()
    store_commands.serve(tmp_path / "store", None, None, True)
    assert time.monotonic() > begun + 0.3
    parents = iter([4711])
    with pytest.raises(typer.Exit):  # the store was never made
        store_commands.serve(tmp_path / "none", None, None, True)
