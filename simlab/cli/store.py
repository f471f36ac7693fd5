"""``simlab store``: look at a campaign's data, check it, mend it, seal it, serve it, make views.

Exit codes: 0 good, 1 damaged or failed, 2 not a store.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from simlab.core.errors import StoreError

if TYPE_CHECKING:
    from simlab.store.store import SnapshotStore

__all__ = ["app"]

app = typer.Typer(
    help="Look at, check, mend, seal and serve the data of a campaign.", no_args_is_help=True
)
view = typer.Typer(help="Make views that other programs open.", no_args_is_help=True)
app.add_typer(view, name="view")

_Directory = Annotated[Path, typer.Argument(help="The store: the directory with campaign.json.")]

_POLL_SECONDS = 0.1
_ORPHAN_SECONDS = 600.0


def _open(path: Path) -> SnapshotStore:
    from simlab.store.store import SnapshotStore

    if not (path / "campaign.json").exists() and (path / "store" / "campaign.json").exists():
        path = path / "store"  # a run directory was named
    try:
        return SnapshotStore.open(path)
    except StoreError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


@app.command()
def status(
    path: _Directory,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Count what is done, failed, in flight and missing."""
    from dataclasses import asdict

    found = _open(path).status()
    typer.echo(json.dumps(asdict(found)) if as_json else str(found))


@app.command()
def verify(
    path: _Directory,
    deep: Annotated[bool, typer.Option("--deep", help="Read and check every value.")] = False,
    quarantine: Annotated[
        bool, typer.Option("--quarantine", help="Move damaged shards to quarantine/.")
    ] = False,
) -> None:
    """Check the data; a line per problem."""
    from simlab.store.verify import quarantine_damaged

    store = _open(path)
    problems = store.verify(deep)
    for problem in problems:
        typer.echo(problem)
    if quarantine:
        for name in quarantine_damaged(store, deep):
            typer.echo(f"moved to quarantine: {name}; its trajectories count as missing now")
    if problems:
        raise typer.Exit(1)
    typer.echo("good")


@app.command()
def seal(
    path: _Directory,
    final: Annotated[
        bool, typer.Option("--final", help="Also segments that are not full yet.")
    ] = False,
) -> None:
    """Turn finished segments into shards."""
    store = _open(path)
    for name in store.seal(final=final):
        typer.echo(f"sealed data/{name}")


@app.command()
def recover(path: _Directory) -> None:
    """Put right what a crash left behind."""
    typer.echo(str(_open(path).recover()))


@app.command()
def adopt(
    path: _Directory,
    foreign: Annotated[list[Path], typer.Argument(help="Files in The Well's format.")],
    split: Annotated[
        str | None, typer.Option(help="Adopt them into train, valid or test alone.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of a store that is made: draws the splits.")] = 71093,
) -> None:
    """Take trajectories of files in The Well's format; where there is no store, make one."""
    from simlab.store.store import DEFAULT_SPLIT, SnapshotStore
    from simlab.store.transfer import adopt as take
    from simlab.store.transfer import n_trajectories, schema_of

    if not (path / "campaign.json").exists():
        shares = {split: 1.0} if split else DEFAULT_SPLIT
        n = sum(n_trajectories(file) for file in foreign)
        SnapshotStore.create(path, schema_of(foreign[0]), n=n, seed=seed, split=shares)
    store = _open(path)
    for file in foreign:
        typer.echo(f"adopted {len(take(store, file, split=split))} trajectories of {file}")


@app.command()
def migrate(
    path: _Directory,
    target: Annotated[Path, typer.Argument(help="Directory of the new store.")],
    profile: Annotated[
        str | None, typer.Option(help="default, fast or archive; as it is when left out.")
    ] = None,
) -> None:
    """Write a store anew in this simlab's format; the old one is not changed."""
    from simlab.store.transfer import migrate as write

    new = write(_open(path), target, profile=profile)
    typer.echo(f"{new.path}: {len(new.done())} trajectories, format 2, {new.storage.profile}")


@app.command()
def stats(path: _Directory) -> None:
    """Write stats.yaml, The Well's normalisation constants, and print it."""
    store = _open(path)
    store.stats()
    typer.echo((store.path / "stats.yaml").read_text(encoding="utf-8"), nl=False)


@app.command()
def solves(
    path: _Directory,
    split: Annotated[str | None, typer.Option(help="train, valid or test; all by default.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what each solver took: means per solve, the worst true residual, CPU seconds."""
    from simlab.store.solves import summary, summary_text

    rows = summary(_open(path).solves(split))
    plain = [{key: None if value != value else value for key, value in row.items()} for row in rows]
    typer.echo(json.dumps(plain) if as_json else summary_text(rows))


@app.command()
def serve(
    path: _Directory,
    address: Annotated[
        str | None,
        typer.Option(
            help="Where to listen: tcp://127.0.0.1:* for this host only, which is the default; "
            "tcp://0.0.0.0:* for others; ipc:///a/file for a socket of this host."
        ),
    ] = None,
    endpoint: Annotated[
        Path | None,
        typer.Option(help="File for address and token.", show_default="stream.json in the store"),
    ] = None,
    attach: Annotated[bool, typer.Option("--attach", hidden=True)] = False,
) -> None:
    """Hand records on to trainers that cannot read the files, until Ctrl-C.

    They find the server through the file with its address and token: copy that to their host and
    name it there, as in --set train.channel=stream.json.
    """
    from simlab.store.stream import LOOPBACK, StreamServer

    parent, begun = os.getppid(), time.monotonic()

    def is_left_alone(idle_seconds: float) -> bool:
        """Return whether the run's supervisor is gone and nobody has asked for long."""
        return attach and os.getppid() != parent and idle_seconds > _ORPHAN_SECONDS

    while attach and not (path / "campaign.json").exists():  # a run whose solvers are to make it
        if is_left_alone(time.monotonic() - begun):
            break
        time.sleep(_POLL_SECONDS)
    server = StreamServer(_open(path).path, address or LOOPBACK, endpoint)
    typer.echo(f"{server.address}, token in {server.endpoint}")
    with suppress(KeyboardInterrupt):
        server.run(until=lambda: is_left_alone(server.idle_seconds))
    server.close()


@view.command()
def pdebench(
    path: _Directory,
    layout: Annotated[
        str, typer.Option(help="darcy, scalar, flow or groups; auto: what the schema fits.")
    ] = "auto",
    nu: Annotated[str | None, typer.Option(help="Input field shown as nu.")] = None,
    tensor: Annotated[str | None, typer.Option(help="Output field shown as tensor.")] = None,
) -> None:
    """Make the file that PDEBench's loaders read, and check it."""
    from simlab.store.pdebench import pdebench as make

    store = _open(path)
    _check_view(store, make(store, layout=layout, nu=nu, tensor=tensor))


@view.command()
def master(path: _Directory) -> None:
    """Make one file that shows all sealed trajectories, and check it."""
    from simlab.store.views import master as make

    store = _open(path)
    _check_view(store, make(store))


@view.command("verify")
def verify_view(
    path: _Directory,
    name: Annotated[str, typer.Argument(help="The view: a file in views/.")],
) -> None:
    """Check a view before it is used: are all sources there, and what was sealed."""
    store = _open(path)
    _check_view(store, store.path / "views" / name)


def _check_view(store: SnapshotStore, made: Path) -> None:
    from simlab.store.views import verify_view

    problems = verify_view(store, made)
    for problem in problems:
        typer.echo(problem)
    if problems:
        raise typer.Exit(1)
    typer.echo(str(made))


@app.command()
def xdmf(
    path: _Directory,
    split: Annotated[str, typer.Option(help="train, valid or test.")] = "train",
    trajectory: Annotated[
        list[int] | None, typer.Option("--trajectory", "-t", help="Only these; may be repeated.")
    ] = None,
) -> None:
    """Make sidecars that ParaView opens."""
    from simlab.store.xdmf import xdmf as write

    for made in write(_open(path), split, ids=trajectory or None):
        typer.echo(str(made))
