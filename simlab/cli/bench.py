"""``simlab bench NAME``: reproduce a table of the documentation."""

from __future__ import annotations

import inspect
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from simlab.core import comm
from simlab.core.errors import ConfigError

__all__ = ["add_to"]


def add_to(app: typer.Typer) -> None:
    """Register the verb."""
    app.command()(bench)


def bench(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Which table; none: list them.")] = "",
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes, a minute or so.")] = False,
    json: Annotated[Path | None, typer.Option("--json", help="Also write the result here.")] = None,
    family: Annotated[
        str | None, typer.Option("--family", help="skr: only this family, or that of a case file.")
    ] = None,
    n: Annotated[int | None, typer.Option("--n", help="skr: about how many unknowns.")] = None,
    pc: Annotated[
        str | None, typer.Option("--pc", help="skr: preconditioner: ilu, asm64, none...")
    ] = None,
    samples: Annotated[
        int | None, typer.Option("--samples", help="skr: systems per table.")
    ] = None,
    experiment: Annotated[
        str | None,
        typer.Option("--experiment", help="online: parts joined by commas: e1,e2,e3,e6,wall."),
    ] = None,
    figures: Annotated[
        Path | None, typer.Option("--figures", help="skr, online: draw figures into this folder.")
    ] = None,
) -> int:
    """Measure and print one table: every contestant, losing ones too, side by side."""
    from simlab.bench import runner

    if not name:
        for known, line in runner.bench_names().items():
            typer.echo(f"{known:16}  {line}")
        return 0
    module = runner.bench_module(name)
    options: dict[str, Any] = {"family": family, "n": n, "pc": pc, "samples": samples}
    options |= {"experiment": experiment, "figures": figures}
    given = {key: value for key, value in options.items() if value is not None}
    for key in given.keys() - inspect.signature(module.run).parameters.keys():
        raise ConfigError(f"bench {name} has no option --{key}")
    if "OMP_NUM_THREADS" not in os.environ and not comm.launched_by_mpi():
        _restart_with_one_thread()
    result = module.run(quick=quick, **given)
    if json is not None:
        if experiment is not None and json.is_file():
            result = module.joined(json, result)
        runner.save(result, json)
        typer.echo(f"written: {json}")
    return 0


def _restart_with_one_thread() -> None:
    """Start this command again with one BLAS thread, which is read when numpy is first imported."""
    sys.stdout.flush()
    command = [sys.executable, "-m", "simlab", *sys.argv[1:]]
    os.execve(sys.executable, command, os.environ | {"OMP_NUM_THREADS": "1"})
