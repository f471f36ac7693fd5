"""Training on a run's store while it fills or after, then evaluation, figures and report."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simlab.core.config import build, differences
from simlab.core.errors import ConfigError, StoreError
from simlab.core.progress import Progress
from simlab.core.runs import RunDirectory
from simlab.core.samples import Trajectory
from simlab.core.signals import interrupts
from simlab.pipeline.case import Case, completed
from simlab.pipeline.draws import active_sampling
from simlab.pipeline.evaluate import Evaluation, evaluate
from simlab.pipeline.heartbeat import Heart
from simlab.pipeline.order import AS_DRAWN
from simlab.store.channel import Channel, TailChannel, open_channel, received_split
from simlab.store.store import SnapshotStore
from simlab.store.stream import ENDPOINT

if TYPE_CHECKING:
    from simlab.learn.ranks import Ranks
    from simlab.learn.stream import FollowedStream
    from simlab.learn.trainer import Trainer

__all__ = ["evaluate_run", "report_run", "train_beside", "train_run"]

log = logging.getLogger("simlab.train")

_POLL_SECONDS = 0.2
_PATIENCE_SECONDS = 30.0


def train_run(
    case: Case,
    run: RunDirectory,
    solver_ranks: int = 0,
    *,
    resume: bool = False,
    fresh: bool = False,
) -> None:
    """Train the case's operator on the run's store, live or finished, into ``model/``.

    Returns when the budget is used up, or after a stop was asked for (by the run's STOP file or a
    signal), with a checkpoint to resume from.

    Raises
    ------
    ConfigError
        When a model or checkpoint is there and neither ``resume`` nor ``fresh`` was asked for, or
        one that was trained by other settings, and when another process trains in this run.
    """
    busy = f"another process is training in {run.path} already: wait for it, or end it"
    with run.alone("trainer", busy):
        _settle(case, run, resume, fresh)
        _train(case, run, solver_ranks, resume)


def _train(case: Case, run: RunDirectory, solver_ranks: int, resume: bool) -> None:
    from simlab.learn.trainer import shown_by
    from simlab.pipeline.companions import training_ranks

    assert case.train is not None
    with interrupts(_say_stopping) as received, run.phase("train") as facts:
        heart = Heart(run, "trainer")

        def stop() -> bool:  # asked before every batch, and while waiting for data
            heart.beat()
            return bool(received) or run.stop_requested()

        channel = _wait_for_channel(case, run, stop)
        validation = _wait_for_validation(channel, run, stop) if channel else None
        if channel is None or validation is None:
            facts["state"] = "stopped"
            return
        progress = Progress("training", case.train.n_batches, unit="batch")
        _warn_of_order(case, run)
        observers = (run.log_metric, shown_by(progress))
        with training_ranks(run, case.train.ranks, solver_ranks, resume) as ranks:
            trainer, stream = _begun(case, run, channel, ranks, solver_ranks, resume, observers)
            with progress:
                trainer.run(stream, validation, stop)
        facts |= {
            "state": "done" if trainer.is_done else "stopped",
            "batches": trainer.batch,
            "operator": repr(case.train.operator),
            "items": stream.n_items,
        }


def train_beside(run: RunDirectory, ranks: Ranks, solver_ranks: int, resume: bool) -> None:
    """Train as a further rank of :func:`train_run`, which says when to stop."""
    case = build(Case, run.manifest()["case"])
    channel = _wait_for_channel(case, run, lambda: False)
    assert channel is not None
    trainer, stream = _begun(case, run, channel, ranks, solver_ranks, resume)
    trainer.run(stream)


def _begun(
    case: Case,
    run: RunDirectory,
    channel: Channel,
    ranks: Ranks,
    solver_ranks: int,
    resume: bool,
    observers: Sequence[Callable[..., Any]] = (),
) -> tuple[Trainer, FollowedStream]:
    """Return one rank's trainer and its stream, with ``resume`` at the newest checkpoint."""
    from simlab.learn.stream import FollowedStream
    from simlab.learn.trainer import Trainer

    assert case.train is not None
    stream = FollowedStream(channel)
    trainer = Trainer(
        case.train,
        channel.schema,
        run.model,
        observers=observers,
        solver_ranks=solver_ranks,
        ranks=ranks,
        active=active_sampling(case, run, channel),
    )
    if resume:
        trainer.resume(stream)
    return trainer, stream


def evaluate_run(run: RunDirectory) -> Evaluation:
    """Hold the run's model against its test split and the mean output; write evaluation.json."""
    from simlab.learn.surrogate import NeuralSurrogate

    if not (run.model / "model.json").is_file():
        raise StoreError(f"{run.path} has no trained model; run `simlab train` first")
    with run.phase("evaluate"):
        store = SnapshotStore.open(run.store)
        surrogate = NeuralSurrogate.load(run.model)
        evaluation = evaluate(surrogate, store.split("test"), baseline=store.split("train"))
        evaluation.write(run.path / "evaluation.json")
    return evaluation


def report_run(run: RunDirectory) -> Any:
    """Draw the figures, write the page and return its path."""
    from simlab.pipeline.plots import save_figures
    from simlab.pipeline.report import write_report

    save_figures(run.path)
    return write_report(run.path)


def _settle(case: Case, run: RunDirectory, resume: bool, fresh: bool) -> None:
    """Make room for the training, or see that it is the one that is there; then note it."""
    wanted = case.tables()["train"]
    if run.model.exists() and fresh:
        shutil.rmtree(run.model)
    elif run.model.exists() and not resume:
        raise ConfigError(
            f"{run.model} holds a training already: --resume goes on with it, "
            "--fresh deletes it and starts again"
        )
    elif run.model.exists():
        before = completed(run.manifest()["case"]).get("train", {})
        changed = differences(before, wanted, "train")
        if changed:
            raise ConfigError(
                [f"{line}: changed since the training began" for line in changed], str(run.model)
            )
    if run.manifest()["case"].get("train") != wanted:
        run.update(case={"train": wanted})


def _warn_of_order(case: Case, run: RunDirectory) -> None:
    """Say once that a queue hands sorted samples on as they come: batches of look-alikes."""
    assert case.train is not None
    order = run.manifest().get("campaign", {}).get("order", AS_DRAWN)
    if order != AS_DRAWN and case.train.buffer.kind == "fifo":
        log.warning(
            "samples arrive in %s order and train.buffer.kind = 'fifo' keeps it, so the items of a "
            "batch resemble each other: use 'reservoir' or 'firo', or campaign.order = '%s'",
            order,
            AS_DRAWN,
        )


def _wait_for_channel(case: Case, run: RunDirectory, stop: Callable[[], bool]) -> Channel | None:
    """Wait for the store, or for the server beside it, and return the channel to it."""
    assert case.train is not None
    if case.train.channel == "tail":
        where, needs, what = run.store, run.store / "campaign.json", "the store to be made"
    else:
        is_own = case.train.channel == "stream"
        where = needs = run.store / ENDPOINT if is_own else Path(case.train.channel)
        what = f"a server to leave {where}"
    patience = _Patience(run, what)
    while not stop():
        if needs.is_file():
            try:
                return open_channel(where, stop)
            except StoreError:
                if not stop():
                    raise
        else:
            patience.wait()
    return None


def _wait_for_validation(
    channel: Channel, run: RunDirectory, stop: Callable[[], bool]
) -> Sequence[Trajectory] | None:
    """Wait until every validation sample has ended, and is sealed where files are at hand."""
    ids = channel.ids("valid")
    patience = _Patience(run, f"the {len(ids)} validation samples")
    if not isinstance(channel, TailChannel):
        return received_split(channel, "valid", stop, patience.wait)
    store = channel.store
    while not stop():
        done = store.done()
        ended = done | set(store.failed())
        sealed = store.split("valid")
        if ended.issuperset(ids.tolist()) and len(sealed) == len(done & set(ids.tolist())):
            return sealed
        patience.wait()
    return None


class _Patience:
    """Waiting that says what for, and what it knows of the campaign."""

    def __init__(self, run: RunDirectory, what: str) -> None:
        self._run, self._what = run, what
        self._spoke = time.monotonic()

    def wait(self) -> None:
        time.sleep(_POLL_SECONDS)
        if time.monotonic() - self._spoke > _PATIENCE_SECONDS:
            self._spoke = time.monotonic()
            state = self._run.manifest().get("campaign", {}).get("state", "not started")
            log.info("waiting for %s (campaign: %s)", self._what, state)


def _say_stopping() -> None:
    log.warning("stopping after the batch at hand; once more ends at once")
