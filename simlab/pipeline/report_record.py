"""What a run directory holds about its run, read once for the report page."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from simlab.core.errors import SimlabError
from simlab.pipeline.curves import read_metrics
from simlab.store.store import SnapshotStore

__all__ = ["PHASES", "Record", "read_json", "section"]

PHASES = {
    "generate": "generating data",
    "campaign": "generating data",
    "train": "training",
    "evaluate": "evaluating",
}


class Record:
    """A run as its files tell it; each file is optional.

    Attributes
    ----------
    dir : Path
    manifest, evaluation : dict
        Empty where there is none.
    campaign, train, case : dict
        These sections of the manifest.
    metrics : list of dict
    store : SnapshotStore or None
    problems : list of dict
        What could not be read, as ``title`` and ``text``.
    """

    def __init__(self, run_dir: Path) -> None:
        self.dir = run_dir
        self.manifest = read_json(run_dir / "manifest.json")
        self.evaluation = read_json(run_dir / "evaluation.json")
        self.metrics = read_metrics(run_dir / "metrics.jsonl")
        self.campaign = section(self.manifest, "campaign")
        self.train = section(self.manifest, "train")
        self.case = section(self.manifest, "case")
        self.problems: list[dict[str, str]] = []
        self.store = self.attempt("The data cannot be read.", self._open_store)

    def attempt(self, title: str, work: Callable[[], Any]) -> Any:
        """Return what ``work`` returns; where it cannot, None, and the page says why."""
        try:
            return work()
        except (SimlabError, OSError, ValueError) as error:
            self.problems.append({"title": title, "text": str(error)})
            return None

    def _open_store(self) -> SnapshotStore | None:
        return SnapshotStore.open(self.dir / "store") if (self.dir / "store").is_dir() else None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; an absent or torn file is an empty one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def section(table: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a table within a table; empty where there is none."""
    value = table.get(name)
    return dict(value) if isinstance(value, Mapping) else {}
