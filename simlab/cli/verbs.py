"""The verbs on a case: run, generate, train, evaluate, plot, report, watch."""

from __future__ import annotations

import os
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from simlab.core import comm
from simlab.core.comm import agreement
from simlab.core.config import differences
from simlab.core.errors import ConfigError
from simlab.core.progress import configure_logging
from simlab.core.runs import RunDirectory
from simlab.core.signals import interrupts
from simlab.linalg import petsc
from simlab.pipeline.campaign import check_case, plan, run_campaign
from simlab.pipeline.case import Case, completed, load_case
from simlab.pipeline.supervisor import refuse_if_at_work, refuse_if_supervised

__all__ = ["add_to"]

CasePath = Annotated[Path, typer.Argument(metavar="CASE", help="Case file (TOML).")]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.")]
Out = Annotated[Path | None, typer.Option(help="Run directory.", show_default="runs/CASE")]
Set = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override, e.g. family.cells=32.")
]
Smoke = Annotated[bool, typer.Option("--smoke", help="Apply the case's [smoke] table: seconds.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Resolve, size, print; touch nothing.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run that is there.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Delete the run that is there first.")]
Attach = Annotated[bool, typer.Option("--attach", hidden=True)]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say more.")]

_NICENESS = 10


def add_to(app: typer.Typer) -> None:
    """Register the verbs."""
    for verb in (run, generate, train, evaluate, plot, report, watch):
        app.command()(verb)


def run(
    case: CasePath,
    n: Annotated[
        int | None,
        typer.Option("-n", min=1, help="Solver ranks.", show_default="campaign.ranks_per_group"),
    ] = None,
    out: Out = None,
    set_: Set = [],  # noqa: B006 (typer reads it)
    smoke: Smoke = False,
    dry_run: DryRun = False,
    resume: Resume = False,
    fresh: Fresh = False,
    max_restarts: Annotated[
        int, typer.Option(min=0, help="Times the solvers, or the trainer, are started again.")
    ] = 3,
    patience: Annotated[
        float, typer.Option(min=1, help="Seconds of silence, at least, that count as hung.")
    ] = 30,
    verbose: Verbose = False,
) -> int:
    """Solve, train beside it, evaluate, plot and write the report page."""
    if comm.launched_by_mpi():
        raise ConfigError(
            "`simlab run` starts its own ranks: call it without mpirun, as `simlab run CASE -n 2`"
        )
    from simlab.pipeline.online import supervise
    from simlab.pipeline.training import evaluate_run, report_run

    configure_logging(verbose=verbose)
    resolved, directory = _resolve(case, out, set_, smoke)
    n = n or resolved.campaign.ranks_per_group
    _check(resolved, n, directory)
    channel = resolved.train.channel if resolved.train else "tail"
    if channel not in ("tail", "stream"):
        raise ConfigError(
            f"train.channel: `simlab run` follows its own store, by 'tail' or 'stream'; with "
            f"{channel!r} use `simlab train`"
        )
    if dry_run:
        return _print_plan(resolved, n, directory)
    refuse_if_supervised(directory, fresh)
    here = RunDirectory.start(
        directory,
        resolved.tables(),
        resume=resume,
        fresh=fresh,
        complete=completed,
        ranks=n,
        seed=resolved.campaign.seed,
    )
    n_batches = resolved.train.n_batches if resolved.train else 0
    code = supervise(
        here,
        n,
        resolved.campaign.n,
        n_batches,
        petsc.arguments(),
        max_restarts=max_restarts,
        channel=channel,
        patience=patience,
    )
    if code == 130:
        typer.echo(f"stopped; `simlab run {case} --out {directory} --resume` goes on")
        return code
    if resolved.train:
        typer.echo(str(evaluate_run(here)))
    typer.echo(f"report: {report_run(here)}")
    return code


def generate(
    case: CasePath,
    out: Out = None,
    shard: Annotated[
        str, typer.Option(metavar="I/N", help="Solve part I of N of the samples (job arrays).")
    ] = "0/1",
    set_: Set = [],  # noqa: B006
    smoke: Smoke = False,
    dry_run: DryRun = False,
    resume: Resume = False,
    fresh: Fresh = False,
    attach: Attach = False,
    verbose: Verbose = False,
) -> int:
    """Solve the case's samples into a store. Under mpirun, groups of ranks work side by side."""
    world = comm.world()
    with agreement(world):  # else a rank that is quicker ends the job before this is said
        resolved, directory = _resolve(case, out, set_, smoke)
        part = _shard(shard)
    configure_logging(world.rank, directory, verbose)
    with agreement(world):
        _check(resolved, world.size, directory)
    if dry_run:
        return _print_plan(resolved, world.size, directory) if world.rank == 0 else 0
    here = RunDirectory(directory)
    with agreement(world):
        if world.rank == 0 and not attach:
            refuse_if_supervised(directory, fresh, "solvers")
            RunDirectory.start(
                directory,
                resolved.tables(),
                resume=resume or part[1] > 1,  # the parts of an array share one run
                fresh=fresh,
                complete=completed,
                ranks=world.size,
                seed=resolved.campaign.seed,
            )
    # attached: Ctrl-C goes to the supervisor, and a launcher that ends its ranks stops no run
    with nullcontext() if attach else interrupts(here.request_stop):
        outcome = run_campaign(resolved, here, world, part)
    if world.rank == 0 and outcome.stopped:
        typer.echo(f"stopped with {outcome.n_missing} samples to go; --resume goes on")
    if world.rank == 0:
        typer.echo(f"store: {here.store}")
    return 3 if outcome.n_failed else 0


def train(
    case: CasePath,
    out: Out = None,
    solver_ranks: Annotated[
        int, typer.Option(min=0, help="Cores to leave to solvers while they run.")
    ] = 0,
    set_: Set = [],  # noqa: B006
    smoke: Smoke = False,
    dry_run: DryRun = False,
    resume: Resume = False,
    fresh: Fresh = False,
    attach: Attach = False,
    verbose: Verbose = False,
) -> int:
    """Train the case's operator on the run's store, finished or still being written."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is loaded, see online.py
    from simlab.pipeline.training import train_run

    configure_logging(verbose=verbose)
    resolved, directory = _resolve(case, out, set_, smoke)
    if resolved.train is None:
        raise ConfigError("the case has no [train] table, so there is nothing to train", str(case))
    if dry_run:
        return _print_plan(resolved, max(solver_ranks, 1), directory)
    if not attach:
        refuse_if_at_work(directory, "trainer")
    here = _training_run(resolved, directory)
    if not attach:
        here.forget_stop()
    train_run(resolved, here, solver_ranks, resume=resume or attach, fresh=fresh)
    return 0


def evaluate(run: RunPath, verbose: Verbose = False) -> int:
    """Hold the run's model against its test split and write evaluation.json."""
    from simlab.pipeline.training import evaluate_run

    configure_logging(verbose=verbose)
    typer.echo(str(evaluate_run(RunDirectory.open(run))))
    return 0


def plot(run: RunPath, verbose: Verbose = False) -> int:
    """Draw the run's figures, each with the numbers behind it."""
    from simlab.pipeline.plots import save_figures

    configure_logging(verbose=verbose)
    for path in save_figures(RunDirectory.open(run).path):
        typer.echo(str(path))
    return 0


def report(run: RunPath, verbose: Verbose = False) -> int:
    """Draw the figures and write report.html, one self-contained page."""
    from simlab.pipeline.training import report_run

    configure_logging(verbose=verbose)
    typer.echo(str(report_run(RunDirectory.open(run))))
    return 0


def watch(
    run: RunPath,
    port: Annotated[
        int,
        typer.Option(min=0, max=65535, help="Port on this machine.", show_default="a free one"),
    ] = 0,
    verbose: Verbose = False,
) -> int:
    """Serve a page that follows the run, going on or finished, until Ctrl-C."""
    from simlab.pipeline.watch import Watcher, server

    configure_logging(verbose=verbose)
    here = RunDirectory.open(run)
    try:
        serving = server(Watcher(here), port)
    except OSError as error:
        raise ConfigError(f"--port {port} cannot be used: {error.strerror}") from None
    typer.echo(f"http://127.0.0.1:{serving.server_port}/ follows {here.path}; Ctrl-C ends")
    os.nice(_NICENESS)  # pictures take time of the run's own cores
    with serving, suppress(KeyboardInterrupt):
        serving.serve_forever()
    return 0


def _resolve(case: Path, out: Path | None, overrides: list[str], smoke: bool) -> tuple[Case, Path]:
    resolved = load_case(case, overrides, smoke)
    name = case.stem + ("_smoke" if smoke else "")
    return resolved, out if out is not None else Path("runs") / name


def _check(case: Case, n_ranks: int, directory: Path) -> None:
    check_case(case)
    plan(case, n_ranks, directory)


def _print_plan(case: Case, n_ranks: int, directory: Path) -> int:
    lines = plan(case, n_ranks, directory) | {"run directory": str(directory)}
    if case.train is not None:
        lines["training"] = f"{case.train.operator!r}, {case.train.n_batches} batches"
    width = max(map(len, lines))
    for name, text in lines.items():
        typer.echo(f"{name:{width}}  {text}")
    return 0


def _shard(text: str) -> tuple[int, int]:
    index, slash, count = text.partition("/")
    if not (slash and index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise ConfigError(f"--shard {text}: expected I/N with 0 <= I < N, e.g. 0/8")
    return int(index), int(count)


def _training_run(case: Case, directory: Path) -> RunDirectory:
    """Open the run that training belongs to, or start it when the trainer comes first."""
    tables: dict[str, Any] = case.tables()
    if not (directory / "manifest.json").is_file():
        return RunDirectory.start(directory, tables, resume=False, seed=case.campaign.seed)
    run = RunDirectory.open(directory)
    before = completed(run.manifest()["case"])
    settled = {name: value for name, value in before.items() if name != "train"}
    wanted = {name: value for name, value in tables.items() if name != "train"}
    changed = differences(settled, wanted)
    if changed:
        raise ConfigError(
            [f"{line}: the case changed since its data were made" for line in changed],
            str(directory),
        )
    return run
