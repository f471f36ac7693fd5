"""A page that follows a run: one local web server, one page, what the run directory holds.

    GET /                 the page: plain HTML and JavaScript, nothing from anywhere else
    GET /data?from=BYTE   manifest in brief, and the metric lines behind that byte
    GET /picture/FIELD    truth, prediction and error of the newest checkpoint, PNG

Everything shown is read from the run directory, which is never written to; so the page serves runs
of any process on any host that shares the directory, and finished ones. Pictures are made here, in
one thread, while somebody looks: validation samples of the store, predicted by the newest weights.
The server binds the loopback device only and answers only requests that were addressed to it.
"""

from __future__ import annotations

import io
import json
import logging
import math
import threading
import time
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np

from simlab.core.errors import SimlabError
from simlab.core.metrics import relative_l2
from simlab.core.runs import RunDirectory, metric_lines
from simlab.core.samples import Sample, Trajectory
from simlab.pipeline.pictures import Comparison, can_show, panels
from simlab.pipeline.processes import ProcessMark
from simlab.store.store import SnapshotStore

__all__ = ["Newest", "Watcher", "newest_model", "server"]

log = logging.getLogger("simlab.watch")

_HOST = "127.0.0.1"
_CHUNK = 4_000_000  # bytes of metrics per answer
_N_COMPARED = 16
_PICTURE_SECONDS = 3.0
_DPI = 100
_SECTIONS = ("state", "error", "n", "done", "failed", "solver", "batches", "operator", "items")


class Newest:
    """The newest weights of a run.

    Attributes
    ----------
    version : str
        Another one for other weights.
    label : str
        ``"batch 400"``, or ``"finished model"``.
    """

    def __init__(self, path: Path, version: str, label: str) -> None:
        self._path, self.version, self.label = path, version, label

    def load(self) -> Any:
        """Return the model: what has ``predict(samples)``. Loads torch."""
        from simlab.core.config import build
        from simlab.learn import checkpoints
        from simlab.learn.average import Average
        from simlab.learn.model import Model
        from simlab.learn.settings import TrainSettings
        from simlab.store.schema import Schema

        if self._path.name == "model.json":
            return Model.load(self._path.parent)
        state = checkpoints.newest(self._path.parent)
        if state is None:
            raise SimlabError(f"{self._path.parent} holds no checkpoint any more")
        schema = Schema.from_json(json.loads(state["schema"]))
        model = Model(build(TrainSettings, json.loads(state["settings"])), schema)
        model.load_tensors(state["network"])
        if state.get("average") is not None:
            average = Average(model.network, model.settings.ema)
            average.load(state["average"])
            average.place()
        return model


def newest_model(run: RunDirectory) -> Newest | None:
    """Return the newest weights of a run: a checkpoint, or the model when training is through."""
    finished = run.model / "model.json"
    found = sorted((run.model / "checkpoints").glob("batch-*/COMMIT"))
    is_done = run.manifest().get("train", {}).get("state") == "done"
    try:
        if finished.is_file() and (is_done or not found):
            return Newest(finished, f"model-{finished.stat().st_mtime_ns}", "finished model")
        if found:
            folder = found[-1].parent
            version = f"{folder.name}-{found[-1].stat().st_mtime_ns}"
            return Newest(folder, version, f"batch {int(folder.name.partition('-')[2])}")
    except OSError:  # swept between listing and asking
        return None
    return None


class Watcher:
    """What the page asks for, read from one run directory.

    Parameters
    ----------
    run : RunDirectory
    picture_seconds : float
        Pictures are made at most this often.
    """

    def __init__(self, run: RunDirectory, picture_seconds: float = _PICTURE_SECONDS) -> None:
        self._run, self._picture_seconds = run, picture_seconds
        self._pictures: dict[str, bytes] = {}
        self._facts: dict[str, Any] = {"version": "", "fields": [], "text": "no weights yet"}
        self._asked = threading.Event()
        self._lock = threading.Lock()
        threading.Thread(target=self._keep_drawing, daemon=True).start()

    def data(self, position: int) -> dict[str, Any]:
        """Return what is new behind a byte of ``metrics.jsonl``, and the manifest in brief."""
        self._asked.set()
        manifest = self._run.manifest()
        lines, end, has_more = self._metrics(position)
        case = manifest.get("case", {})
        with self._lock:
            pictures = dict(self._facts)
        return {
            "run": str(self._run.path),
            "title": case.get("title") or _kind(case, "family"),
            "family": _kind(case, "family"),
            "operator": _kind(case.get("train") or {}, "operator"),
            "state": manifest.get("state", "unknown"),
            "started": manifest.get("started", 0.0),
            "now": time.time(),
            "n_samples": case.get("campaign", {}).get("n", 0),
            "n_batches": (case.get("train") or {}).get("n_batches", 0),
            **{
                name: {key: manifest[name][key] for key in _SECTIONS if key in manifest[name]}
                for name in ("campaign", "train", "evaluate")
                if name in manifest
            },
            "processes": _processes(manifest),
            "restarts": manifest.get("restarts", []),
            "stop_requested": self._run.stop_requested(),
            "metrics": lines,
            "from": position if end >= position else 0,
            "position": end,
            "has_more": has_more,
            "pictures": pictures,
        }

    def picture(self, field: str) -> bytes | None:
        """Return the newest picture of a field, PNG."""
        with self._lock:
            return self._pictures.get(field)

    def _metrics(self, position: int) -> tuple[list[Any], int, bool]:
        """Return the whole lines behind a position, the position behind them, and if more come."""
        try:
            with self._run.metrics.open("rb") as file:
                size = file.seek(0, io.SEEK_END)
                position = position if 0 <= position <= size else 0  # the run began afresh
                file.seek(position)
                added = file.read(_CHUNK)
        except FileNotFoundError:
            return [], 0, False
        whole = added.rfind(b"\n") + 1
        return metric_lines(added[:whole]), position + whole, position + len(added) < size

    def _keep_drawing(self) -> None:
        while True:
            self._asked.wait()
            self._asked.clear()
            try:
                self._draw()
            except (SimlabError, OSError) as error:
                self._say(str(error))
            except Exception as error:  # a page that goes on is worth more than one picture
                log.exception("no picture")
                self._say(f"{type(error).__name__}: {error}")
            time.sleep(self._picture_seconds)

    def _say(self, text: str) -> None:
        with self._lock:
            self._facts["text"] = text

    def _draw(self) -> None:
        newest = newest_model(self._run)
        if newest is None or newest.version == self._facts["version"]:
            return
        store = SnapshotStore.open(self._run.store)
        split = next((s for s in map(store.split, ("valid", "test", "train")) if len(s)), None)
        if split is None:
            self._say("no sealed sample to compare with yet")
            return
        if not self._pictures:
            self._say(f"{newest.label}: drawing")
        shown = [split[k] for k in range(min(_N_COMPARED, len(split)))]
        made = compare(newest.load(), shown, store)
        text = f"{newest.label}; of {len(shown)} samples of the {split.name} split"
        with self._lock:
            self._pictures = {name: picture for name, (picture, _) in made.items()}
            self._facts = {
                "version": newest.version,
                "fields": list(made),
                "text": text,
                "errors": {name: errors for name, (_, errors) in made.items()},
            }


def compare(
    model: Any, shown: Sequence[Trajectory], store: SnapshotStore
) -> dict[str, tuple[bytes, dict[str, float]]]:
    """Draw truth, prediction and error of the median and the worst of some samples.

    Parameters
    ----------
    model : object with ``predict(samples)``
        As :class:`simlab.core.surrogate.Surrogate` has it.
    shown : sequence of Trajectory

    Returns
    -------
    dict of str to (bytes, dict)
        By output field: the PNG, and the relative L2 errors by label.
    """
    samples: list[Sample] = [trajectory.sample for trajectory in shown]
    predictions = model.predict(samples)
    made = {}
    for spec in store.schema.outputs:
        if not can_show(store.schema, spec):
            continue
        truth = np.stack([trajectory.outputs[spec.name] for trajectory in shown])
        errors = relative_l2(predictions[spec.name], truth)
        order = np.argsort(errors)
        places = {"median": int(order[(len(order) - 1) // 2]), "worst": int(order[-1])}
        rows = [
            Comparison(
                f"{label}: #{shown[k].sample.index}\n{100 * errors[k]:.3g} %",
                shown[k],
                {name: values[k] for name, values in predictions.items()},
            )
            for label, k in places.items()
        ]
        axes = panels(rows, store.schema, spec.name)
        picture = io.BytesIO()
        axes.flat[0].figure.savefig(picture, dpi=_DPI, format="png", facecolor="white")
        made[spec.name] = (
            picture.getvalue(),
            {label: float(errors[k]) for label, k in places.items()},
        )
    return made


def _kind(table: Mapping[str, Any], name: str) -> str:
    entry = table.get(name, "")
    return str(entry.get("kind", "") if isinstance(entry, Mapping) else entry)


def _processes(manifest: Mapping[str, Any]) -> dict[str, bool]:
    """Return which side's process is alive, as far as it was started here by a supervisor."""
    marks = {name: ProcessMark.read(entry) for name, entry in manifest.get("processes", {}).items()}
    return {name: mark is not None and mark.is_alive() for name, mark in marks.items()}


def server(watcher: Watcher, port: int = 0) -> ThreadingHTTPServer:
    """Return a server of the page on the loopback device; ``serve_forever`` is the caller's.

    Raises
    ------
    OSError
        When the port is taken; with 0 a free one is found: ``server_port``.
    """

    class Handler(_Handler):
        pass

    Handler.watcher = watcher
    return ThreadingHTTPServer((_HOST, port), Handler)


class _Handler(BaseHTTPRequestHandler):
    """Answers of the page, its data and its pictures."""

    watcher: Watcher
    server: ThreadingHTTPServer

    def do_GET(self) -> None:
        """Answer one request."""
        asked = urlsplit(self.path)
        port = self.server.server_port
        if self.headers.get("Host") not in (f"{_HOST}:{port}", f"localhost:{port}"):
            self._answer(403, "text/plain", b"this page is for this machine only\n")
        elif asked.path == "/":
            page = files("simlab.pipeline").joinpath("watch_page.html").read_bytes()
            self._answer(200, "text/html; charset=utf-8", page)
        elif asked.path == "/data":
            start = parse_qs(asked.query).get("from", ["0"])[0]
            try:
                found = self.watcher.data(int(start) if start.isdigit() else 0)
            except SimlabError as error:
                found = {"problem": str(error)}
            body = json.dumps(_strict(found), allow_nan=False).encode()
            self._answer(200, "application/json", body)
        elif asked.path.startswith("/picture/"):
            picture = self.watcher.picture(unquote(asked.path.removeprefix("/picture/")))
            if picture is None:
                self._answer(404, "text/plain", b"no such picture\n")
            else:
                self._answer(200, "image/png", picture)
        else:
            self._answer(404, "text/plain", b"not found\n")

    def _answer(self, code: int, kind: str, body: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header(
            "Content-Security-Policy",
            "default-src 'none'; img-src 'self' data:; connect-src 'self'; "
            "script-src 'unsafe-inline'; style-src 'unsafe-inline'",
        )
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say requests only to those who want to know."""
        log.debug(format, *args)


def _strict(value: Any) -> Any:
    """Replace what strict JSON cannot hold by ``None``."""
    if isinstance(value, Mapping):
        return {key: _strict(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
