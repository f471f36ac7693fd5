"""Validation in a process of its own, so that training never waits for it.

    trainer                                   python -m simlab.learn.validator FOLDER
      weights to a file, one line       -->     a network of its own, the validation set read once
      collect: what is there by now     <--     one line with batch and errors

While the process is busy the newest weights wait, and replace those that waited. The set goes over
as it is pickled: of a store's split that is where to read, not what. A process that dies or falls
silent is started once more; after that the trainer validates by itself. It runs at a lower
priority, and ends with the trainer.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from simlab.core.config import as_table, build
from simlab.core.samples import Trajectory
from simlab.learn.model import Model
from simlab.learn.settings import TrainSettings
from simlab.store.schema import Schema

__all__ = ["Report", "Validator"]

log = logging.getLogger("simlab.train")

_MAX_DEATHS = 2
_BEAT_SECONDS = 2.0
_SILENT_SECONDS = 60.0
_POLL_SECONDS = 0.02
_NICENESS = 5
_SETUP = "setup.pickle"

_lock = threading.Lock()


class Report(NamedTuple):
    """What was found for the weights after a batch.

    ``errors`` is what :meth:`simlab.learn.model.Model.validate` returned, the others are the
    attributes of the model that it set.
    """

    batch: int
    errors: dict[str, Any]
    validation: dict[str, float]
    one_step: dict[str, float] | None


class _Job(NamedTuple):
    batch: int
    threads: int
    path: Path


class Validator:
    """The process, as the trainer sees it. Nothing but :meth:`finish` waits.

    Parameters
    ----------
    settings : TrainSettings
    schema : Schema
    validation : sequence of Trajectory

    Attributes
    ----------
    failure : str
        Why it is of no use any more; empty while it is.
    """

    def __init__(
        self, settings: TrainSettings, schema: Schema, validation: Sequence[Trajectory]
    ) -> None:
        self.failure = ""
        self._folder = tempfile.TemporaryDirectory(prefix="simlab-validation-")
        self._path = Path(self._folder.name)
        self._process: subprocess.Popen[bytes] | None = None
        self._busy: _Job | None = None
        self._next: _Job | None = None
        self._n_jobs = self._n_deaths = 0
        self._said = b""
        self._heard = 0.0
        setup = json.dumps(as_table(settings)), json.dumps(schema.to_json()), validation
        try:
            with (self._path / _SETUP).open("wb") as file:
                pickle.dump(setup, file)
        except Exception as error:  # whatever a class that cannot be pickled raises
            self._give_up(f"the validation set cannot be handed over ({error})")
            return
        self._start()

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "simlab.learn.validator", str(self._path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)
        self._said, self._heard = b"", time.monotonic()

    def submit(self, batch: int, tensors: Mapping[str, torch.Tensor], threads: int = 1) -> None:
        """Have weights validated, as soon as it is free and unless newer ones come before."""
        if self.failure:
            return
        self._n_jobs += 1
        path = self._path / f"weights-{self._n_jobs}.pt"
        torch.save(dict(tensors), path)
        if self._next is not None:
            self._next.path.unlink()
        self._next = _Job(batch, threads, path)
        if self._busy is None:
            self._send_next()

    def _send_next(self) -> None:
        self._busy, self._next = self._next, None
        if self._busy is not None:
            self._send(self._busy)

    def _send(self, job: _Job) -> None:
        """Say where the weights are; a line always fits into the pipe, read or not."""
        assert self._process is not None
        assert self._process.stdin is not None
        with suppress(OSError):  # dead: the next look at it will tell
            self._process.stdin.write(f"{job.batch} {job.threads} {job.path}\n".encode())
            self._process.stdin.flush()

    def collect(self) -> list[Report]:
        """Return the reports that have come since the last call."""
        if self.failure:
            return []
        reports = [self._take(line) for line in self._lines()]
        self._look_after()
        return [report for report in reports if report is not None]

    def _lines(self) -> list[bytes]:
        assert self._process is not None
        assert self._process.stdout is not None
        if new := self._process.stdout.read():
            self._said += new
            self._heard = time.monotonic()
        *lines, self._said = self._said.split(b"\n")
        return lines

    def _take(self, line: bytes) -> Report | None:
        if not line:  # a sign of life
            return None
        content = json.loads(line)
        assert self._busy is not None
        self._busy.path.unlink()
        self._send_next()
        return Report(**content)

    def _look_after(self) -> None:
        """Start the process again when it has died; give up when that happens twice."""
        assert self._process is not None
        code = self._process.poll()
        is_silent = time.monotonic() - self._heard > _SILENT_SECONDS
        if code is None and not is_silent:
            return
        why = "is silent" if code is None else f"ended with code {code}"
        self._end()
        self._n_deaths += 1
        if self._n_deaths >= _MAX_DEATHS:
            self._give_up(f"the validating process {why}, as after its first start")
            return
        log.warning("the validating process %s; it is started once more", why)
        self._start()
        if self._busy is not None:
            self._send(self._busy)

    def _give_up(self, failure: str) -> None:
        self.failure = failure
        log.warning("%s: validating between batches instead", failure)

    def finish(self) -> list[Report]:
        """Wait for what was submitted and return its reports; fewer when the process failed."""
        reports = []
        while not self.failure and self._busy is not None:
            reports += self.collect()
            time.sleep(_POLL_SECONDS)
        return reports

    def close(self) -> None:
        """End the process, whatever it is at."""
        self._end()
        self._folder.cleanup()

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with suppress(OSError):
                pipe.close()


def _read_jobs(jobs: queue.SimpleQueue[_Job]) -> None:
    for line in sys.stdin:
        batch, threads, path = line.rstrip("\n").split(" ", 2)
        jobs.put(_Job(int(batch), int(threads), Path(path)))
    os._exit(0)  # the trainer has gone


def _beat() -> None:
    while True:
        time.sleep(_BEAT_SECONDS)
        _say("")


def _say(line: str) -> None:
    with _lock:
        os.write(1, f"{line}\n".encode())


def _main(folder: Path) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # the trainer decides
        signal.signal(number, signal.SIG_IGN)
    os.nice(_NICENESS)
    jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
    threading.Thread(target=_read_jobs, args=(jobs,), daemon=True).start()
    threading.Thread(target=_beat, daemon=True).start()
    with (folder / _SETUP).open("rb") as file:  # made by our own parent, in a directory of its own
        table, schema, validation = pickle.load(file)
    model = Model(build(TrainSettings, json.loads(table)), Schema.from_json(json.loads(schema)))
    while True:
        job = jobs.get()
        torch.set_num_threads(job.threads)
        model.load_tensors(torch.load(job.path, weights_only=True))
        errors = model.validate(validation)
        assert model.validation is not None
        report = Report(job.batch, errors, model.validation, model.one_step)
        _say(json.dumps(report._asdict()))


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
