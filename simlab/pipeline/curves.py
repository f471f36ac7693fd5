"""Curves of a run: training, throughput, the solvers' work, and how errors are spread.

Every function takes data and an optional axis and returns the axis. Figures are made without
pyplot: nothing is shown, nothing stays behind. Pictures of fields are in
:mod:`simlab.pipeline.pictures`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from simlab.core.runs import metric_lines
from simlab.pipeline.evaluate import Evaluation
from simlab.pipeline.pictures import COLOURS, INK, new_axes, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "along_chains",
    "buffer_curves",
    "calibration_plot",
    "error_distribution",
    "error_histogram",
    "error_in_time",
    "iterations_histogram",
    "loss_curve",
    "progress_curve",
    "read_metrics",
    "residual_histogram",
    "series",
    "throughput_curves",
    "validation_curve",
]

Metrics = Sequence[Mapping[str, Any]]


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Read ``metrics.jsonl``; no file gives no lines, a torn line is left out."""
    path = Path(path)
    return metric_lines(path.read_bytes()) if path.is_file() else []


def series(metrics: Metrics, kind: str, *keys: str) -> np.ndarray:
    """Return numbers of the lines of one kind, shape (n_lines, n_keys); NaN where a key is absent.

    A key may name a nested entry: ``"buffer.seen"``.
    """

    def value(entry: Any, key: str) -> float:
        for part in key.split("."):
            entry = entry.get(part) if isinstance(entry, Mapping) else None
        return float(entry) if isinstance(entry, int | float) else np.nan

    rows = [[value(line, key) for key in keys] for line in metrics if line.get("kind") == kind]
    return np.array(rows, dtype=np.float64).reshape(-1, len(keys))


@styled
def loss_curve(metrics: Metrics, axis: Axes | None = None) -> Axes:
    """Draw the training loss over batches, with its running median over 1/40 of the run."""
    axis = _axis(axis)
    batch, loss = series(metrics, "train", "batch", "loss").T
    _log_scale(axis.yaxis, loss)
    width = max(len(loss) // 40, 1)
    if width > 2:
        axis.plot(batch, loss, color=COLOURS[0], alpha=0.3, linewidth=0.8)
        axis.plot(batch, _running_median(loss, width), color=COLOURS[0])
    else:
        axis.plot(batch, loss, color=COLOURS[0])
    return _labels(axis, "batch", "training loss", "Training loss")


@styled
def validation_curve(metrics: Metrics, axis: Axes | None = None) -> Axes:
    """Draw median, p95 and maximum of the validation samples' relative L2 error over batches.

    Of a one-step network these are errors of single steps; the median of its rollouts is drawn too.
    """
    axis = _axis(axis)
    keys = ("median", "p95", "max")
    values = series(metrics, "validation", "batch", *(f"rel_l2.{key}" for key in keys))
    rollout = series(metrics, "validation", "rollout.median")[:, 0]
    is_stepwise = bool(np.isfinite(rollout).any())
    _log_scale(axis.yaxis, np.append(values[:, 1:].ravel(), rollout), percent=True)
    marker = "o" if len(values) < 30 else None
    for k, key in enumerate(keys):
        axis.plot(
            values[:, 0], values[:, k + 1], ("-", "--", ":")[k], color=COLOURS[k],
            label=f"one step: {key}" if is_stepwise else key, marker=marker, markersize=3,
        )  # fmt: skip
    if is_stepwise:
        axis.plot(values[:, 0], rollout, "-.", color=COLOURS[3], label="rollout: median",
                  marker=marker, markersize=3)  # fmt: skip
    axis.legend()
    return _labels(axis, "batch", "relative L2 error", "Validation error")


@styled
def progress_curve(metrics: Metrics, axis: Axes | None = None) -> Axes:
    """Draw solved and failed samples over the seconds since the run began."""
    axis = _axis(axis)
    seconds, done, failed, total = series(
        metrics, "campaign", "seconds", "done", "failed", "total"
    ).T
    axis.plot(seconds, done, color=COLOURS[0], label="solved")
    if np.nanmax(failed, initial=0) > 0:
        axis.plot(seconds, failed, color=COLOURS[1], label="failed")
    if len(total) and np.isfinite(total[-1]):
        axis.axhline(total[-1], color=INK, linewidth=0.8, linestyle=":", label="planned")
    axis.set(xlim=(0, None), ylim=(0, None))
    axis.legend()
    return _labels(axis, "time since start [s]", "samples", "Samples solved")


@styled
def throughput_curves(metrics: Metrics, axis: Axes | None = None) -> Axes:
    """Draw samples per second that the solvers produce and the trainer consumes."""
    axis = _axis(axis)
    drawn = []
    for kind, label, colour in (
        ("campaign", "solvers", COLOURS[0]),
        ("train", "trainer", COLOURS[1]),
    ):
        seconds, rate = series(metrics, kind, "seconds", "samples_per_s").T
        if np.isfinite(rate).any():
            width = max(len(rate) // 40, 1) if kind == "train" else 1
            axis.plot(seconds, _running_median(rate, width), color=colour, label=label)
            drawn.append(rate[np.isfinite(rate)])
    if drawn:
        both = np.concatenate(drawn)
        if both.min() > 0 and both.max() > 20 * both.min():
            _log_scale(axis.yaxis, both)
        else:
            axis.set_ylim(bottom=0)
        axis.legend()
    axis.set_xlim(left=0)
    return _labels(axis, "time since start [s]", "samples per second", "Throughput")


@styled
def buffer_curves(metrics: Metrics, axis: Axes | None = None) -> Axes:
    """Draw how many buffered samples the trainer has seen and not yet seen, over time."""
    axis = _axis(axis)
    seconds, unseen, seen = series(metrics, "train", "seconds", "buffer.unseen", "buffer.seen").T
    order = np.argsort(seconds, kind="stable")
    axis.stackplot(
        seconds[order], np.nan_to_num(unseen[order]), np.nan_to_num(seen[order]),
        labels=["not yet seen", "seen"], colors=[COLOURS[4], COLOURS[5]], alpha=0.85, linewidth=0,
    )  # fmt: skip
    axis.margins(x=0)
    axis.set(xlim=(0, None), ylim=(0, None))
    axis.legend(loc="lower right")
    return _labels(axis, "time since start [s]", "samples in the buffer", "Training buffer")


@styled
def iterations_histogram(iterations: np.ndarray, axis: Axes | None = None) -> Axes:
    """Draw how many iterations the solves took, shape (n_solves,)."""
    axis = _axis(axis)
    values = np.asarray(iterations).ravel()
    low, high = (int(values.min()), int(values.max())) if values.size else (0, 1)
    step = (high - low) // 40 + 1
    axis.hist(
        values, (np.arange(low, high + 2 * step, step) - 0.5).tolist(), color=COLOURS[0], alpha=0.85
    )
    if values.size:
        _mark(axis, {"mean": float(values.mean()), "max": float(high)}, "{:.1f}")
    return _labels(axis, "iterations per solve", "solves", "Solver iterations")


@styled
def along_chains(
    order: np.ndarray,
    chain: np.ndarray,
    values: np.ndarray,
    label: str,
    axis: Axes | None = None,
) -> Axes:
    """Draw what each sample took against its place in the order of solving, a line per chain.

    Where there are many samples, the running median over 1/200 of them lies on top.

    Parameters
    ----------
    order, chain : ndarray of int, shape (n,)
    values : ndarray, shape (n,)
        NaN: not known.
    label : str
        Of the vertical axis.
    """
    axis = _axis(axis)
    numbers = np.unique(chain)
    width = len(order) // 200
    for k, number in enumerate(numbers.tolist()):
        mine = np.flatnonzero(chain == number)
        mine = mine[np.argsort(order[mine], kind="stable")]
        drawn, colour = values[mine], COLOURS[k % len(COLOURS)]
        if width > 2:
            axis.plot(order[mine], drawn, color=colour, alpha=0.3, linewidth=0.8)
            drawn = _running_median(drawn, width)
        axis.plot(
            order[mine], drawn, color=colour, label=f"chain {number}", linewidth=1.2,
            marker="o" if len(mine) < 40 else None, markersize=3,
        )  # fmt: skip
    if 1 < len(numbers) <= len(COLOURS):
        axis.legend()
    axis.set_ylim(0, None)
    title = f"{label[0].upper()}{label[1:]} along the chain" + "s" * (len(numbers) > 1)
    return _labels(axis, "position in the order of solving", label, title)


@styled
def residual_histogram(
    residuals: np.ndarray, tolerance: float | None = None, axis: Axes | None = None
) -> Axes:
    """Draw the true relative residuals of the solves and the tolerance they were held to."""
    axis = _axis(axis)
    values = np.asarray(residuals, dtype=np.float64).ravel()
    values = np.maximum(values[np.isfinite(values)], 1e-17)
    axis.hist(values, _log_bins(values).tolist(), color=COLOURS[0], alpha=0.85)
    _log_scale(axis.xaxis, np.append(values, tolerance or np.nan), exponents=True)
    if tolerance:
        _mark(axis, {"tolerance": tolerance}, "{:.0e}")
    return _labels(axis, "true relative residual", "solves", "Residuals, recomputed")


@styled
def error_histogram(errors: Mapping[str, np.ndarray], axis: Axes | None = None) -> Axes:
    """Draw how the relative errors of the test samples are spread, shape (n,) per field."""
    axis = _axis(axis)
    shown = {name: _positive(values) for name, values in errors.items()}
    everything = np.concatenate(list(shown.values()))
    bins = _log_bins(everything)
    for k, (name, values) in enumerate(shown.items()):
        axis.hist(values, bins.tolist(), color=COLOURS[k % 6], alpha=0.7, label=name)
    _log_scale(axis.xaxis, everything, percent=True)
    axis.legend()
    return _labels(axis, "relative L2 error", "test samples", "Error histogram")


@styled
def error_distribution(
    errors: Mapping[str, np.ndarray],
    baseline: Mapping[str, np.ndarray] | None = None,
    axis: Axes | None = None,
) -> Axes:
    """Draw the share of test samples below each relative error, with median, p95 and p99 marked.

    Parameters
    ----------
    errors : mapping of str to ndarray, shape (n,)
        By field.
    baseline : mapping of str to ndarray, optional
        Errors of predicting the mean output, drawn dashed.
    """
    axis = _axis(axis)
    for k, (name, values) in enumerate(errors.items()):
        colour = COLOURS[k % 6]
        known, shares = _cumulative(values)
        axis.step(known, shares, where="post", color=colour, label=name)
        for share in (0.5, 0.95, 0.99):
            reached = np.flatnonzero(shares >= share)
            if reached.size:
                axis.plot(known[reached[0]], share, "o", color=colour, markersize=4)
        if baseline and name in baseline:
            label = f"{name}: mean output"
            axis.step(*_cumulative(baseline[name]), "--", where="post", color=colour, label=label)
    drawn = [_positive(item) for item in (*errors.values(), *(baseline or {}).values())]
    _log_scale(axis.xaxis, np.concatenate(drawn), percent=True)
    axis.set_ylim(0, 1.03)
    axis.legend()
    return _labels(axis, "relative L2 error", "share of test samples", "Error distribution")


@styled
def error_in_time(evaluation: Evaluation, axis: Axes | None = None) -> Axes:
    """Draw median and 95th percentile of the error at each stored time.

    Of a surrogate that goes by steps also the median error of one step from the truth.
    """
    axis = _axis(axis)
    steps = [item.one_step for item in evaluation.fields.values() if item.one_step is not None]
    for k, (name, item) in enumerate(evaluation.fields.items()):
        middle, high = _quantiles(item.per_time, (0.5, 0.95))
        axis.plot(evaluation.times, middle, color=COLOURS[k % 6], label=f"{name}: median")
        axis.plot(evaluation.times, high, "--", color=COLOURS[k % 6], label=f"{name}: p95")
        if item.one_step is not None:
            (middle,) = _quantiles(item.one_step, (0.5,))
            axis.plot(
                evaluation.times, middle, ":", color=COLOURS[k % 6], label=f"{name}: one step"
            )
    if steps:
        both = [item.per_time.ravel() for item in evaluation.fields.values()]
        _log_scale(
            axis.yaxis, np.concatenate([*both, *(item.ravel() for item in steps)]), percent=True
        )
    else:
        axis.set_ylim(bottom=0)
        axis.yaxis.set_major_formatter(_percent)
    axis.legend()
    return _labels(axis, "time", "relative L2 error at that time", "Error in time")


@styled
def calibration_plot(estimates: np.ndarray, errors: np.ndarray, axis: Axes | None = None) -> Axes:
    """Draw actual against estimated errors, shape (n,); below the line the estimate was enough."""
    axis = _axis(axis)
    usable = np.isfinite(estimates) & np.isfinite(errors) & (errors > 0) & (estimates > 0)
    estimate, error = estimates[usable], errors[usable]
    covered = error <= estimate
    axis.plot(estimate[covered], error[covered], "o", color=COLOURS[0], markersize=3.5,
                alpha=0.7, label=f"covered ({covered.sum()})")  # fmt: skip
    axis.plot(estimate[~covered], error[~covered], "^", color=COLOURS[1], markersize=4,
                alpha=0.8, label=f"underestimated ({(~covered).sum()})")  # fmt: skip
    if error.size:
        ends = [min(estimate.min(), error.min()) / 1.3, max(estimate.max(), error.max()) * 1.3]
        axis.plot(ends, ends, color=INK, linewidth=0.8, linestyle=":", label="error = estimate")
    for line in (axis.xaxis, axis.yaxis):
        _log_scale(line, np.concatenate([estimate, error]), percent=True)
    axis.legend()
    return _labels(axis, "estimated relative error", "actual relative error", "Trust")


def _axis(axis: Axes | None) -> Axes:
    made: Axes = new_axes()[0, 0] if axis is None else axis
    return made


def _labels(axis: Axes, x: str, y: str, title: str) -> Axes:
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.set_title(title)
    axis.grid(True)
    axis.set_axisbelow(True)
    return axis


def _percent(value: float, _: Any = None) -> str:
    return f"{100 * value:g} %"


def _log_scale(
    line: Any, values: np.ndarray, *, percent: bool = False, exponents: bool = False
) -> None:
    """Make an axis line logarithmic where all values allow it, with ticks at 1, 2, 5 when short.

    ``percent`` and ``exponents`` say how ticks are written; plain numbers otherwise.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    finite = values[np.isfinite(values)]
    if finite.size == 0 or finite.min() <= 0:
        if percent:
            line.set_major_formatter(_percent)
        return
    line.axes.set(**{f"{line.axis_name}scale": "log"})
    if exponents:
        return
    decades = np.log10(finite.max() / finite.min())
    subs = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0) if decades < 0.9 else (1.0, 2.0, 5.0)
    line.set_major_locator(LogLocator(subs=subs if decades < 2.5 else (1.0,)))
    line.set_minor_formatter(NullFormatter())
    if percent:
        line.set_major_formatter(_percent)
    elif decades < 5:
        line.set_major_formatter(lambda value, _: f"{value:g}")


def _running_median(values: np.ndarray, width: int) -> np.ndarray:
    """Return the median over a window of ``width`` values that shrinks at the ends."""
    half = width // 2
    if half == 0:
        return values
    padded = np.concatenate([np.full(half, np.nan), values, np.full(half, np.nan)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1)
    known = np.isfinite(windows).any(axis=1)
    middle = np.full(len(values), np.nan)
    middle[known] = np.nanmedian(windows[known], axis=1)
    return middle


def _positive(errors: np.ndarray) -> np.ndarray:
    """Return the finite errors; zeros become the smallest other one, for logarithmic axes."""
    finite = errors[np.isfinite(errors)]
    return np.maximum(finite, np.min(finite[finite > 0], initial=1.0))


def _cumulative(errors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return sorted finite errors and the share of the defined ones up to each, from 0 upwards."""
    known = np.sort(_positive(errors))
    n_defined = max(int(np.count_nonzero(~np.isnan(errors))), 1)
    return np.append(known[:1], known), np.arange(bool(len(known)) + len(known)) / n_defined


def _log_bins(values: np.ndarray, n: int = 30) -> np.ndarray:
    if values.size == 0:
        return np.array([0.1, 1.0])
    low, high = np.log10(values.min()), np.log10(values.max())
    spread = max(high - low, 0.05)
    return np.logspace(low - 0.02 * spread, low + 1.02 * spread, n + 1)


def _mark(axis: Axes, values: Mapping[str, float], pattern: str) -> None:
    for k, (name, value) in enumerate(values.items()):
        axis.axvline(value, color=INK, linewidth=1.0, linestyle=("--", ":")[k % 2],
                     label=f"{name} {pattern.format(value)}")  # fmt: skip
    axis.margins(y=0.3)  # room for the legend
    axis.legend()


def _quantiles(values: np.ndarray, shares: Sequence[float]) -> np.ndarray:
    """Return quantiles over samples of the finite entries, shape (n_shares, T)."""
    finite = np.where(np.isfinite(values), values, np.nan)
    known = np.isfinite(finite).any(axis=0)
    found = np.full((len(shares), values.shape[1]), np.nan)
    found[:, known] = np.nanquantile(finite[:, known], shares, axis=0)
    return found
