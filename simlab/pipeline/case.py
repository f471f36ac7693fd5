"""The case: every table of a case file as one frozen value.

    [family]    what to solve            kind = "darcy", cells = 64, ...
    [solver]    how                      kind = "auto", rtol = 1e-8
    [campaign]  how many, which seed     n = 2000, seed = 71093
    [train]     what learns from it      operator = { kind = "fno" }, n_batches = 2000
    [smoke]     overrides for a run of seconds, used by tests and ``--smoke``

Reading a case loads none of PETSc, MPI and torch, so that a launcher can check it before it starts
anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator

from simlab.core.config import as_table, build, load_tables, settings
from simlab.core.errors import ConfigError
from simlab.learn.settings import TrainSettings
from simlab.linalg.ordering import orderings
from simlab.linalg.system import LinearSolver, solvers
from simlab.problems.breed import Breed
from simlab.problems.family import ParameterSpace, ProblemFamily, families
from simlab.problems.samplers import Sampler, samplers
from simlab.problems.spaces import sampled_by
from simlab.store.storage import Storage

__all__ = ["AS_DRAWN", "Campaign", "Case", "completed", "load_case"]

AS_DRAWN = "sample"
"""Kind of the order that is none."""

_PATH_KEYS = ("file", "mesh")


def _order(value: Any) -> Any:
    return value if value == "auto" else orderings.build(value)


def _sampler(value: Any) -> Sampler | None:
    return None if value is None else samplers.build(value)


@settings
class Campaign:
    """How many samples, drawn how, solved by how many ranks each.

    Attributes
    ----------
    n : int
        Samples; sample ``i`` of a seed is the same in every campaign.
    seed : int
    sampler : a sampler's kind or table, optional
        How scalar parameters are spread over their box: ``"sobol"``, ``"halton"``,
        ``{ kind = "lhs", n = 200 }``, ``{ kind = "list", file = "points.csv" }``; independent and
        uniform when left out. Fields are drawn as ever. ``"breed"``: the training samples near
        those that the training beside the campaign has found hard.
    train, valid, test : float
        Shares of the three splits; they add up to 1.
    order : "auto", or an ordering's kind or table
        In which the samples are solved: ``"sample"`` as drawn, ``"greedy"``, ``"hilbert"``; the
        held-out splits first, each part ordered by itself. ``"auto"``: greedy where the solver
        carries something from system to system, as drawn otherwise, and where samples are drawn
        one by one (``"breed"``). Splits do not depend on it.
    ranks_per_group : int
        Ranks that work on one system together; groups work side by side.
    redraws : int
        How often a sample that fails before its first stored step is drawn anew, with other
        parameters; after that, or later in its course, it is recorded as failed and skipped.
    max_failures : int
        Failed samples after which the campaign gives up; fewer are recorded and skipped.
    profile : {"default", "fast", "archive"}, optional
        How shards are laid out: checked chunks, mappable, or compressed.
    float64 : bool, optional
        Keep fields in double precision beside The Well's single one.
    """

    n: int = Field(200, ge=1)
    seed: int = Field(71093, ge=0)
    sampler: Annotated[Sampler | None, PlainValidator(_sampler)] = None
    train: float = Field(0.8, ge=0, le=1)
    valid: float = Field(0.1, ge=0, le=1)
    test: float = Field(0.1, ge=0, le=1)
    order: Annotated[Any, PlainValidator(_order)] = "auto"
    ranks_per_group: int = Field(1, ge=1)
    redraws: int = Field(0, ge=0)
    max_failures: int = Field(100, ge=0)
    profile: Literal["default", "fast", "archive"] | None = None
    float64: bool | None = None

    def __post_init__(self) -> None:
        total = self.train + self.valid + self.test
        if abs(total - 1.0) > 1e-9:
            raise ConfigError(f"train + valid + test must add up to 1, found {total:g}")
        kind = getattr(self.sampler, "kind", None)
        if self.redraws and kind in ("list", "breed"):
            raise ConfigError(
                f"redraws = {self.redraws}: sampler {kind!r} gives a sample the same parameters "
                "again; leave redraws = 0, or choose another sampler"
            )
        if isinstance(self.sampler, Breed) and getattr(self.order, "kind", AS_DRAWN) != AS_DRAWN:
            raise ConfigError(
                f"order = {self.order.kind!r}: sampler 'breed' draws a sample when it is its turn, "
                f"so there is nothing to order before; leave order out, or give '{AS_DRAWN}'"
            )

    @property
    def split(self) -> dict[str, float]:
        """Shares by split name."""
        return {"train": self.train, "valid": self.valid, "test": self.test}

    @property
    def storage(self) -> Storage:
        """How the store keeps values."""
        return Storage(self.profile or "default", bool(self.float64))


@settings
class Case:
    """A resolved case; ``train`` is absent where only data are wanted."""

    family: Annotated[ProblemFamily, families.field]
    title: str = ""
    solver: Annotated[LinearSolver, solvers.field] = Field(default="auto", validate_default=True)
    campaign: Campaign = Campaign()
    train: TrainSettings | None = None

    def __post_init__(self) -> None:
        if isinstance(self.campaign.sampler, Breed):
            self._check_active(self.train)

    @staticmethod
    def _check_active(train: TrainSettings | None) -> None:
        """Refuse what active sampling cannot go with."""
        name = "campaign.sampler 'breed'"
        if train is None:
            raise ConfigError(
                f"{name} draws what a training finds hard, and the case has no [train] table: give "
                "it one and use `simlab run`, or choose another sampler"
            )
        if train.mode != "live":
            raise ConfigError(
                f"train.mode = {train.mode!r}: with {name} the samples depend on how far the "
                'training has come when each is drawn; mode = "live", or another sampler'
            )
        if train.channel not in ("tail", "stream"):
            raise ConfigError(
                f"train.channel = {train.channel!r}: with {name} training and solvers write into "
                "one run directory; channel = 'tail' or 'stream', or another sampler"
            )

    @cached_property
    def space(self) -> ParameterSpace:
        """The family's parameter space, spread by the campaign's sampler."""
        sampler = self.campaign.sampler
        return self.family.space if sampler is None else sampled_by(self.family.space, sampler)

    def tables(self) -> dict[str, Any]:
        """Return the case as plain tables: the manifest entry and the resolved case file."""
        tables: dict[str, Any] = as_table(self)
        return tables


def load_case(path: str | Path, overrides: Sequence[str] = (), smoke: bool = False) -> Case:
    """Read, resolve and check a case file.

    Paths in it (``file``, ``mesh``) are looked for beside the case file first, then in the working
    directory.

    Raises
    ------
    ConfigError
        With every fault of the file.
    """
    path = Path(path)
    tables = load_tables(path, overrides=overrides, smoke=smoke)
    try:
        return build(Case, _anchored(tables, path.resolve().parent))
    except ConfigError as error:
        raise ConfigError(error.faults, str(path)) from None


def completed(tables: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the tables of a case that an older version resolved, with the keys it did not know.

    What this version cannot read stays as it is.
    """
    try:
        return build(Case, tables).tables()
    except ConfigError:
        return tables


def _anchored(value: Any, directory: Path) -> Any:
    if isinstance(value, list):
        return [_anchored(entry, directory) for entry in value]
    if not isinstance(value, dict):
        return value
    made = {key: _anchored(entry, directory) for key, entry in value.items()}
    for key in _PATH_KEYS:
        if isinstance(made.get(key), str) and (directory / made[key]).exists():
            made[key] = str(directory / made[key])
    return made
