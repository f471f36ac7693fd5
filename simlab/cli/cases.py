"""The verbs that only look: check a case, list cases."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated

import tomli_w
import typer

from simlab.core.errors import ConfigError
from simlab.pipeline.campaign import check_case
from simlab.pipeline.case import load_case

__all__ = ["add_to"]


def add_to(app: typer.Typer) -> None:
    """Register the verbs."""
    for verb in (check, cases):
        app.command()(verb)


def check(
    case: Annotated[Path, typer.Argument(metavar="CASE", help="Case file (TOML).")],
    set_: Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE")] = [],  # noqa: B006
    smoke: Annotated[bool, typer.Option("--smoke", help="Apply the [smoke] table.")] = False,
) -> int:
    """Resolve a case, look at every file it names, and print it with all its defaults."""
    resolved = load_case(case, set_, smoke)
    check_case(resolved)
    typer.echo(tomli_w.dumps(resolved.tables()))
    return 0


def cases(
    directory: Annotated[Path, typer.Argument(help="Where to look.")] = Path("cases"),
) -> int:
    """List the case files of a directory with their titles."""
    found = sorted(directory.glob("*.toml"))
    if not found:
        raise ConfigError(f"no case files (*.toml) in {directory}")
    width = max(len(str(path)) for path in found)
    for path in found:
        title = tomllib.loads(path.read_text(encoding="utf-8")).get("title", "")
        typer.echo(f"{path!s:{width}}  {title}")
    return 0
