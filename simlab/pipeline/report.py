"""``report.html``: one self-contained page about a run, for the person who opens it a year later.

Everything comes from the run directory: manifest, metrics, store, evaluation and figures. Each
piece is optional: a run without training, one that failed or one that is still going on gets a page
that says in words what is not there. Pictures are embedded, there are no scripts and no external
resources, and every word from the run is escaped.
"""

from __future__ import annotations

import base64
import json
import math
import shlex
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from simlab import __version__
from simlab.core.errors import SimlabError
from simlab.core.progress import duration
from simlab.core.runs import publish
from simlab.pipeline.curves import read_metrics
from simlab.pipeline.evaluate import SUMMARY
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
from simlab.store.store import SnapshotStore

__all__ = ["write_report"]

_PHASES = {
    "generate": "generating data",
    "campaign": "generating data",
    "train": "training",
    "evaluate": "evaluating",
}
_N_FAILURES = 20
_SHARES = (0.0, 0.5, 0.95, 1.0)


def write_report(run_dir: str | Path) -> Path:
    """Write ``report.html`` of a run.

    Parameters
    ----------
    run_dir : str or Path
        A run directory; figures must have been drawn before (``save_figures``) to be shown.

    Returns
    -------
    Path
        The page; readers see the old one or the whole new one.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("simlab.pipeline", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=False,
    )
    page = environment.get_template("report_template.html").render(_Report(Path(run_dir)).context())
    path = Path(run_dir) / "report.html"
    publish(path, page)
    return path


class _Report:
    """What the page shows, section by section."""

    def __init__(self, run_dir: Path) -> None:
        self._dir = run_dir
        self._manifest = _read_json(run_dir / "manifest.json")
        self._evaluation = _read_json(run_dir / "evaluation.json")
        self._metrics = read_metrics(run_dir / "metrics.jsonl")
        self._campaign = _section(self._manifest, "campaign")
        self._train = _section(self._manifest, "train")
        self._case = _section(self._manifest, "case")
        self._problems: list[dict[str, str]] = []
        self._store = self._attempt("The data cannot be read.", self._open_store)

    def _attempt(self, title: str, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except (SimlabError, OSError, ValueError) as error:
            self._problems.append({"title": title, "text": str(error)})
            return None

    def _open_store(self) -> SnapshotStore | None:
        return SnapshotStore.open(self._dir / "store") if (self._dir / "store").is_dir() else None

    def context(self) -> dict[str, Any]:
        """Return everything the template asks for."""
        figures = self._figures()
        context = {
            "evaluation": self._surrogate(),
            "data": self._attempt("The data cannot be summarised.", self._data),
            "failures": self._failures(),
            "training": self._training(),
            "solver": self._solver(),
            "timings": self._timings(),
            "run": self._run(),
            "load": self._load(),
            "figures": figures,
        }
        return context | {"page": self._page(context["data"])}

    def _page(self, data: Any) -> dict[str, Any]:
        manifest, family = self._manifest, _section(self._case, "family")
        kind = family.get("kind", "")
        title = self._case.get("title") or (f"{kind} run" if kind else self._dir.resolve().name)
        ranks = manifest.get("ranks")
        words = [
            self._dir.resolve().name,
            f"started {str(manifest['created'])[:16].replace('T', ' ')}"
            if "created" in manifest
            else "",
            f"on {manifest['host']}" if "host" in manifest else "",
            f"{ranks} rank{'s' * (ranks != 1)}" if ranks else "",
        ]
        alerts = [
            {"title": f"Failed while {doing}:", "text": self._manifest[phase]["error"]}
            for phase, doing in _PHASES.items()
            if "error" in _section(self._manifest, phase)
        ]
        if not manifest:
            alerts.append({"title": "No manifest.", "text": f"{self._dir} has no manifest.json."})
        state = str(manifest.get("state", "unknown"))
        if state in ("running", "stopped"):
            advice = "simlab report writes this page anew; --resume goes on with a stopped run."
            alerts.append({"title": f"This run is {state}.", "text": f"Numbers so far. {advice}"})
        trained = "train" in self._case
        return {
            "title": title,
            "state": state if state in ("done", "failed", "running", "stopped") else "unknown",
            "subtitle": " · ".join(word for word in words if word),
            "alerts": alerts + self._problems,
            "cards": self._cards(data),
            "no_evaluation": (
                "Not evaluated yet: there is no evaluation.json. simlab evaluate makes it once "
                "the model is trained."
                if trained
                else "This run made data only: its case has no [train] table, so there is no "
                "surrogate to evaluate."
            ),
            "no_data": "There is no snapshot store in this run directory.",
            "version": manifest.get("simlab") or __version__,
            "commit": manifest.get("commit", ""),
            "written": time.strftime("%Y-%m-%d %H:%M"),
        }

    def _cards(self, data: Any) -> list[dict[str, Any]]:
        cards = []
        fields = _section(self._evaluation, "fields")
        if fields:
            name = max(fields, key=lambda key: _big(fields[key]["rel_l2"]["mean"]))
            rel, gain = fields[name]["rel_l2"], fields[name].get("times_better")
            spread = f"median {percent(rel['median'])}, p95 {percent(rel['p95'])}"
            label = f"mean relative L2 error of {name} on test samples ({spread})"
            cards.append((percent(rel["mean"]), label))
            if gain:
                cards.append((f"{gain:.2g}x", "smaller error than predicting the mean output"))
        done, failed = self._campaign.get("done"), self._campaign.get("failed", 0)
        if done is None and data:
            done = data["n_done"]
        if done is not None:
            planned = self._campaign.get("n")
            of = f" of {planned:,}" if planned and planned != done else ""
            cards.append((f"{done:,}", f"samples solved{of}, {failed:,} failed"))
        rate = self._campaign.get("samples_per_core_hour")
        if rate:
            cards.append((f"{digits(rate)}", "samples per core-hour"))
        batches = [line["batch"] for line in self._metrics if line.get("kind") == "train"]
        if batches:
            cards.append((f"{max(batches):,}", "training batches"))
        seconds = self._total_seconds()
        if seconds:
            is_over = self._manifest.get("state") in ("done", "failed")
            cards.append((duration(seconds), "from start to end" if is_over else "so far"))
        return [
            {"value": value, "label": label, "lead": "relative L2" in label}
            for value, label in cards
        ]

    def _total_seconds(self) -> float:
        spent = _section(self._manifest, "seconds")
        if "total" in spent:
            return float(spent["total"])
        seen = [line["seconds"] for line in self._metrics if "seconds" in line]
        return float(max([*seen, *spent.values()], default=0.0))

    def _figures(self) -> dict[str, list[dict[str, Any]]]:
        found: dict[str, list[dict[str, Any]]] = {
            name: [] for name in ("surrogate", "data", "training", "solver", "time")
        }
        index = _read_json(self._dir / "figures" / "index.json")
        for entry in index.get("figures", []):
            path = self._dir / "figures" / entry["file"]
            if not path.is_file():
                text = f"{path} is gone; simlab plot draws it anew."
                self._problems.append({"title": "A figure is missing.", "text": text})
                continue
            code = base64.b64encode(path.read_bytes()).decode()
            width, height = entry["size"]
            found[entry["section"]].append(
                entry
                | {"source": f"data:image/png;base64,{code}", "width": width, "height": height}
            )
        for problem in index.get("problems", []):
            title = f"No figure of the {problem['name']}:"
            self._problems.append({"title": title, "text": problem["reason"]})
        return found

    def _surrogate(self) -> dict[str, Any] | None:
        fields = _section(self._evaluation, "fields")
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
        trust = _section(self._evaluation, "calibration")
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
        missing = self._evaluation.get("missing", [])
        if missing:
            notes.append(f"In the data but not predicted: {', '.join(missing)}.")
        return {
            "text": f"Relative L2 error over times and grid points of {self._evaluation['n_test']} "
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

    def _data(self) -> dict[str, Any] | None:
        if self._store is None:
            return None
        store = self._store
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

    def _failures(self) -> dict[str, Any]:
        failures = self._campaign.get("failures", [])
        if self._store is not None:
            reasons = self._attempt("Failed samples cannot be listed.", self._store.failed) or {}
            failures = [{"index": index, "reason": reason} for index, reason in reasons.items()]
        n = max(self._campaign.get("failed", 0), len(failures))
        shown = [_row([str(f["index"]), f["reason"]]) for f in failures[:_N_FAILURES]]
        more = f" The first {len(shown)} are listed." if n > len(shown) else ""
        text = f"{n} sample{'s' * (n != 1)} failed, in no split; the rest is unaffected.{more}"
        return {"rows": shown, "text": text}

    def _training(self) -> dict[str, Any]:
        facts = {key: value for key, value in flat(self._train) if key not in ("state", "error")}
        lines = [line for line in self._metrics if line.get("kind") == "train"]
        checks = [line for line in self._metrics if line.get("kind") == "validation"]
        if lines:
            last = lines[-1]
            facts |= {
                key: last[key]
                for key in ("batch", "loss", "learning_rate", "threads")
                if key in last
            }
        if checks:
            found = {"validation error": "rel_l2"}
            if "rollout" in checks[-1]:
                found = {"error of one step": "rel_l2", "error of rollouts": "rollout"}
            for name, entry in ((n, _section(checks[-1], key)) for n, key in found.items()):
                quantiles = [f"{key} {percent(entry[key])}" for key in SUMMARY if key in entry]
                facts[name] = ", ".join(quantiles)
        if not facts:
            text = (
                "Training has not begun."
                if "train" in self._case
                else "This run made data only: its case has no [train] table."
            )
            return {"text": text, "facts": []}
        text = f"State: {self._train.get('state', 'unknown')}. The last line of the training log:"
        return {"text": text, "facts": [(key, one_line(value)) for key, value in facts.items()]}

    def _solver(self) -> dict[str, Any]:
        chosen, reason = self._campaign.get("solver", ""), self._campaign.get("reason", "")
        kind = _section(self._case, "solver").get("kind", "")
        words = []
        if chosen:
            words.append(f"Solved with {chosen}" + (f" (solver.kind = {kind})." if kind else "."))
        if reason:
            words.append(f"Why: {str(reason).rstrip('.')}.")
        elif chosen and kind != "auto":
            words.append("The case names it; no pilot was run.")
        means = {
            "iterations": self._campaign.get("iterations_mean"),
            "operator applications": self._campaign.get("operator_applies_mean"),
            "preconditioner applications": self._campaign.get("pc_applies_mean"),
        }
        known = [f"{number(value)} {name}" for name, value in means.items() if value is not None]
        if known:
            words.append(f"Mean per solve: {', '.join(known)}.")
        worst = self._campaign.get("worst_true_relres")
        if worst:
            words.append(f"Largest true relative residual of an accepted solution: {worst:.1e}.")
        pilot = [row for row in self._campaign.get("pilot", []) if isinstance(row, Mapping)]
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

    def _timings(self) -> list[dict[str, Any]]:
        found = []
        phases = {
            _PHASES.get(name, name): seconds
            for name, seconds in _section(self._manifest, "seconds").items()
            if name != "total"
        }
        if phases:
            both = "campaign" in self._manifest and "train" in self._manifest
            note = "Wall time of each phase."
            if both:
                note += " Solvers and trainer may work side by side."
            found.append(timing("Phases of the run", note, phases, lanes=both))
        seconds = _section(self._campaign, "seconds")
        if seconds:
            note = "Wall seconds of this campaign's latest start, summed over solver groups."
            found.append(timing("Solvers", note, seconds))
        train = self._trainer_seconds()
        if train:
            note = "Wall time of the trainer since its first batch."
            found.append(timing("Trainer", note, train))
        return found

    def _trainer_seconds(self) -> dict[str, float]:
        """Return seconds of training and of waiting for data, from the training log."""
        lines = [line for line in self._metrics if line.get("kind") == "train"]
        if not lines or "train_s" not in lines[-1]:
            return {}
        spent, waited = lines[-1]["train_s"], lines[-1].get("wait_s", 0.0)
        return {"training": spent - waited, "waiting for data": waited}

    def _run(self) -> dict[str, Any]:
        manifest = self._manifest
        keys = ("created", "host", "ranks", "seed", "simlab", "commit", "state")
        run = [
            (key, one_line(manifest[key])) for key in keys if manifest.get(key) not in (None, "")
        ]
        restarts = Counter(str(entry.get("side")) for entry in manifest.get("restarts", ()))
        if restarts:
            run.append(("restarts", ", ".join(f"{side} {n}" for side, n in restarts.items())))
        tables = [("run", run), ("versions", flat(_section(manifest, "versions")))]
        loose = {key: value for key, value in self._case.items() if not isinstance(value, Mapping)}
        tables.append(("case", flat(loose)))
        tables += [
            (f"[{name}]", flat(table))
            for name, table in self._case.items()
            if isinstance(table, Mapping)
        ]
        command = manifest.get("command", "")
        return {
            "command": command if isinstance(command, str) else shlex.join(map(str, command)),
            "tables": [
                (name, [(key, one_line(value)) for key, value in rows])
                for name, rows in tables
                if rows
            ],
            "has_case": bool(self._case),
        }

    def _load(self) -> dict[str, Any]:
        code = snippets(self._dir, self._store) if self._store is not None else []
        names = {item["name"] for item in code}
        missing = []
        if "data" not in names:
            missing.append("No data to load yet.")
        if "model" not in names:
            missing.append("No trained model in this run.")
        return {"snippets": code, "missing": missing, "where": str(Path.cwd())}


def _read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; an absent or torn file is an empty one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _section(table: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = table.get(name)
    return dict(value) if isinstance(value, Mapping) else {}


def _row(cells: Sequence[str], style: str = "") -> dict[str, Any]:
    """Return a table row; ``style`` is ``"chosen"``, ``"faint"`` or nothing."""
    return {"cells": cells, "style": style}


def _big(value: float | None) -> float:
    return math.inf if value is None else value
