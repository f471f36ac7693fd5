"""The report of a run: whole, failed, running, data only; read as text and seen in a browser."""

import html
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tomli_w
from browser import find_browser, measure, screenshot

from simlab.core.errors import StoreError
from simlab.core.reports import Provenance
from simlab.core.samples import Sample
from simlab.pipeline.evaluate import evaluate
from simlab.pipeline.plots import save_figures
from simlab.pipeline.report import write_report
from simlab.pipeline.snippets import snippets
from simlab.store.schema import Axis, Boundary, FieldSpec, Schema
from simlab.store.store import SnapshotStore

SEED = 55837
N = 60
EVIL = "<script>alert('x')</script> & \"quoted\""


class Blurred:
    """A surrogate with an error known to the test: the truth, plus some of the coefficient."""

    def __init__(self, truths):
        self.truths = truths

    def fit(self, samples):
        return self

    def predict(self, samples):
        made = [
            self.truths[s.index] + 0.02 * (s.index % 7) * s.fields["permeability"][None]
            for s in samples
        ]
        return {"pressure": np.stack(made).astype(np.float32)}

    def estimate(self, samples):
        return np.array([0.004 * (1 + s.index % 7) for s in samples])

    def save(self, directory):
        raise NotImplementedError


def smooth(rng, n):
    """Return a smooth random field on n x n cells."""
    k = np.fft.fftfreq(n) * n
    decay = (9.0 + k[:, None] ** 2 + k[None, :] ** 2) ** -1.5
    field = np.fft.ifft2(np.fft.fft2(rng.normal(size=(n, n))) * decay).real
    return field / field.std()


def make_store(path, n_cells=24, times=(0.0,)):
    points = tuple((np.arange(n_cells) + 0.5) / n_cells)
    schema = Schema(
        "darcy",
        (Axis("x", points, "m"), Axis("y", points, "m")),
        (
            FieldSpec("permeability", "input", units="m^2"),
            FieldSpec("pressure", units="Pa"),
        ),
        times=times,
        parameters={"inflow": "m s^-1"},
        boundaries=(Boundary("x"), Boundary("y")),
    )
    config = {"family": {"kind": "darcy"}, "solver": {"kind": "auto", "rtol": 1e-8}}
    store = SnapshotStore.create(path, schema, n=N, seed=SEED, config=config)
    with store.writer() as writer:
        for i in range(N):
            rng = np.random.default_rng([SEED, i])
            field = np.exp(smooth(rng, n_cells))
            writer.begin(Sample(i, SEED, {"inflow": 0.5 + i / N}, {"permeability": field}))
            if i == 13:
                writer.fail(i, f"stagnated {EVIL}")
                continue
            pressure = smooth(rng, n_cells)
            for step, time in enumerate(times):
                writer.append(
                    i, step, time, {"pressure": pressure * (1 + step)},
                    solve=Provenance(
                        order=(i * 7) % N, chain=i % 3, iterations=20 + i % 9,
                        operator_applies=21 + i % 9, pc_applies=21 + i % 9,
                        true_relres=10.0 ** -(8.1 + i % 3), seconds=0.01, solver="cg+icc",
                    ),
                )  # fmt: skip
            writer.finish(i)
    store.seal(final=True)
    return store


def metrics():
    rng = np.random.default_rng(SEED)
    for k in range(0, 400, 10):
        decay = float(np.exp(-k / 120))
        yield {
            "kind": "train", "batch": k, "seconds": 5 + 0.1 * k, "learning_rate": 4e-3,
            "loss": 0.5 * decay + 0.02 * (1 + 0.2 * float(rng.random())), "samples_per_s": 410.0,
            "buffer": {"unseen": 4, "seen": min(k, 48), "put": k, "got": 16 * k},
            "train_s": 0.1 * k, "wait_s": 0.01 * k, "threads": 1,
        }  # fmt: skip
        if k % 50 == 0:
            rel = {"mean": 0.4, "median": 0.35, "p95": 0.6, "p99": 0.7, "max": 0.8}
            scaled = {name: value * decay + 0.01 for name, value in rel.items()}
            yield {"kind": "validation", "batch": k, "seconds": 5 + 0.1 * k, "rel_l2": scaled}
    for k in range(30):
        yield {
            "kind": "campaign", "seconds": 1.0 + k, "done": 2 * k + 1, "failed": int(k > 6),
            "total": N, "bytes": 40000 * k, "samples_per_s": 2.0,
        }  # fmt: skip


def manifest(**changes):
    return {
        "simlab": "0.1.0",
        "commit": "abc1234",
        "created": "2025-11-23T12:00:00+0000",
        "started": 1.76e9,
        "command": ["simlab", "run", "cases/darcy online.toml", "-n", "2"],
        "host": "bench01",
        "ranks": 2,
        "seed": SEED,
        "versions": {"python": "3.11.2", "numpy": "2.4.0", "petsc4py": "3.18.5"},
        "state": "done",
        "case": {
            "title": "Darcy flow, learned online",
            "family": {"kind": "darcy", "cells": 24, "note": EVIL},
            "solver": {"kind": "auto", "rtol": 1e-8},
            "campaign": {"n": N, "seed": SEED, "split": [0.8, 0.1, 0.1]},
            "train": {"operator": {"kind": "fno", "modes": 12}, "batch": 16},
        },
        "seconds": {"campaign": 31.0, "train": 45.0, "evaluate": 0.8},
        "campaign": {
            "state": "done", "n": N, "done": N - 1, "failed": 1, "solver": "cg+hypre",
            "reason": "cg+hypre: quickest of three in a pilot on 3 systems",
            "pilot": [
                {
                    "solver": name, "settings": {"kind": "ksp", "rtol": 1e-8}, "cpu_ms": cpu,
                    "iterations": iterations, "true_relres": residual, "verdict": verdict,
                }
                for name, cpu, iterations, residual, verdict in (
                    ("cg+hypre", [12.9, 11.2, 11.1], 9, 3.1e-9, ""),
                    ("cholesky", [61.5, 34.05], 1, 1e-14, "3.0 x slower in round 2"),
                    ("cg+icc", [20.1], None, None, f"breakdown {EVIL}"),
                )
            ],
            "core_hours": 0.017, "samples_per_core_hour": 3470.6, "iterations_mean": 24.0,
            "operator_applies_mean": 25.0, "pc_applies_mean": 24.0, "worst_true_relres": 7.9e-9,
            "bytes": 271000, "cpu_seconds": {"solve": 20.0},
            "seconds": {"draw": 1.0, "assemble": 8.0, "solve": 44.0, "observe": 2.0, "write": 1.2},
            "failures": [{"index": 13, "reason": f"stagnated {EVIL}"}],
        },
        "train": {"state": "done", "batches": 400, "parameters": 287425},
    } | changes  # fmt: skip


def fill(run, found, *, with_metrics=True):
    run.mkdir(exist_ok=True)
    (run / "manifest.json").write_text(json.dumps(found))
    (run / "case.toml").write_text(tomli_w.dumps(found.get("case", {})))
    if with_metrics:
        lines = [json.dumps(line) for line in metrics()]
        (run / "metrics.jsonl").write_text("\n".join(lines) + '\n{"kind": "tra')


def evaluated(run, store):
    truths = {
        t.sample.index: t.outputs["pressure"] for s in store.fractions for t in store.split(s)
    }
    surrogate = Blurred(truths)
    found = evaluate(surrogate, store.split("test"), baseline=store.split("train"))
    found.write(run / "evaluation.json")
    return surrogate


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished online run with store, model, evaluation, figures and report."""
    from simlab.learn.operators import FNO
    from simlab.learn.settings import TrainSettings
    from simlab.learn.surrogate import NeuralSurrogate

    run = tmp_path_factory.mktemp("runs") / "darcy_online"
    fill(run, manifest())
    store = make_store(run / "store")
    surrogate = evaluated(run, store)
    train = TrainSettings(n_batches=3, batch=4)
    NeuralSurrogate(FNO(modes=3, width=4, layers=1), train).fit(store.split("train")).save(
        run / "model"
    )
    figures = save_figures(run, surrogate=surrogate)
    return {"run": run, "store": store, "figures": figures, "page": write_report(run)}


def visible(page):
    """Return the page's text as a reader sees it."""
    body = re.sub(r"<style>.*?</style>", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", body)).split())


def test_a_whole_run_has_all_its_figures_each_with_its_numbers(whole):
    names = [path.name for path in whole["figures"]]
    assert names == [
        "samples.png",
        "prediction_pressure.png",
        "errors.png",
        "training.png",
        "throughput.png",
        "solver.png",
        "chains.png",
    ]
    folder = whole["run"] / "figures"
    index = json.loads((folder / "index.json").read_text())
    assert index["problems"] == []
    for entry in index["figures"]:
        assert (folder / entry["file"]).read_bytes()[:4] == b"\x89PNG"
        assert entry["numbers"]
        assert all((folder / name).stat().st_size for name in entry["numbers"])
    assert not list(folder.glob("*.part"))


def test_the_numbers_beside_a_figure_are_those_of_the_data(whole):
    folder, store = whole["run"] / "figures", whole["store"]
    rows = (folder / "solver.csv").read_text().splitlines()
    assert rows[0] == "sample,step,iterations,true_relres"
    assert len(rows) == N  # one failed sample, one header
    sample, _, iterations, residual = rows[20].split(",")
    assert int(iterations) == 20 + int(sample) % 9
    assert float(residual) == pytest.approx(10.0 ** -(8.1 + int(sample) % 3), rel=1e-12)
    rows = (folder / "chains.csv").read_text().splitlines()
    assert rows[0] == "sample,order,chain,iterations,cpu_seconds,solver"
    assert len(rows) == N
    sample, order, chain, iterations, seconds, solver = rows[20].split(",")
    assert (int(order), int(chain)) == ((int(sample) * 7) % N, int(sample) % 3)
    assert (float(iterations), float(seconds)) == (20 + int(sample) % 9, 0.01)
    assert solver == "cg+icc"
    told = json.loads((folder / "prediction_pressure.json").read_text())
    worst = next(t for t in store.split("test") if t.sample.index == told["worst"]["sample"])
    arrays = np.load(folder / "prediction_pressure.npz")
    np.testing.assert_array_equal(arrays["worst_truth"], worst.outputs["pressure"])
    difference = arrays["worst_prediction"] - arrays["worst_truth"]
    assert told["worst"]["rel_l2"] == pytest.approx(
        np.linalg.norm(difference) / np.linalg.norm(arrays["worst_truth"]), rel=1e-5
    )


def test_the_page_tells_what_was_run_and_what_came_out(whole):
    text = visible(whole["page"])
    errors = json.loads((whole["run"] / "evaluation.json").read_text())
    mean = 100 * errors["fields"]["pressure"]["rel_l2"]["mean"]
    assert f"{mean:.3g} %" in text
    for words in (
        "Darcy flow, learned online",
        "done",
        "simlab run 'cases/darcy online.toml' -n 2",
        "petsc4py 3.18.5",
        "59 samples solved of 60, 1 failed",
        "3,471 samples per core-hour",
        "cg+hypre 12.9, 11.2, 11.1 9 3.1e-09",
        "3.0 x slower in round 2",
        "Why: cg+hypre: quickest of three in a pilot on 3 systems.",
        "operator.modes 12",
        "mean output",
        "smaller error than predicting the mean output",
        "permeability input m^2",
        "true residual",
        "waiting for data",
        "assemble",
        "13 stagnated",
        "estimate covered the actual error",
    ):
        assert words in text, words
    for name in ("train", "valid", "test"):
        assert f"{name} {len(whole['store'].split(name))}" in text
    values = np.concatenate([s.fields["permeability"].ravel() for s in samples(whole["store"])])
    row = re.search(r"permeability input m\^2 (\S+) (\S+) (\S+) (\S+)", text)
    found = [float(number) for number in row.groups()]
    expected = [values.min(), values.max(), values.mean(), values.std()]
    assert found == pytest.approx(expected, rel=6e-3)


def samples(store):
    return [t.sample for name in store.fractions for t in store.split(name)]


def test_everything_from_the_run_is_escaped(whole):
    source = whole["page"].read_text(encoding="utf-8")
    assert "<script" not in source
    assert "&lt;script&gt;alert" in source
    assert EVIL in visible(whole["page"])


def test_the_page_needs_nothing_else(whole):
    source = whole["page"].read_text(encoding="utf-8")
    links = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)""", source) + re.findall(
        r"url\(([^)]*)\)|@import", source
    )
    assert links
    assert all(link.startswith(("data:", "#")) for link in links), links
    assert source.count("<img") == len(whole["figures"])


def test_the_snippets_on_the_page_run_as_they_are(whole, monkeypatch):
    source = whole["page"].read_text(encoding="utf-8")
    found = re.findall(r'<pre class="snippet" id="snippet-(\w+)"><code>(.*?)</code>', source, re.S)
    codes = {name: html.unescape(code) for name, code in found}
    assert set(codes) == {"data", "well", "model"}
    assert all(len(code.splitlines()) == 5 for code in codes.values())
    n = len(whole["store"].split("train"))
    expected = {
        "data": f"{n} {{'inflow'",
        "well": f"{n} {{'input_fields'",
        "model": "(1, 1, 24, 24)",
    }
    script = "\nprint('----')\n".join(codes[name] for name in expected)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    printed = done.stdout.split("----\n")
    for (name, start), text in zip(expected.items(), printed, strict=True):
        assert text.startswith(start), (name, text)


def test_snippets_name_the_run_as_seen_from_here(whole, monkeypatch):
    monkeypatch.chdir(whole["run"].parent)
    assert "open('darcy_online/store')" in snippets(whole["run"], whole["store"])[0]["code"]


@pytest.mark.parametrize("width", [1280, 420])
def test_a_browser_shows_the_page_whole(whole, width, tmp_path):
    found = measure(whole["page"], width, tmp_path)
    assert found["width"] == width
    assert found["scroll_width"] <= width, found["wide"]
    assert found["wide"] == []
    assert len(found["images"]) == len(whole["figures"])
    assert all(size > 300 for _, size in found["images"]), found["images"]
    assert found["resources"] == []
    assert found["text"] > 3000
    pixels = screenshot(whole["page"], width, found["height"], tmp_path / "page.png")
    thirds = np.array_split(pixels.astype(float), 3)  # nothing blank, from top to bottom
    assert all(part.std() > 10 for part in thirds)
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 500  # pictures, not only text


def test_a_data_only_run_says_that_there_is_no_surrogate(tmp_path):
    found = manifest()
    del found["train"], found["case"]["train"], found["seconds"]["train"]
    run = tmp_path / "data_only"
    fill(run, found)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(line for line in lines if '"campaign"' in line))
    store = make_store(run / "store", n_cells=8, times=(0.0, 0.5, 1.0))
    names = [path.name for path in save_figures(run)]
    assert names == ["samples.png", "throughput.png", "solver.png", "chains.png"]
    text = visible(write_report(run))
    assert "This run made data only" in text
    assert "No trained model in this run." in text
    codes = {item["name"]: item["code"] for item in snippets(run, store)}
    assert set(codes) == {"data", "well"}
    assert "n_steps_output=1" in codes["well"]


def test_time_dependent_predictions_are_shown_in_time(tmp_path):
    run = tmp_path / "heat"
    fill(run, manifest(), with_metrics=False)
    store = make_store(run / "store", n_cells=8, times=(0.0, 0.5, 1.0))
    names = [path.stem for path in save_figures(run, surrogate=evaluated(run, store))]
    assert names[1:3] == ["prediction_pressure_median", "prediction_pressure_worst"]
    told = json.loads((run / "figures" / "errors.json").read_text())
    assert told["times"] == [0.0, 0.5, 1.0]


def test_a_failed_run_shows_its_error_and_what_there_is(tmp_path):
    run = tmp_path / "failed"
    error = {"state": "failed", "error": f"ConvergenceError: 101 samples failed {EVIL}"}
    fill(run, manifest(state="failed", campaign=error, train={}), with_metrics=False)
    save_figures(run)
    text = visible(write_report(run))
    assert text.count("Darcy flow, learned online failed") == 1  # the title, then the state
    assert "Failed while generating data: ConvergenceError: 101 samples failed" in text
    assert "There is no snapshot store" in text
    assert "No data to load yet." in text
    assert "Training has not begun." in text


def test_a_run_that_has_just_begun_gets_a_page(tmp_path):
    run = tmp_path / "begun"
    fill(run, manifest(state="running", campaign={}, train={}, seconds={}), with_metrics=False)
    schema = Schema("toy", (Axis("x", (0.0, 1.0)),), (FieldSpec("u"),))
    SnapshotStore.create(run / "store", schema, n=5, seed=SEED)
    assert save_figures(run) == []
    text = visible(write_report(run))
    assert "This run is running." in text
    assert "5 of 5 are still to come" in text
    assert "No field statistics" in text
    assert "No times are recorded yet." in text


def test_restarts_are_counted_by_side(tmp_path):
    run = tmp_path / "run"
    sides = ("trainer", "solvers", "trainer")
    fill(run, manifest(restarts=[{"side": side} for side in sides]), with_metrics=False)
    assert "trainer 2, solvers 1" in write_report(run).read_text()


def test_an_empty_directory_gets_a_page_that_says_so(tmp_path):
    save_figures(tmp_path)
    text = visible(write_report(tmp_path))
    assert "has no manifest.json" in text
    assert "unknown" in text


def test_damage_is_told_not_hidden(tmp_path):
    run = tmp_path / "damaged"
    fill(run, manifest(), with_metrics=False)
    store = make_store(run / "store", n_cells=8)
    surrogate = evaluated(run, store)
    for shard in (run / "store" / "data").rglob("*.h5"):
        shard.unlink()
        shard.write_bytes(b"not HDF5")
    names = [path.name for path in save_figures(run, surrogate=surrogate)]
    assert names == ["errors.png"]
    (run / "figures" / "errors.png").unlink()
    text = visible(write_report(run))
    assert "No figure of the samples:" in text
    assert "cannot be read" in text
    assert "errors.png is gone" in text
    (run / "evaluation.json").write_text("{")
    assert "Not evaluated yet" in visible(write_report(run))


def test_a_store_that_is_not_one_is_named(tmp_path):
    run = tmp_path / "run"
    fill(run, manifest(), with_metrics=False)
    (run / "store").mkdir()
    save_figures(run)
    assert "has no campaign.json" in visible(write_report(run))
    with pytest.raises(StoreError):
        SnapshotStore.open(run / "store")


def test_readers_never_see_half_a_page(whole, tmp_path, monkeypatch):
    run = tmp_path / "copy"
    shutil.copytree(whole["run"], run)
    before = (run / "report.html").read_bytes()
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        write_report(run)
    assert (run / "report.html").read_bytes() == before


def test_a_missing_browser_skips_here_and_fails_under_ci(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="apt-get install chromium"):
        find_browser()
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="apt-get install chromium"):
        find_browser()
