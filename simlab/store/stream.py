"""The channel ``stream``: a process beside the store hands its records on over the network.

    simlab store serve runs/heat/store                       # or StreamServer in a thread
    channel = StreamChannel("runs/heat/store/stream.json")   # where the trainer is

One request, one reply. A request names a position; its reply brings the records after it as they
lie in the segments, so the receiver checks the checksums that the solver's process made, and the
position after them. Steps whose segment is gone come from their shard. The server keeps nothing
about anybody, and does nothing for a single value: it sends whole blocks of a segment, at most
``CALL_BYTES`` a time, which still lie in the cache of the processor when they are checked.

A request, and the head of a reply, are JSON with an HMAC-SHA256 under a random token, which lies
with the server's address in a file that only its owner may read. Records are numbers and JSON;
nothing is unpickled. The token keeps strangers out; it hides nothing from who listens to the
network: beyond this host, lay the connection through a tunnel unless the network is your own.
"""

from __future__ import annotations

import hmac
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from simlab.core.errors import DependencyError, StoreError
from simlab.store import files
from simlab.store.events import Event, as_event
from simlab.store.follow import CALL_BYTES, Position, follow_records
from simlab.store.records import scan_bytes
from simlab.store.schema import Schema
from simlab.store.splits import assign
from simlab.store.store import SnapshotStore

__all__ = ["ENDPOINT", "LOOPBACK", "StreamChannel", "StreamServer"]

ENDPOINT = "stream.json"
LOOPBACK = "tcp://127.0.0.1:*"
_VERSION = 2
_LEAST_BYTES = 1 << 16
_REQUEST_BYTES = 64 << 20
_POLL_SECONDS = 0.1


def _zmq() -> Any:
    try:
        import zmq
    except ImportError as error:
        raise DependencyError(
            f"the stream channel needs pyzmq ({error}); run `make setup`, or follow the files"
        ) from error
    return zmq


def _signed(token: str, content: dict[str, Any]) -> list[bytes]:
    body = json.dumps(content, separators=(",", ":")).encode()
    return [body, hmac.digest(token.encode(), body, "sha256")]


def _checked(token: str, body: bytes, mac: bytes) -> dict[str, Any] | None:
    """Return what was signed with the token; None for anything else."""
    if not hmac.compare_digest(hmac.digest(token.encode(), body, "sha256"), mac):
        return None
    content: dict[str, Any] = json.loads(body)
    return content


def _read_endpoint(path: Path) -> tuple[str, str] | None:
    """Return address and token, None without a file; refuse one that others may read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        mode = path.stat().st_mode & 0o777
        address, token, version = str(content["address"]), str(content["token"]), content["v"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path} cannot be read: {error}") from None
    if mode & 0o077:
        raise StoreError(f"{path}: others may read the token (mode {mode:03o}); chmod 600 it")
    if version != _VERSION:
        raise StoreError(
            f"{path}: the server speaks version {version}, this simlab version {_VERSION}: start "
            "`simlab store serve` of the same simlab beside the store"
        )
    return address, token


class StreamServer:
    """Answers followers of a store. Run it in a process of its own, or in a thread.

    Parameters
    ----------
    store : str or Path
    address : str
        Where to listen; this host only, on any port, by default. ``tcp://0.0.0.0:*`` for others.
    endpoint : Path, optional
        The file for address and token, mode 0600; default: ``stream.json`` in the store. A server
        that is started again takes token and port from it, where the port is still free.
    """

    def __init__(
        self, store: str | Path, address: str = LOOPBACK, endpoint: str | Path | None = None
    ) -> None:
        self._store = SnapshotStore.open(store)  # its own: stores are for one thread each
        self.endpoint = Path(endpoint) if endpoint else self._store.path / ENDPOINT
        zmq = _zmq()
        known = None
        with suppress(StoreError):  # a token that others may know is not used again
            known = _read_endpoint(self.endpoint)
        before, self._token = known or ("", secrets.token_hex(32))
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.set(zmq.LINGER, 0)
        self._socket.set(zmq.MAXMSGSIZE, _REQUEST_BYTES)
        self._bind(address, before)
        self._publish()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._asked = time.monotonic()

    @property
    def address(self) -> str:
        """Where it listens, as others reach it."""
        bound = str(self._socket.get(_zmq().LAST_ENDPOINT).decode().strip("\0"))
        return bound.replace("0.0.0.0", socket.gethostname())

    @property
    def idle_seconds(self) -> float:
        """Seconds since the last request that was signed with the token."""
        return time.monotonic() - self._asked

    def __enter__(self) -> StreamServer:
        """Serve in a thread."""
        self._thread = threading.Thread(target=self.run, name="store-stream", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self.close()

    def run(self, until: Callable[[], bool] = lambda: False) -> None:
        """Serve until ``until()`` is true; asked ten times a second."""
        while not self._stop.is_set() and not until():
            if self._socket.poll(1000 * _POLL_SECONDS):
                frames = self._socket.recv_multipart()
                if len(frames) == 4:  # who, an empty one, request, mac
                    reply = self._answer(*frames[2:])
                    self._socket.send_multipart([*frames[:2], *reply], copy=False)

    def close(self) -> None:
        """Close the socket; the file stays, for a server that is started again."""
        self._socket.close(0)
        self._context.term()

    def _bind(self, address: str, before: str) -> None:
        zmq = _zmq()
        port = before.rpartition(":")[2]
        again = address.removesuffix("*") + port if address.endswith(":*") and port else address
        for wanted in dict.fromkeys((again, address)):
            try:
                self._socket.bind(wanted)
                return
            except zmq.ZMQError as error:
                failure = error
        self._context.destroy(0)
        raise StoreError(f"cannot listen at {address}: {failure}") from failure

    def _publish(self) -> None:
        content = {"v": _VERSION, "address": self.address, "token": self._token, "pid": os.getpid()}
        draft = self.endpoint.with_name(f".{self.endpoint.name}.{files.process_id()}")
        with files.reported(self.endpoint):
            fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                files.write_all(fd, [json.dumps(content).encode()])
            finally:
                os.close(fd)
            files.rename(draft, self.endpoint)

    def _answer(self, body: bytes, mac: bytes) -> list[bytes | memoryview]:
        request = _checked(self._token, body, mac)
        if request is None:
            return [b'{"error":"wrong token"}', b""]
        self._asked = time.monotonic()
        head: dict[str, Any] = {"id": request.get("id")}
        runs: Sequence[memoryview] = ()
        try:
            if request["ask"] == "records":
                runs, more = self._records(request)
            else:
                more = self._describe()
            head |= more
        except (StoreError, KeyError, TypeError, ValueError, AttributeError) as error:
            head["error"] = f"{type(error).__name__}: {error}"
            runs = ()
        return [*_signed(self._token, head), *runs]

    def _records(self, request: dict[str, Any]) -> tuple[list[memoryview], dict[str, Any]]:
        position = request["position"] and Position.from_json(request["position"])
        n_bytes = min(int(request["n_bytes"]), CALL_BYTES)
        at_most = int(request["at_most"])
        runs, order, after = follow_records(self._store, position, at_most, n_bytes)
        is_complete = not order and self._store.is_complete()
        return runs, {"position": after.to_json(), "is_complete": is_complete, "runs": order}

    def _describe(self) -> dict[str, Any]:
        store = self._store
        return {
            "schema": store.schema.to_json(),
            "n": store.n,
            "seed": store.seed,
            "fractions": store.fractions,
        }


class StreamChannel:
    """Follows a store through a server. No call waits long, so a trainer can go on meanwhile.

    The next request is sent as soon as a reply is in, so the server reads while the caller works;
    at most one reply of ``at_most`` records is under way.

    Parameters
    ----------
    endpoint : str or Path
        The server's file with address and token; read again when the server falls silent, as one
        that was started again may listen elsewhere.
    wait : float
        Seconds that a call waits for its reply.
    timeout : float
        Seconds after which a request is given up and sent anew.
    patience : float
        Seconds of silence after which a call raises.
    stop : callable
        Asked while the constructor waits for the first answer; it raises as soon as this is true.
    """

    def __init__(
        self,
        endpoint: str | Path,
        *,
        wait: float = 1.0,
        timeout: float = 5.0,
        patience: float = 600.0,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self._endpoint = Path(endpoint)
        self._wait, self._timeout, self._patience = wait, timeout, patience
        self._zmq = _zmq()
        self._context = self._zmq.Context()
        self._socket: Any = None
        self._token = ""
        self._asked: dict[str, Any] = {}  # the request under way
        self._sent = 0.0
        self._for: Position | None = None  # the position it names
        self._heard = time.monotonic()
        self._is_silent = self._is_complete = False
        self._n_bytes = CALL_BYTES
        while (found := self._reply({"ask": "describe"}, None)) is None:
            if stop():
                raise StoreError(f"{self._endpoint}: no answer before a stop was asked for")
            self._is_silent = False  # wait again
        self.schema: Schema = Schema.from_json(found[0]["schema"])
        self._n, self._seed = int(found[0]["n"]), int(found[0]["seed"])
        self._fractions: dict[str, float] = found[0]["fractions"]

    def records(
        self, position: Position | None, at_most: int
    ) -> tuple[list[Event], Position | None]:
        """Return up to ``at_most`` records after ``position``, and the position after them.

        The very ``position`` that was given comes back when there is no answer for now.

        Raises
        ------
        StoreError
            When the server refuses, cannot read its store, or has been silent beyond patience.
        """
        if at_most < 1:
            raise StoreError(f"at_most = {at_most}; ask for at least one event")
        while True:
            found = self._reply(self._request(position, at_most), position)
            if found is None:
                return [], position
            head, runs = found
            after, order = Position.from_json(head["position"]), head["runs"]
            self._is_complete = head["is_complete"]
            if order:  # the server reads on while this side decodes
                self._send(self._request(after, at_most), after)
            events = self._decoded(runs, order)
            if len(events) == len(order):
                return events, after
            if not events:  # damaged at the source: not there, as for who follows the files
                return [], position
            at_most = len(events)  # where the position is just before the damaged one

    def is_complete(self) -> bool:
        """Return whether every trajectory had ended at the last reply without records."""
        return self._is_complete

    def ids(self, split: str) -> np.ndarray:
        """Return the ids of all trajectories of a split, made or not; int64, sorted."""
        which = assign(np.arange(self._n), self._seed, self._fractions)
        names = list(self._fractions)
        return np.flatnonzero(which == names.index(split)) if split in names else np.arange(0)

    def close(self) -> None:
        """Close the connection."""
        self._context.destroy(0)

    def _request(self, position: Position | None, at_most: int) -> dict[str, Any]:
        return {
            "ask": "records",
            "position": position and position.to_json(),
            "at_most": at_most,
            "n_bytes": self._n_bytes,
        }

    def _decoded(self, runs: list[Any], order: list[int]) -> list[Event]:
        """Return the records up to the first one whose checksum is wrong."""
        scans = [scan_bytes(run.buffer) for run in runs]
        events: list[Event] = []
        for number in order:
            group = next(scans[number], None) if number < len(scans) else None
            if group is None:
                break
            events.append(as_event(self.schema, group))
        return events

    def _reply(
        self, request: dict[str, Any], position: Position | None
    ) -> tuple[dict[str, Any], list[Any]] | None:
        """Return the reply to a request, sent now unless it is under way; None without one."""
        is_under_way = (
            self._asked
            and self._for is position
            and all(self._asked.get(key) == request.get(key) for key in ("ask", "at_most"))
        )
        if not is_under_way:
            self._send(request, position)
        found = self._received(0.0 if self._is_silent else self._wait)
        now = time.monotonic()
        if found is not None:
            self._heard, self._is_silent = now, False
            self._n_bytes = min(2 * self._n_bytes, CALL_BYTES)
            return found
        self._is_silent = True
        if now - self._heard > self._patience:
            raise StoreError(
                f"{self._endpoint}: no answer for {now - self._heard:.0f} s; start "
                "`simlab store serve` beside the store again"
            )
        if now - self._sent > self._timeout:  # the server is gone, or the reply was too much
            self._n_bytes = max(self._n_bytes // 2, _LEAST_BYTES)
            self._disconnect()
        return None

    def _send(self, request: dict[str, Any], position: Position | None) -> None:
        """Send a request, over a new connection where an earlier one waits for its reply."""
        if self._asked:
            self._disconnect()
        self._for, self._sent = position, time.monotonic()
        if self._socket is None:
            found = _read_endpoint(self._endpoint)
            if found is None:  # no server yet
                return
            address, self._token = found
            self._socket = self._context.socket(self._zmq.REQ)
            self._socket.set(self._zmq.LINGER, 0)
            self._socket.connect(address)
        self._asked = {**request, "id": secrets.token_hex(8)}
        self._socket.send_multipart(_signed(self._token, self._asked))

    def _received(self, wait: float) -> tuple[dict[str, Any], list[Any]] | None:
        if self._socket is None:
            time.sleep(wait)
            return None
        if not self._socket.poll(1000 * wait):
            return None
        frames = self._socket.recv_multipart(copy=False)
        asked, self._asked = self._asked, {}
        head = _checked(self._token, frames[0].bytes, frames[1].bytes)
        if head is None:
            used, found = self._token, _read_endpoint(self._endpoint)
            self._disconnect()
            if found is not None and found[1] == used:
                raise StoreError(f"{self._endpoint}: its token is not that of the server")
            return None  # another server since, with another token
        if head["id"] != asked["id"]:
            return None
        if "error" in head:
            raise StoreError(f"{self._endpoint}: the server says: {head['error']}")
        return head, frames[2:]

    def _disconnect(self) -> None:
        self._asked = {}
        if self._socket is not None:
            self._socket.close(0)
            self._socket = None
