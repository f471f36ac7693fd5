"""The sections of the report page: what each says about a run, as words and rows of tables.

Every function takes the run's record and returns what the template's section of that name shows.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from simlab.pipeline.evaluate import SUMMARY
from simlab.pipeline.report_record import PHASES, Record, section
from simlab.pipeline.snippets import snippets
from simlab.pipeline.statistics import field_moments
from simlab.pipeline.wording import (
    components,
    digits,
    field_name,
    file_size,
    flat,
    number,
    one_line,
    percent,
    timing,
)

__all__ = ["data", "failures", "load", "run", "solver", "surrogate", "timings", "training"]

_N_FAILURES = 20
_SHARES = (0.0, 0.5, 0.95, 1.0)


def surrogate(record: Record) -> dict[str, Any] | None:
    """Return the table of test errors beside the baseline, and what qualifies it, if any."""
    fields = section(record.evaluation, "fields")
    if not fields:
        return None
    rows, notes = [], []
    for name, entry in fields.items():
        cells = [name, "surrogate", *(percent(entry["rel_l2"][key]) for key in SUMMARY)]
        rows.append(_row(cells, "chosen" if len(fields) == 1 else ""))
        if "one_step" in entry:
            cells = ["", "one step", *(percent(entry["one_step"][key]) for key in SUMMARY)]
            rows.append(_row(cells, "faint"))
        if "baseline" in entry:
            cells = ["", "mean output", *(percent(entry["baseline"][key]) for key in SUMMARY)]
            rows.append(_row(cells, "faint"))
        if entry.get("n_undefined"):
            notes.append(
                f"{name}: {entry['n_undefined']} samples whose truth is zero are left out, "
                "since a relative error has no meaning there."
            )
        if entry.get("n_not_finite"):
            notes.append(
                f"{name}: {entry['n_not_finite']} predictions hold NaN or Inf; their error "
                "counts as infinite, shown as a dash."
            )
    if any("one_step" in entry for entry in fields.values()):
        notes.append(
            "This network goes by steps: the surrogate's error is that of whole trajectories "
            "marched from their initial state; one step is each stored state made from the "
            "true one before."
        )
    trust = section(record.evaluation, "calibration")
    if trust.get("n"):
        rank = trust.get("rank_correlation")
        notes.append(
            f"Does it know? The model's own estimate covered the actual error of "
            f"{trust['covered']:.0%} of {trust['n']} samples; the median estimate is "
            f"{trust['median_ratio']:.2f} times the error"
            + (f", rank correlation {rank:.2f}." if rank is not None else ".")
        )
    else:
        notes.append("The model gives no estimate of its own error on these samples.")
    missing = record.evaluation.get("missing", [])
    if missing:
        notes.append(f"In the data but not predicted: {', '.join(missing)}.")
    return {
        "text": f"Relative L2 error over times and grid points of {record.evaluation['n_test']} "
        "test samples the model never saw"
        + (
            ", beside the error of predicting the mean training output for every sample."
            if any("baseline" in entry for entry in fields.values())
            else "."
        ),
        "head": ["field", "", *SUMMARY],
        "rows": rows,
        "notes": notes,
    }


def data(record: Record) -> dict[str, Any] | None:
    """Return what is in the store, if there is one: splits, solves, moments of the fields."""
    if record.store is None:
        return None
    store = record.store
    status, schema = store.status(), store.schema
    counts = {name: split.done for name, split in status.splits.items()}
    waiting = sum(split.missing + split.in_flight for split in status.splits.values())
    shape = " x ".join(map(str, schema.shape))
    words = [
        f"{sum(counts.values()):,} trajectories of {schema.name} on a grid of {shape} points, "
        f"{f'{len(schema.times)} times each' if len(schema.times) > 1 else 'stationary'}, "
        f"{file_size(status.n_bytes)} in {status.n_shards} shards."
    ]
    if waiting:
        words.append(f"{waiting:,} of {store.n:,} are still to come.")
    if status.n_unsealed:
        n = f"{status.n_unsealed:,}"
        words.append(f"{n} are not sealed yet; their fields are not in what follows.")
    log = store.solves()
    seconds = log["seconds"].reshape(-1, len(schema.times)).sum(axis=1)
    solves = [
        _row([name, *map(number, np.quantile(known, _SHARES))])
        for name, values in (
            ("iterations", log["iterations"]),
            ("true residual", log["true_relres"]),
            ("CPU seconds per sample", seconds),
        )
        if (known := values[np.isfinite(values) & (values >= 0)]).size
    ]
    return {
        "n_done": sum(counts.values()),
        "text": " ".join(words),
        "splits": [_row([name, f"{n:,}"]) for name, n in counts.items()],
        "quantiles": ["min", "median", "p95", "max"],
        "solves": solves,
        "fields": [
            _row(
                [
                    field_name(spec),
                    *(spec.role, "-" if spec.units == "1" else spec.units),
                    digits(found.low),
                    *(digits(found.high), components(found.mean), components(found.std)),
                ]
            )
            for spec, found in field_moments(store)
        ],
        "fields_caption": "Over all sealed samples, times and grid points",
    }


def failures(record: Record) -> dict[str, Any]:
    """Return the samples that failed, with their reasons."""
    failures = record.campaign.get("failures", [])
    if record.store is not None:
        reasons = record.attempt("Failed samples cannot be listed.", record.store.failed) or {}
        failures = [{"index": index, "reason": reason} for index, reason in reasons.items()]
    n = max(record.campaign.get("failed", 0), len(failures))
    shown = [_row([str(f["index"]), f["reason"]]) for f in failures[:_N_FAILURES]]
    more = f" The first {len(shown)} are listed." if n > len(shown) else ""
    text = f"{n} sample{'s' * (n != 1)} failed, in no split; the rest is unaffected.{more}"
    return {"rows": shown, "text": text}


def training(record: Record) -> dict[str, Any]:
    """Return the last facts of the training log."""
    facts = {key: value for key, value in flat(record.train) if key not in ("state", "error")}
    lines = [line for line in record.metrics if line.get("kind") == "train"]
    checks = [line for line in record.metrics if line.get("kind") == "validation"]
    if lines:
        last = lines[-1]
        facts |= {
            key: last[key] for key in ("batch", "loss", "learning_rate", "threads") if key in last
        }
    if checks:
        found = {"validation error": "rel_l2"}
        if "rollout" in checks[-1]:
            found = {"error of one step": "rel_l2", "error of rollouts": "rollout"}
        for name, entry in ((n, section(checks[-1], key)) for n, key in found.items()):
            quantiles = [f"{key} {percent(entry[key])}" for key in SUMMARY if key in entry]
            facts[name] = ", ".join(quantiles)
    if not facts:
        text = (
            "Training has not begun."
            if "train" in record.case
            else "This run made data only: its case has no [train] table."
        )
        return {"text": text, "facts": []}
    text = f"State: {record.train.get('state', 'unknown')}. The last line of the training log:"
    return {"text": text, "facts": [(key, one_line(value)) for key, value in facts.items()]}


def solver(record: Record) -> dict[str, Any]:
    """Return which solver was chosen, why, and what its pilot measured."""
    chosen, reason = record.campaign.get("solver", ""), record.campaign.get("reason", "")
    kind = section(record.case, "solver").get("kind", "")
    words = []
    if chosen:
        words.append(f"Solved with {chosen}" + (f" (solver.kind = {kind})." if kind else "."))
    if reason:
        words.append(f"Why: {str(reason).rstrip('.')}.")
    elif chosen and kind != "auto":
        words.append("The case names it; no pilot was run.")
    means = {
        "iterations": record.campaign.get("iterations_mean"),
        "operator applications": record.campaign.get("operator_applies_mean"),
        "preconditioner applications": record.campaign.get("pc_applies_mean"),
    }
    known = [f"{number(value)} {name}" for name, value in means.items() if value is not None]
    if known:
        words.append(f"Mean per solve: {', '.join(known)}.")
    worst = record.campaign.get("worst_true_relres")
    if worst:
        words.append(f"Largest true relative residual of an accepted solution: {worst:.1e}.")
    pilot = [row for row in record.campaign.get("pilot", []) if isinstance(row, Mapping)]
    head = [
        key
        for key in dict.fromkeys(key for row in pilot for key in row)
        if not any(isinstance(row.get(key), Mapping) for row in pilot)
    ]
    rows = [
        _row(
            [one_line(row.get(key, "")) for key in head],
            "chosen" if str(reason).startswith(f"{row.get('solver')}:") else "",
        )
        for row in pilot
    ]
    return {
        "text": " ".join(words),
        "head": [key.replace("_", " ") for key in head],
        "rows": rows,
    }


def timings(record: Record) -> list[dict[str, Any]]:
    """Return bars of where the time went: phases, solvers, trainer."""
    found = []
    phases = {
        PHASES.get(name, name): seconds
        for name, seconds in section(record.manifest, "seconds").items()
        if name != "total"
    }
    if phases:
        both = "campaign" in record.manifest and "train" in record.manifest
        note = "Wall time of each phase."
        if both:
            note += " Solvers and trainer may work side by side."
        found.append(timing("Phases of the run", note, phases, lanes=both))
    seconds = section(record.campaign, "seconds")
    if seconds:
        note = "Wall seconds of this campaign's latest start, summed over solver groups."
        found.append(timing("Solvers", note, seconds))
    train = _trainer_seconds(record)
    if train:
        note = "Wall time of the trainer since its first batch."
        found.append(timing("Trainer", note, train))
    return found


def _trainer_seconds(record: Record) -> dict[str, float]:
    """Return seconds of training and of waiting for data, from the training log."""
    lines = [line for line in record.metrics if line.get("kind") == "train"]
    if not lines or "train_s" not in lines[-1]:
        return {}
    spent, waited = lines[-1]["train_s"], lines[-1].get("wait_s", 0.0)
    return {"training": spent - waited, "waiting for data": waited}


def run(record: Record) -> dict[str, Any]:
    """Return what was run: command, versions, the resolved case."""
    manifest = record.manifest
    keys = ("created", "host", "ranks", "seed", "simlab", "commit", "state")
    run = [(key, one_line(manifest[key])) for key in keys if manifest.get(key) not in (None, "")]
    restarts = Counter(str(entry.get("side")) for entry in manifest.get("restarts", ()))
    if restarts:
        run.append(("restarts", ", ".join(f"{side} {n}" for side, n in restarts.items())))
    tables = [("run", run), ("versions", flat(section(manifest, "versions")))]
    loose = {key: value for key, value in record.case.items() if not isinstance(value, Mapping)}
    tables.append(("case", flat(loose)))
    tables += [
        (f"[{name}]", flat(table))
        for name, table in record.case.items()
        if isinstance(table, Mapping)
    ]
    command = manifest.get("command", "")
    return {
        "command": command if isinstance(command, str) else shlex.join(map(str, command)),
        "tables": [
            (name, [(key, one_line(value)) for key, value in rows]) for name, rows in tables if rows
        ],
        "has_case": bool(record.case),
    }


def load(record: Record) -> dict[str, Any]:
    """Return snippets that load the data and the model."""
    code = snippets(record.dir, record.store) if record.store is not None else []
    names = {item["name"] for item in code}
    missing = []
    if "data" not in names:
        missing.append("No data to load yet.")
    if "model" not in names:
        missing.append("No trained model in this run.")
    return {"snippets": code, "missing": missing, "where": str(Path.cwd())}


def _row(cells: Sequence[str], style: str = "") -> dict[str, Any]:
    """Return a table row; ``style`` is ``"chosen"``, ``"faint"`` or nothing."""
    return {"cells": cells, "style": style}
