"""One side of a run kept alive: started or adopted, watched, started again when it dies.

    running --+-- ended with 0 or 3 ------------------------------> ended well
      ^       +-- died, may be started again: wait, then start ---+
      |       +-- died, may not --------------------------------> failed
      '-----------------------------------------------------------'

Each side goes on from what it has on disk when it is started again, so a restart is a start. It may
not be started again when a stop was asked for, when what it was asked to do is wrong (exit code 2,
or the launcher refused), when it ended twice running with the same error, and when it was started
again ``max_restarts`` times already. The wait doubles with each death without progress.

A side that is there but gives no sign of life for too long (:mod:`.heartbeat`) is killed, which
makes it one that died.

The process is noted in the manifest by pid and start time. A supervisor that comes after one that
was killed finds it there and watches it (*adopts* it) instead of starting another; how an adopted
process ended is read from the manifest, because only a parent is told the exit code. Before a side
is started, whatever is left of an earlier start of it is killed: there are never two.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from simlab.core.errors import ConfigError
from simlab.core.runs import RunDirectory
from simlab.pipeline.heartbeat import LEAST_PATIENCE, Pulse
from simlab.pipeline.processes import ProcessMark, end_heirs, heirs

__all__ = ["Side", "refuse_if_at_work", "refuse_if_supervised", "supervising"]

log = logging.getLogger("simlab.run")

_SIDES = ("solvers", "trainer", "server")
_VARIABLE = "SIMLAB_SIDE"  # in the environment of every process a supervisor starts
_WELL = (0, 3)  # 3: finished, some samples failed
_WRONG_INPUT = 2
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 60.0
_DISMISSAL_SECONDS, _POLL_SECONDS = 5.0, 0.02
_LOCK = ".supervisor.lock"


class Side:
    """The solvers of a run, its trainer, or the server between them.

    Parameters
    ----------
    run : RunDirectory
    name : str
        ``"solvers"``, ``"trainer"`` or ``"server"``.
    section : str
        What this side calls its part of the manifest and the metrics it logs: ``"campaign"``,
        ``"train"`` or ``"server"``.
    command : sequence of str
    environment : mapping of str to str
    max_restarts : int
    patience : float
        Seconds of silence, at least, before it counts as hung.
    refusal : callable
        ``refusal(text)`` returns what to do when the process launcher refused, else nothing.
    serves : bool
        It works for the other sides and has no end of its own: any is a death, until
        :meth:`dismiss`.

    Attributes
    ----------
    code : int or None
        Exit code once :attr:`has_ended`; None when nobody saw it, or there was no process.
    failure : str
        Why it is not started again; empty while it may be, and when it ended well.
    n_restarts : int
    """

    def __init__(
        self,
        run: RunDirectory,
        name: str,
        section: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        max_restarts: int,
        refusal: Callable[[str], str] = lambda text: "",
        serves: bool = False,
        patience: float = LEAST_PATIENCE,
    ) -> None:
        self.serves = serves
        self.name, self.failure, self.n_restarts = name, "", 0
        self.code: int | None = None
        self.has_ended = False
        self.section, self._run, self._command = section, run, list(command)
        self._label = _label(name, run.path)
        self._environment = {**environment, _VARIABLE: self._label}
        self._max_restarts = max_restarts
        self._refusal = refusal
        self._process: subprocess.Popen[bytes] | None = None  # None: adopted
        self._mark = ProcessMark(0, -1, "")
        self._begin = 0  # where this start's words begin in the log
        self._due: float | None = None
        self._last_error = ""
        self._n_idle = 0  # deaths running without progress
        self._is_progressing = False
        self._hung = ""  # why it was killed for it
        self._was_ended = False  # by this supervisor
        self._pulse = Pulse(
            run,
            name,
            lambda: heirs(_VARIABLE, self._label),
            patience,
            counts_cpu=name == "trainer",  # no MPI
        )

    @property
    def log_file(self) -> Path:
        """Where the process's words go."""
        return self._run.path / "logs" / f"{self.name}.log"

    def begin(self) -> None:
        """Adopt the process that an earlier supervisor left behind, or start one."""
        entry = self._run.manifest().get("processes", {}).get(self.name, {})
        mark = ProcessMark.read(entry)
        if mark is None or not mark.is_alive():
            self._start()
            return
        self._mark, self._begin = mark, int(entry.get("log_from", 0))
        self._pulse.begin()
        self._run.log_metric("adoption", side=self.name, pid=mark.pid)
        log.info("%s still run (pid %d): adopted, log in %s", self.name, mark.pid, self.log_file)

    def _start(self) -> None:
        n_left = end_heirs(_VARIABLE, self._label)
        if n_left:
            log.warning("%d processes left of earlier %s were killed", n_left, self.name)
        self.log_file.parent.mkdir(exist_ok=True)
        self._pulse.begin(fresh=True)
        self._hung = ""
        self._begin = self.log_file.stat().st_size if self.log_file.exists() else 0
        self._run.update(**{self.section: {"state": "running"}})
        with self.log_file.open("ab") as file:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,  # Ctrl-C reaches the supervisor only
            )
        self._mark = ProcessMark.of(self._process.pid)
        self._due, self._is_progressing, self._was_ended = None, False, False
        entry = {
            "pid": self._mark.pid,
            "ticks": self._mark.ticks,
            "boot": self._mark.boot,
            "started": time.time(),
            "log_from": self._begin,
        }
        self._run.update(processes={self.name: entry})
        log.info("%s started (pid %d), log in %s", self.name, self._mark.pid, self.log_file)

    def progressed(self) -> None:
        """Note that this start has got some work done: waits are short again."""
        self._is_progressing = True

    def look(self, stopping: bool) -> None:
        """Notice an end, decide what follows, start again when it is time."""
        if self.has_ended:
            return
        if self._due is not None:
            if stopping:
                self._stop()
            elif time.monotonic() >= self._due:
                self._start()
        elif not self._is_running():
            self.code = self._exit_code()
            if self.code in _WELL and not self._is_unfinished():
                self.has_ended = True
            elif stopping and self._was_ended:
                self._stop()
            else:
                self._die(stopping)
        elif not (stopping or self.serves or self._hung):
            self._hung = self._pulse.look()
            if self._hung:
                log.warning("the %s: %s, so killed as hung", self.name, self._hung)
                self.kill()

    def _stop(self) -> None:
        """Take the end of this side for that of a run that was asked to stop."""
        self._run.update(**{self.section: {"state": "stopped"}})
        self.has_ended, self._due = True, None

    def _is_running(self) -> bool:
        if self._process is not None:
            return self._process.poll() is None
        return self._mark.is_alive()

    def _exit_code(self) -> int | None:
        """Return the exit code, of an adopted process as far as the manifest tells."""
        if self._process is not None:
            return self._process.returncode
        section = self._run.manifest().get(self.section, {})
        state = section.get("state")
        if state == "failed":
            return _WRONG_INPUT if str(section.get("error", "")).startswith("ConfigError") else 1
        if state == "done":
            return 3 if self.section == "campaign" and section.get("failed") else 0
        return 0 if state == "stopped" else None

    def _is_unfinished(self) -> bool:
        """Return whether it ended in good order, but before its time and without being asked."""
        section = self._run.manifest().get(self.section, {})
        is_early = section.get("state") == "stopped" and not self._run.stop_requested()
        return is_early or self.serves

    def _die(self, stopping: bool) -> None:
        text = self._words()
        words = self._last_words(text)
        error = words if words.startswith("error:") and not self._hung else ""
        why = self._why_not_again(text, error, stopping)
        self._last_error = error
        if why is not None:
            self.has_ended = True
            self.failure = (
                f"the {self.name} ended with {self._how()}{why}; what is done is kept and "
                f"--resume goes on. {self.log_file} ends with:\n{words}"
            )
            return
        self.n_restarts += 1
        self._n_idle = 0 if self._is_progressing else self._n_idle + 1
        wait = min(_FIRST_WAIT * 2**self._n_idle, _LONGEST_WAIT)
        self._due = time.monotonic() + wait
        entry = {
            "side": self.name,
            "number": self.n_restarts,
            "code": self.code,
            "reason": error or self._how(),
            "wait_s": wait,
        }
        earlier = self._run.manifest().get("restarts", [])
        self._run.update(restarts=[*earlier, {"time": time.time(), **entry}])
        self._run.log_metric("restart", **entry)
        log.warning(
            "the %s ended with %s; restart %d of %d in %.3g s",
            self.name,
            self._how(),
            self.n_restarts,
            self._max_restarts,
            wait,
        )

    def _why_not_again(self, text: str, error: str, stopping: bool) -> str | None:
        """Return why this death is the last one, as part of a sentence; None when it is not."""
        if stopping:
            return " while stopping"
        if self.code == _WRONG_INPUT or self._refusal(text):
            return ", which no restart mends"
        if error and error == self._last_error:
            return ", for the same reason as before its restart"
        if self.n_restarts >= self._max_restarts:
            return f", after {self.n_restarts} restarts" if self.n_restarts else ""
        return None

    def _how(self) -> str:
        if self._hung:
            return f"a kill for being hung: {self._hung}"
        if self.code is None:
            return "an exit code nobody saw"
        if self.code in _WELL:
            return "its work unfinished"
        if self.code < 0:
            return f"signal {signal.Signals(-self.code).name}"
        return f"exit code {self.code}"

    def _words(self) -> str:
        """Return what this start has logged so far."""
        try:
            return self.log_file.read_bytes()[self._begin :].decode(errors="replace")
        except OSError:
            return ""

    def _last_words(self, text: str, n_lines: int = 12) -> str:
        """Return the end of what was logged, or the one line that matters of it."""
        lines = text.splitlines()
        errors = [line for line in lines if line.startswith("error:")]
        return self._refusal(text) or "\n".join(errors[-1:] or lines[-n_lines:])

    def dismiss(self) -> None:
        """End a side that is not needed any more."""
        if self.has_ended:
            return
        self.end()
        self._run.update(**{self.section: {"state": "done"}})
        self.code, self.has_ended, self._due = 0, True, None

    def end(self) -> None:
        """Have the process end, by force when it does not of itself."""
        self.terminate()
        deadline = time.monotonic() + _DISMISSAL_SECONDS
        while self._due is None and self._is_running() and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        self.kill()

    def terminate(self) -> None:
        """Ask the process to end now."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End the process and all it has started."""
        if self._signal(signal.SIGKILL):
            end_heirs(_VARIABLE, self._label)

    def _signal(self, number: signal.Signals) -> bool:
        """Send a signal to the process and all it has started; return whether it was there."""
        if self.has_ended or self._due is not None or not self._is_running():
            return False
        self._was_ended = True
        with suppress(ProcessLookupError):
            os.killpg(self._mark.pid, number)
        return True


@contextmanager
def supervising(run: RunDirectory) -> Iterator[None]:
    """Be the one supervisor of a run; the kernel forgets a killed one.

    Raises
    ------
    ConfigError
        When another one is alive, or the directory cannot be written to.
    """
    words = (
        f"{run.path} is supervised by another `simlab run` already; Ctrl-C there, or "
        f"`touch {run.path / 'STOP'}`, ends it"
    )
    with run.alone("supervisor", words):
        yield


def refuse_if_supervised(directory: Path, fresh: bool, *sides: str) -> None:
    """Raise :class:`ConfigError` when a run is alive that would be disturbed.

    Also when one of some sides, with ``fresh`` any, outlived its supervisor and still works there.
    """
    if (directory / _LOCK).exists():
        with supervising(RunDirectory(directory)):
            refuse_if_at_work(directory, *(_SIDES if fresh else sides))


def refuse_if_at_work(directory: Path, *sides: str) -> None:
    """Raise :class:`ConfigError` when `simlab run` has started a side that still works there."""
    if not (directory / _LOCK).exists():
        return
    pids = [pid for side in sides for pid in heirs(_VARIABLE, _label(side, directory))]
    if pids:
        raise ConfigError(
            f"processes {', '.join(map(str, pids))} that `simlab run` has started still work on "
            f"{directory}: `touch {directory / 'STOP'}` ends them, `simlab run` with --resume "
            "adopts them where their supervisor is gone"
        )


def _label(side: str, directory: Path) -> str:
    return f"{side} of {directory.resolve()}"
