"""The live page: a browser sees what the run directory holds, while the run goes on and after."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
import urllib.error
import urllib.request
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import look_at, picture_of
from commands import CASES, ROOT, command, environment

from simlab.core.runs import RunDirectory
from simlab.core.samples import Sample, Trajectory
from simlab.learn import checkpoints
from simlab.learn.settings import TrainSettings
from simlab.learn.stream import MemoryStream
from simlab.learn.trainer import Trainer
from simlab.pipeline.watch import Watcher, newest_model
from simlab.store.schema import Axis, FieldSpec, Schema

SMALL = [
    "--set", "family.cells=24", "--set", "campaign.n=200", "--set", "solver=fast",
    "--set", "train.n_batches=400", "--set", "train.operator.modes=6",
    "--set", "train.buffer.threshold=16", "--set", "train.checkpoint_seconds=1",
    "--set", "train.validate_every=20", "--set", "train.log_every=5",
]  # fmt: skip


def begun(*words: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(list(map(str, words))),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def fetched(url: str, **headers: str) -> bytes:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as found:
        return found.read()


def data(address: str, start: int = 0) -> dict:
    return json.loads(fetched(f"{address}data?from={start}"))


def wait_until(claim, timeout: float = 150):
    end = time.monotonic() + timeout
    while not (found := claim()):
        assert time.monotonic() < end, "nothing came of it"
        time.sleep(0.1)
    return found


def metrics(out: Path) -> list[dict]:
    path = out / "metrics.jsonl"
    whole = path.read_text().rpartition("\n")[0] if path.exists() else ""
    return [json.loads(line) for line in whole.splitlines()]


def shown(dom: str, name: str) -> str:
    """Return the value of one card of the page."""
    found = re.search(rf'data-name="{name}[^"]*"><b>(.*?)</b>', dom)
    assert found, dom[-3000:]
    return unescape(found[1])


def n_points(dom: str, chart: str) -> int:
    found = re.search(rf'<section id="{chart}" data-points="(\d+)"', dom)
    assert found, chart
    return int(found[1])


def test_a_browser_follows_a_run_to_its_end(tmp_path) -> None:
    out = tmp_path / "run"
    patience = ("--patience", "900")  # a stopped trainer is not to be taken for a hung one
    run = begun("run", CASES / "darcy_online.toml", "--out", out, *patience, *SMALL)
    page = None
    try:
        wait_until(lambda: any(line["kind"] == "validation" for line in metrics(out)))
        wait_until(lambda: newest_model(RunDirectory(out)))
        trainer = RunDirectory(out).manifest()["processes"]["trainer"]["pid"]
        os.kill(trainer, signal.SIGSTOP)  # however slow the browser is, it sees a run under way
        page = begun("watch", out)
        address = re.search(r"http://\S+/", page.stdout.readline())[0]
        wait_until(lambda: data(address)["pictures"]["version"])
        dom = look_at(address, tmp_path / "running.png", width=1300, height=1500)
        os.kill(trainer, signal.SIGCONT)
        lines = metrics(out)
        done, n = map(int, shown(dom, "samples solved").split(" / "))
        batch, n_batches = map(int, shown(dom, "batches").split(" / "))
        assert (n, n_batches) == (200, 400)
        assert done in [line["done"] for line in lines if line["kind"] == "campaign"]
        assert batch in [line["batch"] for line in lines if line["kind"] == "train"]
        assert 0 < batch < n_batches
        assert shown(dom, "restarts") == "0"
        for chart in ("solved", "throughput", "buffer", "ages", "loss", "validation"):
            assert n_points(dom, chart) > 0, chart
        assert re.search(r'data-size="\d{3,}x\d{3,}"', dom), "the picture did not load"
        assert re.search(r"batch \d+; of 16 samples of the valid split", dom)
        assert picture_of(tmp_path / "running.png").std() > 10  # not blank

        assert run.wait(timeout=240) == 0
        wait_until(lambda: data(address)["pictures"]["text"].startswith("finished model"))
        dom = look_at(address, tmp_path / "done.png", width=1300, height=1500)
        assert shown(dom, "samples solved") == "200 / 200"
        assert shown(dom, "batches") == "400 / 400"
        assert re.search(r'class="state done"[^>]*>done<', dom)
        last = json.loads((out / "model" / "model.json").read_text())["validation"]
        quantile = float(shown(dom, "validation error, median").removesuffix(" %"))
        assert quantile == pytest.approx(100 * last["median"], rel=1e-2)
        page.send_signal(signal.SIGINT)
        assert page.wait(timeout=30) == 0
    finally:
        for process in (run, page):
            if process is not None and process.poll() is None:
                process.send_signal(signal.SIGINT)
                process.wait(timeout=90)


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    case = {"title": "a <b>title</b>", "campaign": {"n": 7}, "train": {"n_batches": 9}}
    return RunDirectory.start(tmp_path / "run", case, resume=False)


@pytest.fixture
def served(run):
    from threading import Thread

    from simlab.pipeline.watch import server

    serving = server(Watcher(run, picture_seconds=0.05))
    Thread(target=serving.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{serving.server_port}/"
    serving.shutdown()
    serving.server_close()


def test_metrics_come_once_and_whole(run, served) -> None:
    found = data(served)
    assert (found["metrics"], found["position"], found["n_samples"]) == ([], 0, 7)
    run.log_metric("campaign", done=1, rate=float("nan"))
    found = data(served)
    assert [line["done"] for line in found["metrics"]] == [1]
    assert found["metrics"][0]["rate"] is None  # strict JSON
    position = found["position"]
    run.log_metric("campaign", done=2)
    with run.metrics.open("a") as file:
        file.write('{"kind": "camp')  # a writer at work
    found = data(served, position)
    assert [line["done"] for line in found["metrics"]] == [2]
    assert data(served, found["position"])["metrics"] == []
    run.metrics.write_text('{"kind": "campaign", "done": 3}\n')  # the run began afresh
    found = data(served, position)
    assert (found["from"], [line["done"] for line in found["metrics"]]) == (0, [3])


def test_restarts_and_states_are_those_of_the_manifest(run, served) -> None:
    entry = {"side": "trainer", "number": 1, "reason": "signal SIGKILL", "wait_s": 0.5, "time": 5.0}
    run.update(restarts=[entry], train={"state": "failed", "error": "StoreError: full"})
    found = data(served)
    assert found["restarts"] == [entry]
    assert (found["state"], found["train"]["error"]) == ("failed", "StoreError: full")
    assert found["pictures"]["fields"] == []


@pytest.mark.parametrize(
    ("path", "headers", "code"),
    [
        ("nothing", {}, 404),
        ("picture/u", {}, 404),
        ("../../etc/passwd", {}, 404),
        ("data", {"Host": "elsewhere.example"}, 403),
        ("data?from=-5", {}, 200),
        ("", {}, 200),
    ],
)
def test_only_the_page_and_only_for_this_machine(served, path, headers, code) -> None:
    try:
        fetched(served + path, **headers)
        found = 200
    except urllib.error.HTTPError as error:
        found = error.code
    assert found == code


def test_the_page_asks_for_nothing_from_elsewhere(served) -> None:
    text = fetched(served).decode()
    assert "<title>simlab watch</title>" in text
    allowed = "http://www.w3.org/2000/svg"
    assert not re.findall(r"(?:https?:)?//[a-z][\w.-]+\.\w+", text.replace(allowed, ""))


def test_the_newest_weights(run) -> None:
    assert newest_model(run) is None
    for batch in (20, 400):
        folder = run.model / "checkpoints" / f"batch-{batch:08d}"
        folder.mkdir(parents=True)
        if batch == 20:
            (folder / "COMMIT").touch()
    assert newest_model(run).label == "batch 20"  # that of 400 is not committed
    (run.model / "model.json").write_text("{}")
    assert newest_model(run).label == "batch 20"  # of an earlier training, or being written
    run.update(train={"state": "done"})
    assert newest_model(run).label == "finished model"


def test_the_newest_weights_are_the_averaged_ones(run) -> None:
    settings = TrainSettings(
        operator={"kind": "mlp", "hidden": [8]}, n_batches=40, batch=4, ema=0.9, pilot=4
    )
    stream = MemoryStream(toy_trajectories(), toy_schema(), 5)
    trainer = Trainer(settings, toy_schema(), run.model)
    trainer.run(stream, stop=lambda: trainer.batch >= 12)
    state = checkpoints.newest(run.model / "checkpoints")
    made = list(newest_model(run).load().network.parameters())
    names = [name for name, _ in trainer.model.network.named_parameters()]
    assert len(made) == len(names) > 0
    for name, tensor, average in zip(names, made, state["average"], strict=True):
        assert torch.equal(tensor, average)
        assert not torch.equal(tensor, state["network"][name])


def toy_schema() -> Schema:
    return Schema("toy", (Axis("x", (0.25, 0.75)),), (FieldSpec("u"),), parameters={"mu": "1"})


def toy_trajectories() -> list[Trajectory]:
    return [
        Trajectory(Sample(k, 5, {"mu": float(k)}), np.zeros(1), {"u": np.full((1, 2), k, "f4")})
        for k in range(12)
    ]


def test_watching_what_is_no_run_is_one_line(tmp_path) -> None:
    process = begun("watch", tmp_path)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "is not a run directory" in errors
    assert not Path(tmp_path / "metrics.jsonl").exists()
