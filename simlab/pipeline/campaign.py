"""The campaign: many samples of one family, solved by groups of ranks, written to a snapshot store.

    world -> groups of equal size -> one chain of samples per group -> one writer per group root

    pilot (:mod:`.pilot`)                    where the solver is to be chosen
    static space (:mod:`.static_space`)      where it has one
    order (:mod:`.order`)                    where the solver carries something along
    held-out splits: chains, stealing (:mod:`.stealing`), seal
    training samples: the same

The held-out splits are solved and sealed first, so that a trainer finds its validation set ready.
Groups never wait for each other inside a chain: progress goes to rank 0 in messages that nobody
waits for, and no world collective is called per sample. A failed sample is recorded and skipped. A
killed campaign resumes with what is missing, in the same order, on any number of ranks, by the same
solver, and gives the same data to the solver's tolerance; what it solves again is the one sample
that each chain was at.

Cost per sample beside assembly and solve: drawing the sample, one gather of the solution to the
group's root when the group has several ranks, one record appended (copy and checksum), one stat
call.
"""

from __future__ import annotations

import logging
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from simlab.core.comm import agreement, split, world
from simlab.core.errors import ConfigError, ConvergenceError
from simlab.core.progress import duration
from simlab.core.runs import RunDirectory
from simlab.learn.layout import learned_schema
from simlab.pipeline.case import Campaign, Case, completed
from simlab.pipeline.chain import Outcome
from simlab.pipeline.draws import redrawn
from simlab.pipeline.order import AS_DRAWN, wanted_order
from simlab.pipeline.pilot import samples_of_a_pilot
from simlab.pipeline.stealing import Crew
from simlab.pipeline.tally import Tally
from simlab.pipeline.work import Work, ended_in, parts_of
from simlab.problems.breed import Breed
from simlab.problems.family import Family, marches
from simlab.store.store import SnapshotStore

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["check_case", "generate", "plan", "run_campaign"]

log = logging.getLogger("simlab.campaign")


def generate(
    family: Family,
    *,
    out: str | Path,
    n: int = 200,
    seed: int = 71093,
    solver: Any = "auto",
    sampler: Any = None,
    resume: bool = True,
    fresh: bool = False,
    comm: MPI.Comm | None = None,
) -> SnapshotStore:
    """Solve ``n`` samples of a family and return the sealed store.

    Collective on ``comm`` (default: world).

    Parameters
    ----------
    family : Family
    out : str or Path
        Run directory. When it holds the same campaign already, what is missing is solved.
    n, seed : int
        Number of samples and seed of the study.
    solver : str, mapping or LinearSolver
        Kind, table or instance.
    sampler : str, mapping or Sampler, optional
        How scalar parameters are spread over their box; independent and uniform when left out.
    resume, fresh : bool
        Go on with a run that is there (default), or delete it and start again.

    Returns
    -------
    SnapshotStore
        ``store.split("train")`` and so on.

    Raises
    ------
    ConfigError
        For wrong input, before any work.
    """
    comm = comm or world()
    case = Case(
        family=cast(Any, family), solver=solver, campaign=Campaign(n=n, seed=seed, sampler=sampler)
    )
    run = RunDirectory(out)
    with agreement(comm):
        if comm.rank == 0:
            RunDirectory.start(
                out,
                case.tables(),
                resume=resume,
                fresh=fresh,
                complete=completed,
                ranks=comm.size,
                seed=seed,
            )
    run_campaign(case, run, comm)
    return SnapshotStore.open(run.store)


def check_case(case: Case) -> None:
    """Look at everything a campaign needs before it starts.

    Rank-local; loads neither PETSc nor MPI. Checks files, groups, values, one drawn sample and
    the schema, and raises :class:`ConfigError` or :class:`SchemaError`.
    """
    if getattr(case.family, "reproduction_only", False):
        raise ConfigError(
            f"family.kind = {case.family.kind!r} reproduces published timings and is not a "
            'discretised equation: its solutions are refused as data; choose another kind, "darcy" '
            "for flow in porous media"
        )
    if marches(case.family) and case.solver.kind != "auto":
        raise ConfigError(
            f"solver.kind = {case.solver.kind!r}: family {case.family.kind!r} steps by itself and "
            "has no linear systems to solve; leave [solver] out"
        )
    case.family.validate()
    schema = case.family.schema
    if len(schema.times) != case.family.steps:
        raise ConfigError(
            f"family {case.family.kind}: {case.family.steps} steps, but {len(schema.times)} times"
        )
    last = case.campaign.n - 1
    for sample in case.space.sample(1, case.campaign.seed, last):
        schema.check_sample(sample)
    if case.train is not None:
        case.train.operator.check(learned_schema(case.train, schema))


def plan(case: Case, n_ranks: int, directory: Path) -> dict[str, str]:
    """Size a campaign without touching anything: what ``--dry-run`` prints.

    Raises
    ------
    ConfigError
        When the expected bytes do not fit on the disk.
    """
    schema, campaign = case.family.schema, case.campaign
    if n_ranks % campaign.ranks_per_group:
        raise ConfigError(
            f"campaign.ranks_per_group = {campaign.ranks_per_group} does not divide {n_ranks} ranks"
        )
    expected = float(campaign.storage.bytes_per_value() * campaign.n * schema.values_per_sample)
    parent = next(place for place in (directory, *directory.resolve().parents) if place.exists())
    free = shutil.disk_usage(parent).free
    if 2.1 * expected > free:
        raise ConfigError(
            f"{campaign.n} samples need about {2.1 * expected / 1e9:.1f} GB while they are "
            f"written, {parent} has {free / 1e9:.1f} GB: lower campaign.n or choose another --out"
        )
    splits = ", ".join(f"{name} {share:.0%}" for name, share in campaign.split.items())
    return {
        "family": f"{case.family.kind}, {case.family.steps} step(s)",
        "grid": " x ".join(map(str, schema.shape)),
        "samples": f"{campaign.n} ({splits}), seed {campaign.seed}, "
        f"{campaign.sampler.kind if campaign.sampler else 'independent'}",
        "fields": ", ".join(f"{spec.name} ({spec.role})" for spec in schema.fields),
        "parameters": ", ".join(schema.parameters) or "none",
        "solver": "none, the family steps by itself"
        if marches(case.family)
        else f"{case.solver.kind}, rtol {case.solver.rtol:.1e}",
        "order": _order_in_words(case),
        "ranks": f"{n_ranks} in {n_ranks // campaign.ranks_per_group} group(s)",
        "data": f"{expected / 1e6:.1f} MB in shards; {free / 1e9:.1f} GB free",
    }


def run_campaign(
    case: Case, run: RunDirectory, comm: MPI.Comm | None = None, shard: tuple[int, int] = (0, 1)
) -> Outcome:
    """Solve what is missing of a case's campaign. Collective on ``comm`` (default: world).

    Parameters
    ----------
    case : Case
    run : RunDirectory
        Started on rank 0 already; every rank names the same one.
    shard : (int, int)
        Part ``i`` of ``n`` of the samples, for arrays of independent jobs.

    Returns
    -------
    Outcome
        Sums over all groups on every rank.

    Raises
    ------
    ConfigError
        On every rank, before any work, when something the case names is wrong.
    ConvergenceError
        When more than ``campaign.max_failures`` samples failed.
    """
    comm = comm or world()
    cpu = time.process_time()
    with agreement(comm):
        check_case(case)
        plan(case, comm.size, run.path)
    parts: list[np.ndarray] = []
    ended: set[int] = set()
    n_done = 0
    with agreement(comm):
        if comm.rank == 0:
            store = _open_store(case, run)
            run.update(campaign={"state": "running"})
            parts, ended, n_done = parts_of(store, shard), ended_in(store), len(store.done())
    parts, ended = comm.bcast((parts, ended))
    store = SnapshotStore.open(run.store)
    group = split(comm, case.campaign.ranks_per_group)
    work = Work(case, run, store, group, shard, parts, ended)
    begun = time.perf_counter()
    with (
        Crew(group) as crew,
        Tally(
            comm,
            run,
            total=len(work.missing(np.concatenate(parts))),
            before=n_done,
            ranks_per_group=case.campaign.ranks_per_group,
            max_failures=case.campaign.max_failures,
        ) as tally,
        work.chain as chain,
    ):
        work.prepare(crew, tally)
        for part in parts:
            work.walk(part, crew, tally)
    outcome = chain.finish(crew.n_taken)
    chain.destroy()  # collective, so not on the way out of an error that one rank has
    outcome.cpu["all"] = outcome.groups[0]["root_cpu_seconds"] = time.process_time() - cpu
    if not group.is_root:  # the root speaks for its group; the others add their CPU time only
        outcome = Outcome(cpu=outcome.cpu, stopped=outcome.stopped)
    gathered = comm.gather(outcome)
    total = Outcome()
    with agreement(comm):
        if comm.rank == 0:
            for part in gathered or ():
                total.merge(part)
            own = set(np.concatenate(parts).tolist())
            total.n_missing = len(own - ended_in(store))
            total.n_failed = len(own & set(store.failed()))
            total.stopped = total.stopped and total.n_missing > 0
            seconds = time.perf_counter() - begun
            facts = _facts(case, run, store, total, work, seconds)
            run.update(campaign=facts, seconds={"generate": seconds})
    total = comm.bcast(total)
    if total.failed > case.campaign.max_failures:
        raise ConvergenceError(_too_many(case, total))
    return total


def _too_many(case: Case, total: Outcome) -> str:
    return (
        f"{total.failed} samples failed, more than campaign.max_failures = "
        f"{case.campaign.max_failures}; the first: {total.failures[0]['reason']}"
    )


def _order_in_words(case: Case) -> str:
    """Return what is known of the order before the solver has been chosen."""
    is_active = isinstance(case.campaign.sampler, Breed)
    if case.campaign.order == "auto" and samples_of_a_pilot(case) and not is_active:
        return "auto: greedy if the pilot picks a solver that carries a space, else as drawn"
    kind = wanted_order(case, case.solver).kind
    named = "as drawn" if kind == AS_DRAWN else kind
    return f"auto: {named}" if case.campaign.order == "auto" else named


def _open_store(case: Case, run: RunDirectory) -> SnapshotStore:
    """Create the store, or open it and mend what a crash left. Rank 0 only."""
    store = SnapshotStore.create(
        run.store,
        case.family.schema,
        n=case.campaign.n,
        seed=case.campaign.seed,
        split=case.campaign.split,
        config=case.tables(),
        storage=case.campaign.storage,
    )
    store.recover()
    return store


def _facts(
    case: Case, run: RunDirectory, store: SnapshotStore, total: Outcome, work: Work, seconds: float
) -> dict[str, Any]:
    """Return the manifest's campaign section, and say the cost line that ends every campaign."""
    hours = total.cpu.get("all", 0.0) / 3600
    solves = max(total.solves, 1)
    rate = total.done / hours if hours else 0.0
    log.info(
        "%d samples in %s, %d failed; %.3g core-hours, %.3g samples per core-hour, "
        "%.3g operator applications per solve, %.3g MB written",
        total.done,
        duration(seconds),
        total.failed,
        hours,
        rate,
        total.operator_applies / solves,
        total.bytes / 1e6,
    )
    standing = {
        "state": "stopped" if total.stopped else "done",
        "n": case.campaign.n,
        "done": len(store.done()),
        "failed": len(store.failed()),
        "redrawn": sum(redrawn(run).values()),
    }
    if total.failed > case.campaign.max_failures:
        standing |= {"state": "failed", "error": f"ConvergenceError: {_too_many(case, total)}"}
    if not total.solves:  # nothing was left to solve: what an earlier call said of its work stands
        return standing
    decision = work.chain.decision
    advice: dict[str, Any] = {}
    if decision:
        advice = {"reason": decision.reason, "pilot": decision.table}
    if marches(case.family):
        advice = {"reason": "this family steps by itself, without linear systems"}
    else:
        advice |= {
            "iterations_mean": total.iterations / solves,
            "operator_applies_mean": total.operator_applies / solves,
            "pc_applies_mean": total.pc_applies / solves,
            "worst_true_relres": total.worst_relres,
        }
    return standing | {
        "solver": work.chain.solver_name,
        **advice,
        "core_hours": hours,
        "samples_per_core_hour": rate,
        "bytes": total.bytes,
        "seconds": {phase: spent for phase, spent in total.wall.items()},
        "cpu_seconds": total.cpu,
        "failures": total.failures[:100],
        "groups": sorted(total.groups, key=lambda facts: int(facts["group"])),
    }
