"""Small durable file operations, and who is alive: what the rest of the store builds on.

Every write, sync, rename and unlink of the store goes through this module, so that tests can make
each of them fail. A process is named by host, pid and start time, so a reused pid is not taken for
the process that had it before.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import itertools
import os
import re
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from simlab.core.errors import SimlabError, StoreError

__all__ = [
    "FOREIGN_PATIENCE",
    "is_alive",
    "locked",
    "mark_alive",
    "process_id",
    "publish",
    "read_at",
    "rename",
    "reported",
    "sync",
    "sync_directory",
    "truncate",
    "unlink",
    "write_all",
    "write_at",
]

FOREIGN_PATIENCE = 300.0
"""Seconds without a heartbeat after which a writer on another host counts as dead."""

_IOV_MAX = 512
_counter = itertools.count()
_living: set[str] = set()


@contextmanager
def reported(path: Path) -> Iterator[None]:
    """Turn what the system says about files into a StoreError that names the store."""
    try:
        yield
    except SimlabError:
        raise
    except OSError as error:
        raise StoreError(
            f"{path}: {error.strerror or error} ({error.filename or 'data'})"
        ) from error


def write_all(fd: int, buffers: Sequence[bytes | memoryview]) -> int:
    """Write all buffers at the file's position; return the number of bytes."""
    views = [memoryview(item).cast("B") for item in buffers if len(item)]
    total = sum(len(view) for view in views)
    while views:
        wrote = os.writev(fd, views[:_IOV_MAX])
        while views and wrote >= len(views[0]):
            wrote -= len(views.pop(0))
        if views and wrote:
            views[0] = views[0][wrote:]
    return total


def read_at(fd: int, room: memoryview, offset: int) -> int:
    """Fill ``room`` with the bytes from an offset on; return how many there are before the end.

    The kernel gives at most 2 GiB a time, and network file systems less when a signal comes.
    """
    got = 0
    while got < len(room):
        n = os.preadv(fd, [room[got:]], offset + got)
        if n == 0:
            break
        got += n
    return got


def write_at(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write some bytes at an offset; the file's position stays."""
    view = memoryview(data).cast("B")
    while len(view):
        wrote = os.pwrite(fd, view, offset)
        view, offset = view[wrote:], offset + wrote


def sync(fd: int) -> None:
    """Bring a file's data to the disk."""
    os.fdatasync(fd)


def truncate(fd: int, size: int) -> None:
    """Cut a file and put the position at its end."""
    os.ftruncate(fd, size)
    os.lseek(fd, size, os.SEEK_SET)


def rename(old: Path, new: Path) -> None:
    """Rename within one file system, atomically."""
    os.replace(old, new)


def unlink(path: Path) -> None:
    """Remove a file that may be gone already."""
    path.unlink(missing_ok=True)


def sync_directory(path: Path) -> None:
    """Bring a directory's entries to the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def publish(path: Path, text: str | bytes, *, overwrite: bool = True) -> bool:
    """Write a whole file atomically; return False when it exists and may not be overwritten."""
    data = text.encode() if isinstance(text, str) else text
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{process_id()}")
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        try:
            write_all(fd, [data])
            sync(fd)
        finally:
            os.close(fd)
        if overwrite:
            rename(draft, path)
        else:
            try:
                os.link(draft, path)
            except FileExistsError:
                return False
        sync_directory(path.parent)
        return True
    finally:
        unlink(draft)


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9]", "", socket.gethostname())[:24] or "host"


def _start_key(pid: int) -> str | None:
    """Return a hash of a process's start on this boot of this host; None when it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        start = f"{boot} {stat.rpartition(')')[2].split()[19]}"
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return None
        try:
            os.kill(pid, 0)  # no /proc on this system: the pid is all there is
        except ProcessLookupError:
            return None
        except PermissionError:
            pass
        start = "unknown"
    return hashlib.blake2s(f"{_host()} {pid} {start}".encode()).hexdigest()[:8]


def process_id() -> str:
    """Return a new name ``host-pid-start-counter``; no two calls anywhere give the same one."""
    pid = os.getpid()
    return f"{_host()}-{pid}-{_start_key(pid)}-{next(_counter)}"


def mark_alive(writer: str, alive: bool) -> None:
    """Note that a writer of this very process has started or ended."""
    (_living.add if alive else _living.discard)(writer)


def is_alive(writer: str, path: Path) -> bool:
    """Return whether the process that writes ``path`` may still do so.

    On this host the pid and start time decide. On another host only the file's age against the
    file system's own clock can: live writers touch their files every minute.
    """
    host, pid, key, _ = writer.split("-")
    if host != _host():
        probe = path.with_name(f".clock.{process_id()}")
        try:
            probe.touch()
            return probe.stat().st_mtime - path.stat().st_mtime < FOREIGN_PATIENCE
        except FileNotFoundError:
            return False
        finally:
            unlink(probe)
    if int(pid) == os.getpid() and key == _start_key(os.getpid()):
        return writer in _living
    return _start_key(int(pid)) == key


@contextmanager
def locked(path: Path, *, wait: float, shared: bool = False) -> Iterator[bool]:
    """Hold a lock file, alone or with others that share it.

    Yields False when another process keeps it for ``wait`` seconds.

    The kernel drops the lock when its holder dies, so it is never stale.
    """
    how = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        deadline = time.monotonic() + wait
        while True:
            try:
                fcntl.flock(fd, how | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    raise StoreError(
                        f"{path}: this file system has no file locks ({error.strerror}); "
                        "mount it with flock, or seal from a node where it is local"
                    ) from error
            if time.monotonic() >= deadline:
                yield False
                return
            time.sleep(0.02)
        yield True
    finally:
        os.close(fd)
