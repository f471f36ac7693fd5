"""The run directory: what was run, how far it got, and how to go on.

    manifest.json    versions, host, command, resolved case, sections of each phase with their state
    case.toml        the resolved case; running it again reproduces the run
    metrics.jsonl    one JSON line per event, appended by every process of the run
    STOP             its presence asks every process of the run to stop after the sample at hand

Several processes of one run update the manifest, each its own section, under a file lock; every
write is to a temporary name, synced and renamed.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import tomli_w

from simlab.core.config import differences
from simlab.core.errors import ConfigError, StoreError

__all__ = ["RunDirectory", "metric_lines", "publish", "software"]

_PACKAGES = (
    "numpy",
    "scipy",
    "petsc4py",
    "mpi4py",
    "h5py",
    "meshio",
    "scikit-fem",
    "torch",
    "neuraloperator",
)

# What a directory may hold in which another process is just starting the same run.
_BEGINNING = ("case.toml", "manifest.json")
_LOCK = ".lock"


def publish(path: Path, text: str) -> None:
    """Write a text file so that readers see the old one or the new one whole, crash or not."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with _reported(path):
        try:
            with part.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        except OSError:
            part.unlink(missing_ok=True)
            raise


@contextmanager
def _reported(path: Path) -> Iterator[None]:
    """Turn what the system says about writing a file into a StoreError that names it."""
    try:
        yield
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror or error}") from error


def metric_lines(text: bytes) -> list[dict[str, Any]]:
    """Return the entries of ``metrics.jsonl``, without lines that a kill or a full disk tore."""
    found = []
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict):
            found.append(entry)
    return found


def software() -> dict[str, str]:
    """Return versions of simlab, Python and the libraries it stands on; loads none of them."""
    found = {"python": platform.python_version()}
    for name in ("simlab", *_PACKAGES):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _commit() -> str:
    """Return the git commit of simlab's own checkout, or nothing when it is not one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


class RunDirectory:
    """One run on disk.

    Parameters
    ----------
    path : str or Path
        The directory; use :meth:`start` to make one and :meth:`open` for one that exists.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @classmethod
    def open(cls, path: str | Path) -> RunDirectory:
        """Open an existing run; :class:`StoreError` when there is none."""
        run = cls(path)
        if not run._manifest.is_file():
            raise StoreError(f"{path} is not a run directory: it has no manifest.json")
        return run

    @classmethod
    def start(
        cls,
        path: str | Path,
        case: Mapping[str, Any],
        *,
        resume: bool,
        fresh: bool = False,
        complete: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict,
        **facts: Any,
    ) -> RunDirectory:
        """Make a run directory, or open the same run again. One process of a job.

        Parameters
        ----------
        case : mapping
            Resolved case as plain tables.
        resume : bool
            Go on with a run that is there; its case must be the same.
        fresh : bool
            Delete a run that is there and start again.
        complete : callable
            Returns the case of a run that is there with the keys that the version which began it
            did not know.
        **facts
            Further manifest entries, such as ``ranks``.

        Raises
        ------
        ConfigError
            When a run is there and neither ``resume`` nor ``fresh`` was asked for, or when the case
            changed.
        """
        run = cls(path)
        names = [entry.name for entry in run.path.iterdir()] if run.path.is_dir() else []
        is_foreign = any(
            name not in _BEGINNING and not name.endswith((_LOCK, ".part")) for name in names
        )
        if is_foreign and not run._manifest.is_file():
            raise ConfigError(f"{path} exists, is not empty and is not a run: choose another --out")
        try:
            run.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot make the run directory {path}: {error}") from None
        with run._locked():  # tasks of a job array start at the same moment
            if run._manifest.is_file() and not fresh:
                run._go_on(case, resume, complete)
            else:
                run._begin(case, facts, fresh)
        return run

    def _go_on(
        self,
        case: Mapping[str, Any],
        resume: bool,
        complete: Callable[[Mapping[str, Any]], Mapping[str, Any]],
    ) -> None:
        if not resume:
            state = self.manifest().get("state", "unknown")
            raise ConfigError(
                f"{self.path} holds a run already (state: {state}): --resume goes on with it, "
                "--fresh deletes it and starts again, --out names another directory"
            )
        changed = differences(complete(self.manifest()["case"]), case)
        if changed:
            raise ConfigError(
                [f"{line}: the case changed since this run began" for line in changed],
                str(self.path),
            )
        self.forget_stop()

    def _begin(self, case: Mapping[str, Any], facts: Mapping[str, Any], fresh: bool) -> None:
        if fresh and self._manifest.is_file():
            self._clear()
        publish(self.path / "case.toml", tomli_w.dumps(dict(case)))
        versions = software()
        manifest = {
            "simlab": versions.pop("simlab", ""),
            "commit": _commit(),
            "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "started": time.time(),
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "host": socket.gethostname(),
            "versions": versions,
            "state": "running",
            **facts,
            "case": dict(case),
        }
        publish(self._manifest, json.dumps(manifest, indent=1))

    def _clear(self) -> None:
        """Delete what a run has made, except that it is one, and the locks that others wait for."""
        for entry in self.path.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry != self._manifest and not entry.name.endswith(_LOCK):
                entry.unlink()

    @property
    def _manifest(self) -> Path:
        return self.path / "manifest.json"

    @property
    def _stop(self) -> Path:
        return self.path / "STOP"

    @property
    def store(self) -> Path:
        """Directory of the run's snapshot store."""
        return self.path / "store"

    @property
    def model(self) -> Path:
        """Directory of the run's trained model."""
        return self.path / "model"

    @property
    def metrics(self) -> Path:
        """File of metric lines."""
        return self.path / "metrics.jsonl"

    def manifest(self) -> dict[str, Any]:
        """Read the manifest."""
        try:
            found: dict[str, Any] = json.loads(self._manifest.read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise StoreError(f"cannot read {self._manifest}: {error}") from error
        return found

    def update(self, **entries: Any) -> None:
        """Merge entries into the manifest, one level deep, safe against other processes."""
        with self._locked():
            manifest = self.manifest()
            for key, value in entries.items():
                both = isinstance(value, Mapping) and isinstance(manifest.get(key), dict)
                if both and value.get("state") == "running":
                    manifest[key].pop("error", None)  # of an earlier start
                manifest[key] = manifest[key] | value if both else value
            states = [
                manifest[name]["state"]
                for name in ("campaign", "train", "evaluate")
                if "state" in manifest.get(name, {})
            ]
            worst = [state for state in ("failed", "running", "stopped") if state in states]
            manifest["state"] = worst[0] if worst else "done" if states else manifest["state"]
            publish(self._manifest, json.dumps(manifest, indent=1))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        path = self.path / ".manifest.lock"
        with _reported(path):
            lock = path.open("w")
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    @contextmanager
    def alone(self, name: str, otherwise: str) -> Iterator[None]:
        """Be the only process that does something; the kernel forgets one that was killed.

        Raises
        ------
        ConfigError
            Saying ``otherwise`` when another one is at it, and when the directory cannot be
            written to.
        """
        try:
            lock = (self.path / f".{name}{_LOCK}").open("a")
        except OSError as error:
            raise ConfigError(f"cannot write to {self.path}: {error.strerror}") from None
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(otherwise) from None
            yield

    @contextmanager
    def phase(self, name: str) -> Iterator[dict[str, Any]]:
        """Time one phase and keep its state.

        What the body puts into the mapping goes to the manifest's section of that name; it may set
        ``"state"`` itself, e.g. to ``"stopped"``.
        """
        facts: dict[str, Any] = {}
        self.update(**{name: {"state": "running"}})
        start = time.perf_counter()
        try:
            yield facts
        except BaseException as error:
            facts |= {"state": "failed", "error": f"{type(error).__name__}: {error}"}
            raise
        finally:
            spent = time.perf_counter() - start
            self.update(**{name: {"state": "done"} | facts, "seconds": {name: spent}})

    def log_metric(self, kind: str, **values: Any) -> None:
        """Append one line to ``metrics.jsonl`` in one write: processes do not interleave."""
        now = time.time()
        line = {"kind": kind, "time": now, **values}
        line.setdefault("seconds", now - self.started)
        with _reported(self.metrics):
            handle = os.open(self.metrics, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(handle, (json.dumps(line) + "\n").encode())
            finally:
                os.close(handle)

    @cached_property
    def started(self) -> float:
        """Unix time at which the run was first started."""
        return float(self.manifest().get("started", 0.0))

    def request_stop(self) -> None:
        """Ask every process of this run to stop after the sample or batch at hand."""
        with _reported(self._stop):
            self._stop.touch()

    def forget_stop(self) -> None:
        """Take back an earlier request: somebody wants to go on."""
        with _reported(self._stop):
            self._stop.unlink(missing_ok=True)

    def stop_requested(self) -> bool:
        """Return whether a stop was asked for; costs one stat call."""
        return self._stop.exists()
