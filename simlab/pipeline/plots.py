"""The figures of a run, each with the numbers behind it.

:func:`save_figures` draws everything a run directory has data for:

    figures/NAME.png     the picture
    figures/NAME.csv     numbers behind curves; NAME.npz and NAME.json those behind pictures
    figures/index.json   title, caption and files of each figure, in the order of the report

What a run has no data for is left out; what cannot be drawn is named in the index, with the reason.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import struct
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from simlab.core.errors import SimlabError
from simlab.core.metrics import summary
from simlab.core.runs import publish
from simlab.core.samples import Trajectory
from simlab.core.surrogate import Surrogate
from simlab.pipeline.curves import (
    along_chains,
    buffer_curves,
    calibration_plot,
    error_distribution,
    error_histogram,
    error_in_time,
    iterations_histogram,
    loss_curve,
    progress_curve,
    read_metrics,
    residual_histogram,
    series,
    throughput_curves,
    validation_curve,
)
from simlab.pipeline.evaluate import Evaluation
from simlab.pipeline.pictures import Comparison, can_show, gallery, new_axes, panels, show, views
from simlab.store.store import SnapshotStore

__all__ = [
    "Comparison",
    "along_chains",
    "buffer_curves",
    "calibration_plot",
    "error_distribution",
    "error_histogram",
    "error_in_time",
    "gallery",
    "iterations_histogram",
    "loss_curve",
    "panels",
    "progress_curve",
    "read_metrics",
    "residual_histogram",
    "save_figures",
    "show",
    "throughput_curves",
    "validation_curve",
]

log = logging.getLogger("simlab.plots")
_DPI = 150
_N_GALLERY = 6


def save_figures(
    run_dir: str | Path,
    *,
    store: SnapshotStore | None = None,
    surrogate: Surrogate | None = None,
    evaluation: Evaluation | None = None,
) -> list[Path]:
    """Draw the figures of a run into its ``figures`` folder.

    Parameters
    ----------
    run_dir : str or Path
    store, surrogate, evaluation : optional
        Read from the run directory where not given and where it has them.

    Returns
    -------
    list of Path
        The PNG files, in the order of the report.
    """
    run = Path(run_dir)
    album = _Album(run / "figures")
    if store is None and (run / "store").is_dir():
        store = album.attempt("data", lambda: SnapshotStore.open(run / "store"))
    if evaluation is None and (run / "evaluation.json").is_file():
        evaluation = album.attempt("evaluation", lambda: Evaluation.read(run / "evaluation.json"))
    if surrogate is None and evaluation is not None and (run / "model" / "model.json").is_file():
        surrogate = album.attempt("model", lambda: _load_surrogate(run / "model"))
    metrics = read_metrics(run / "metrics.jsonl")
    if store is not None:
        data = store
        album.attempt("samples", lambda: _samples(album, data))
        if evaluation is not None and surrogate is not None:
            found, model = evaluation, surrogate
            album.attempt("predictions", lambda: _predictions(album, data, found, model))
    if evaluation is not None:
        found = evaluation
        album.attempt("errors", lambda: _errors(album, found))
    album.attempt("training", lambda: _training(album, metrics))
    album.attempt("throughput", lambda: _throughput(album, metrics))
    if store is not None:
        data = store
        album.attempt("solver", lambda: _solver(album, data))
        album.attempt("chains", lambda: _chains(album, data))
    return album.close()


class _Album:
    """Figures being made: files written as they come, the index at the end."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._entries: list[dict[str, Any]] = []
        self._problems: list[dict[str, str]] = []

    def attempt(self, name: str, work: Callable[[], Any]) -> Any:
        """Return what the work returns; a fault of the data is noted and gives ``None``."""
        try:
            return work()
        except (SimlabError, OSError) as error:
            log.warning("no figure of the %s: %s", name, error)
            self._problems.append({"name": name, "reason": str(error)})
            return None

    def add(
        self,
        name: str,
        axes: np.ndarray,
        title: str,
        caption: str,
        section: str,
        *,
        columns: Mapping[str, Iterable[Any]] | None = None,
        facts: Mapping[str, Any] | None = None,
        arrays: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Save a figure and its numbers: columns as CSV, facts as JSON, arrays as NPZ."""
        figure = axes.flat[0].figure
        picture = io.BytesIO()
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # laid out: not once more for each pass of savefig
        figure.savefig(picture, dpi=_DPI, format="png", facecolor="white", bbox_inches="tight")
        numbers = []
        if columns is not None:
            numbers.append(f"{name}.csv")
            publish(self._folder / numbers[-1], _csv(columns))
        if facts is not None:
            numbers.append(f"{name}.json")
            publish(self._folder / numbers[-1], json.dumps(facts, indent=1))
        if arrays is not None:
            numbers.append(f"{name}.npz")
            packed: dict[str, Any] = {key: value.astype("f4") for key, value in arrays.items()}
            np.savez_compressed(self._folder / numbers[-1], **packed)
        (self._folder / f"{name}.png").write_bytes(picture.getvalue())
        width, height = struct.unpack(">II", picture.getvalue()[16:24])  # PNG's own header
        self._entries.append(
            {
                "name": name,
                "section": section,
                "file": f"{name}.png",
                "title": title,
                "caption": caption,
                "numbers": numbers,
                "size": [width, height],
            }
        )

    def close(self) -> list[Path]:
        index = {"figures": self._entries, "problems": self._problems}
        publish(self._folder / "index.json", json.dumps(index, indent=1))
        return [self._folder / entry["file"] for entry in self._entries]


def _csv(columns: Mapping[str, Iterable[Any]]) -> str:
    """Write columns of possibly different lengths as CSV."""
    lists = [list(values) for values in columns.values()]
    length = max(map(len, lists), default=0)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for k in range(length):
        writer.writerow([values[k] if k < len(values) else "" for values in lists])
    return text.getvalue()


def _samples(album: _Album, store: SnapshotStore) -> None:
    schema = store.schema
    split = next((name for name in ("train", "valid", "test") if len(store.split(name))), None)
    if split is None or not any(can_show(schema, spec) for spec in schema.fields):
        return
    few = list(islice(store.split(split), _N_GALLERY))
    arrays = {
        f"input_{k}_{name}": v for k, t in enumerate(few) for name, v in t.sample.fields.items()
    }
    arrays |= {f"output_{k}_{name}": v for k, t in enumerate(few) for name, v in t.outputs.items()}
    where = {1: "", 2: "", 3: ", each at its middle slice normal to the last axis"}[schema.n_dims]
    album.add(
        "samples",
        gallery(few, schema),
        "What the data look like",
        f"The first {len(few)} samples of the {split} split: inputs, then what was solved "
        f"for{where}.",
        "data",
        facts={"split": split, "samples": [t.sample.index for t in few], "times": schema.times},
        arrays=arrays,
    )


def _predictions(
    album: _Album, store: SnapshotStore, evaluation: Evaluation, surrogate: Surrogate
) -> None:
    schema = store.schema
    for name, item in evaluation.fields.items():
        ranks = item.ranked()
        wanted = {int(evaluation.indices[k]): k for k in ranks.values()}
        split = store.split("test")
        places = np.flatnonzero(np.isin(split.ids, list(wanted))).tolist()
        found = {int(split.ids[k]): split[k] for k in places}
        if len(found) < len(wanted):
            missing = sorted(set(wanted) - set(found))
            raise SimlabError(f"evaluation.json names test samples {missing} the store has not")
        groups = (
            [["best", "median", "worst"]] if len(views(schema)) == 1 else [["median"], ["worst"]]
        )
        for group in groups:
            rows = [
                _comparison(label, ranks[label], found, evaluation, name, surrogate)
                for label in group
            ]
            arrays = {}
            for label, row in zip(group, rows, strict=True):
                arrays[f"{label}_truth"] = row.trajectory.outputs[name]
                arrays[f"{label}_prediction"] = row.prediction[name]
                arrays |= {f"{label}_{key}": v for key, v in row.trajectory.sample.fields.items()}
            which = "best, median and worst" if len(group) > 1 else group[0]
            album.add(
                f"prediction_{name}" + ("" if len(group) > 1 else f"_{group[0]}"),
                panels(rows, schema, name),
                f"{name}: truth and prediction, {which} test sample{'s' * (len(group) > 1)}",
                "Truth and prediction share one colour scale; the error, prediction minus truth, "
                "has its own. Percentages are relative L2 errors of the whole sample.",
                "surrogate",
                facts={
                    label: {
                        "sample": row.trajectory.sample.index,
                        "rel_l2": float(item.errors[ranks[label]]),
                        "rms": float(item.rms[ranks[label]]),
                    }
                    for label, row in zip(group, rows, strict=True)
                },
                arrays=arrays,
            )


def _comparison(
    label: str,
    place: int,
    found: Mapping[int, Trajectory],
    evaluation: Evaluation,
    name: str,
    surrogate: Surrogate,
) -> Comparison:
    trajectory = found[int(evaluation.indices[place])]
    prediction = {key: v[0] for key, v in surrogate.predict([trajectory.sample]).items()}
    error = evaluation.fields[name].errors[place]
    return Comparison(
        f"{label}: #{trajectory.sample.index}\n{100 * error:.3g} %", trajectory, prediction
    )


def _errors(album: _Album, evaluation: Evaluation) -> None:
    errors = {name: item.errors for name, item in evaluation.fields.items()}
    baseline = {
        name: item.baseline for name, item in evaluation.fields.items() if item.baseline is not None
    }
    estimates, largest = evaluation.estimates, evaluation.worst_field_errors()
    is_trusting = bool((np.isfinite(estimates) & np.isfinite(largest)).any())
    in_time = len(evaluation.times) > 1
    shape = {2: (1, 2), 3: (1, 3), 4: (2, 2)}[2 + is_trusting + in_time]
    axes = new_axes(*shape, (4.1, 3.2))
    places = iter(axes.flat)
    error_histogram(errors, next(places))
    error_distribution(errors, baseline, next(places))
    texts = [
        f"Relative L2 errors of {evaluation.n_test} test samples: histogram and cumulative share "
        "(dots: median, 95 and 99 %"
        + ("; dashed: predicting the mean output)." if baseline else ").")
    ]
    if in_time:
        error_in_time(evaluation, next(places))
        texts.append("Error at each stored time.")
    if is_trusting:
        calibration_plot(estimates, largest, next(places))
        texts.append("Estimated against actual error: points below the line were covered.")
    columns: dict[str, Iterable[Any]] = {"sample": evaluation.indices, "estimate": estimates}
    for name, item in evaluation.fields.items():
        columns |= {f"{name}_rel_l2": item.errors, f"{name}_rms": item.rms}
        if item.baseline is not None:
            columns[f"{name}_baseline"] = item.baseline
    per_time = {
        name: [summary(column) for column in item.per_time.T]
        for name, item in evaluation.fields.items()
    }
    album.add(
        "errors",
        axes,
        "How large the errors are, and whether the model knows",
        " ".join(texts),
        "surrogate",
        columns=columns,
        facts={"times": evaluation.times.tolist(), "per_time": _finite(per_time)},
    )


def _training(album: _Album, metrics: list[dict[str, Any]]) -> None:
    losses = series(metrics, "train", "batch", "seconds", "loss", "learning_rate")
    checks = series(
        metrics,
        "validation",
        "batch",
        "seconds",
        *(f"rel_l2.{k}" for k in ("median", "p95", "max")),
    )
    drawn = [
        curve for rows, curve in ((losses, loss_curve), (checks, validation_curve)) if len(rows)
    ]
    if not drawn:
        return
    axes = new_axes(1, len(drawn), (5.2, 3.2))
    for curve, axis in zip(drawn, axes[0], strict=True):
        curve(metrics, axis)
    columns = dict(zip(("batch", "seconds", "loss", "learning_rate"), losses.T, strict=True))
    names = ("check_batch", "check_seconds", "median", "p95", "max")
    columns |= dict(zip(names, checks.T, strict=True))
    album.add(
        "training",
        axes,
        "Training",
        "Loss on the training batches (thin) with its running median, and relative L2 error on "
        "the validation samples, which are never trained on.",
        "training",
        columns=columns,
    )


def _throughput(album: _Album, metrics: list[dict[str, Any]]) -> None:
    keys = ("seconds", "samples_per_s", "buffer.unseen", "buffer.seen")
    solved = series(metrics, "campaign", "seconds", "done", "failed", "samples_per_s")
    trained = series(metrics, "train", *keys)
    drawn, texts = [], []
    if len(solved):
        drawn.append(progress_curve)
        texts.append("Samples solved;")
    if np.isfinite(np.concatenate([solved[:, 3], trained[:, 1]])).any():
        drawn.append(throughput_curves)
        texts.append(
            "samples per second solved and trained on (a sample is trained on many times);"
        )
    if np.isfinite(trained[:, 2:]).any():
        drawn.append(buffer_curves)
        texts.append("samples waiting in the training buffer;")
    if not drawn:
        return
    axes = new_axes(1, len(drawn), (4.1, 3.0))
    for curve, axis in zip(drawn, axes[0], strict=True):
        curve(metrics, axis)
    columns = dict(zip(("seconds", "done", "failed", "solved_per_s"), solved.T, strict=True))
    names = ("train_seconds", "trained_per_s", "buffer_unseen", "buffer_seen")
    columns |= dict(zip(names, trained.T, strict=True))
    caption = " ".join(texts).rstrip(";") + ", over wall time."
    text = caption[0].upper() + caption[1:]
    album.add("throughput", axes, "Throughput", text, "time", columns=columns)


def _solver(album: _Album, store: SnapshotStore) -> None:
    found = store.solves()
    iterations, residuals = found["iterations"], found["true_relres"]
    known = residuals[np.isfinite(residuals)]
    drawn, texts = [], []
    if np.any(iterations > 0):  # a direct solver has none
        drawn.append(partial(iterations_histogram, iterations[iterations >= 0]))
        texts.append("iterations")
    if known.size:
        drawn.append(partial(residual_histogram, known, _tolerance(store)))
        texts.append(
            "true relative residuals ||b - Ax|| / ||b||, recomputed after each solve, beside the "
            "tolerance"
        )
    if not drawn:
        return
    axes = new_axes(1, len(drawn), (5.2, 2.9))
    for draw, axis in zip(drawn, axes[0], strict=True):
        draw(axis=axis)
    album.add(
        "solver",
        axes,
        "The solves",
        f"Of {len(found):,} solves: {' and '.join(texts)}.",
        "solver",
        columns={
            "sample": found["index"],
            "step": found["step"],
            "iterations": iterations,
            "true_relres": residuals,
        },
    )


def _chains(album: _Album, store: SnapshotStore) -> None:
    """Draw what the samples took in the order they were solved in, where that says anything."""
    found = store.solves()
    found = found[(found["order"] >= 0) & (found["iterations"] >= 0)]
    if len(np.unique(found["iterations"])) < 2:
        return
    _, first, sample = np.unique(found["index"], return_index=True, return_inverse=True)
    n_steps = np.bincount(sample)
    order, chain = found["order"][first], found["chain"][first]
    iterations = np.bincount(sample, found["iterations"]) / n_steps
    seconds = np.bincount(sample, found["seconds"]) / n_steps
    axes = new_axes(1, 2, (5.2, 2.9))
    along_chains(order, chain, iterations, "iterations per solve", axes[0, 0])
    along_chains(order, chain, 1e3 * seconds, "CPU ms per solve", axes[0, 1])
    solvers = np.unique(found["solver"]).tolist()
    album.add(
        "chains",
        axes,
        "Iterations along the chain",
        f"What each of {len(first):,} samples took, in the order they were solved in"
        f"{f', by {solvers[0]}' if len(solvers) == 1 and solvers[0] else ''}.",
        "solver",
        columns={
            "sample": found["index"][first],
            "order": order,
            "chain": chain,
            "iterations": iterations,
            "cpu_seconds": seconds,
            "solver": found["solver"][first],
        },
    )


def _tolerance(store: SnapshotStore) -> float | None:
    solver = store.config.get("solver")
    return solver.get("rtol") if isinstance(solver, Mapping) else None


def _load_surrogate(path: Path) -> Surrogate:
    from simlab.learn.surrogate import NeuralSurrogate

    return NeuralSurrogate.load(path)


def _finite(value: Any) -> Any:
    """Replace what strict JSON cannot hold by ``None``."""
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return value if not isinstance(value, float) or np.isfinite(value) else None
