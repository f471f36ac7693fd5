"""``report.html``: one self-contained page about a run, for the person who opens it a year later.

Everything comes from the run directory: manifest, metrics, store, evaluation and figures. Each
piece is optional: a run without training, one that failed or one that is still going on gets a page
that says in words what is not there. Pictures are embedded, there are no scripts and no external
resources, and every word from the run is escaped.
"""

from __future__ import annotations

import base64
import math
import time
from pathlib import Path
from typing import Any

from simlab import __version__
from simlab.core.progress import duration
from simlab.core.runs import publish
from simlab.pipeline import report_sections as sections
from simlab.pipeline.report_record import PHASES, Record, read_json, section
from simlab.pipeline.wording import digits, percent

__all__ = ["write_report"]


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
    page = environment.get_template("report_template.html").render(_context(Record(Path(run_dir))))
    path = Path(run_dir) / "report.html"
    publish(path, page)
    return path


def _context(record: Record) -> dict[str, Any]:
    """Return everything the template asks for."""
    data = record.attempt("The data cannot be summarised.", lambda: sections.data(record))
    found = {
        "evaluation": sections.surrogate(record),
        "data": data,
        "failures": sections.failures(record),
        "training": sections.training(record),
        "solver": sections.solver(record),
        "timings": sections.timings(record),
        "run": sections.run(record),
        "load": sections.load(record),
        "figures": _figures(record),
    }
    return found | {"page": _page(record, data)}  # the last: it lists what could not be read


def _page(record: Record, data: Any) -> dict[str, Any]:
    manifest, family = record.manifest, section(record.case, "family")
    kind = family.get("kind", "")
    title = record.case.get("title") or (f"{kind} run" if kind else record.dir.resolve().name)
    ranks = manifest.get("ranks")
    words = [
        record.dir.resolve().name,
        f"started {str(manifest['created'])[:16].replace('T', ' ')}"
        if "created" in manifest
        else "",
        f"on {manifest['host']}" if "host" in manifest else "",
        f"{ranks} rank{'s' * (ranks != 1)}" if ranks else "",
    ]
    alerts = [
        {"title": f"Failed while {doing}:", "text": record.manifest[phase]["error"]}
        for phase, doing in PHASES.items()
        if "error" in section(record.manifest, phase)
    ]
    if not manifest:
        alerts.append({"title": "No manifest.", "text": f"{record.dir} has no manifest.json."})
    state = str(manifest.get("state", "unknown"))
    if state in ("running", "stopped"):
        advice = "simlab report writes this page anew; --resume goes on with a stopped run."
        alerts.append({"title": f"This run is {state}.", "text": f"Numbers so far. {advice}"})
    trained = "train" in record.case
    return {
        "title": title,
        "state": state if state in ("done", "failed", "running", "stopped") else "unknown",
        "subtitle": " · ".join(word for word in words if word),
        "alerts": alerts + record.problems,
        "cards": _cards(record, data),
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


def _cards(record: Record, data: Any) -> list[dict[str, Any]]:
    cards = []
    fields = section(record.evaluation, "fields")
    if fields:
        name = max(fields, key=lambda key: _big(fields[key]["rel_l2"]["mean"]))
        rel, gain = fields[name]["rel_l2"], fields[name].get("times_better")
        spread = f"median {percent(rel['median'])}, p95 {percent(rel['p95'])}"
        label = f"mean relative L2 error of {name} on test samples ({spread})"
        cards.append((percent(rel["mean"]), label))
        if gain:
            cards.append((f"{gain:.2g}x", "smaller error than predicting the mean output"))
    done, failed = record.campaign.get("done"), record.campaign.get("failed", 0)
    if done is None and data:
        done = data["n_done"]
    if done is not None:
        planned = record.campaign.get("n")
        of = f" of {planned:,}" if planned and planned != done else ""
        cards.append((f"{done:,}", f"samples solved{of}, {failed:,} failed"))
    rate = record.campaign.get("samples_per_core_hour")
    if rate:
        cards.append((f"{digits(rate)}", "samples per core-hour"))
    batches = [line["batch"] for line in record.metrics if line.get("kind") == "train"]
    if batches:
        cards.append((f"{max(batches):,}", "training batches"))
    seconds = _total_seconds(record)
    if seconds:
        is_over = record.manifest.get("state") in ("done", "failed")
        cards.append((duration(seconds), "from start to end" if is_over else "so far"))
    return [
        {"value": value, "label": label, "lead": "relative L2" in label} for value, label in cards
    ]


def _total_seconds(record: Record) -> float:
    spent = section(record.manifest, "seconds")
    if "total" in spent:
        return float(spent["total"])
    seen = [line["seconds"] for line in record.metrics if "seconds" in line]
    return float(max([*seen, *spent.values()], default=0.0))


def _figures(record: Record) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {
        name: [] for name in ("surrogate", "data", "training", "solver", "time")
    }
    index = read_json(record.dir / "figures" / "index.json")
    for entry in index.get("figures", []):
        path = record.dir / "figures" / entry["file"]
        if not path.is_file():
            text = f"{path} is gone; simlab plot draws it anew."
            record.problems.append({"title": "A figure is missing.", "text": text})
            continue
        code = base64.b64encode(path.read_bytes()).decode()
        width, height = entry["size"]
        found[entry["section"]].append(
            entry | {"source": f"data:image/png;base64,{code}", "width": width, "height": height}
        )
    for problem in index.get("problems", []):
        title = f"No figure of the {problem['name']}:"
        record.problems.append({"title": title, "text": problem["reason"]})
    return found


def _big(value: float | None) -> float:
    return math.inf if value is None else value
