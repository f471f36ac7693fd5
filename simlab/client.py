"""Send what any solver computes to a snapshot store: a few lines in a script that stays as it is.

    with Client.from_env() as c:
        c.declare({"u": "K"}, {"x": x}, times)
        for step in range(c.resume_step, len(times)):
            ...
            c.send(step, times[step], {"u": u})

``send`` returns once the step is in the operating system's hands, so it survives the death of the
process, and it waits for no trainer. A script that was killed is started again in the same way: it
may recompute from the beginning, as steps that the store has are not stored again, or begin at
``resume_step`` from a checkpoint of its own. An exception ends the trajectory as failed, with its
text as the reason.

The script is told by its environment which trajectory to compute; :func:`environment_of` makes one.
Neither torch nor PETSc nor MPI is imported unless the script brings them: give a communicator and
all its ranks call every method, each with its own part of the field; the root gathers and writes.
"""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from simlab.core import environment
from simlab.core.comm import agree, agreement
from simlab.core.config import differences
from simlab.core.errors import ConfigError, SchemaError, StoreError
from simlab.core.reports import Provenance
from simlab.core.samples import Sample
from simlab.store.partial import Partial, find_partial
from simlab.store.schema import Axis, Boundary, FieldSpec, Mesh, Schema
from simlab.store.segments import Writer
from simlab.store.store import SnapshotStore

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["Client", "environment_of"]

log = logging.getLogger("simlab.client")

_UNKNOWN = Provenance()


def environment_of(
    store: str | Path, traj: int, parameters: Mapping[str, float], *, n: int, seed: int
) -> dict[str, str]:
    """Return the variables that tell a client which trajectory of which campaign is its own."""
    return {
        "SIMLAB_STORE": str(Path(store).absolute()),
        "SIMLAB_TRAJ": str(traj),
        "SIMLAB_PARAMETERS": json.dumps(dict(parameters)),
        "SIMLAB_N": str(n),
        "SIMLAB_SEED": str(seed),
    }


class Client:
    """One trajectory on its way from a solver to a store. A context manager.

    Parameters
    ----------
    store : str or Path
        The store; made by the first client that declares, unless it is there.
    traj : int
        Which trajectory, 0 to ``n - 1``.
    parameters : mapping of str to float
        Scalar parameters of this trajectory.
    n, seed : int
        Trajectories of the campaign, and the seed of its study.
    comm : MPI.Comm, optional
        Ranks that compute the trajectory together (or a PETSc communicator). Then every method is
        collective on it, leaving the ``with`` block included; rank 0 writes.

    Attributes
    ----------
    parameters : dict of str to float
    seed : int
    resume_step : int
        First step that the store lacks; settled by :meth:`declare`.
    """

    def __init__(
        self,
        store: str | Path,
        traj: int,
        parameters: Mapping[str, float] | None = None,
        *,
        n: int,
        seed: int,
        comm: MPI.Comm | Any = None,
    ) -> None:
        self.traj = traj
        self.parameters = {name: float(value) for name, value in (parameters or {}).items()}
        self.seed = seed
        self.resume_step = 0
        self._path, self._n = Path(store), n
        self._comm: Any = comm.tompi4py() if hasattr(comm, "tompi4py") else comm
        self._is_root = self._comm is None or self._comm.rank == 0
        self._store: SnapshotStore | None = None
        self._schema: Schema | None = None
        self._writer: Writer | None = None
        self._part: Partial | None = None
        self._layouts: dict[str, Any] = {}
        self._is_done = False
        self._agreed: BaseException | None = None
        with self._together():
            if not 0 <= traj < n:
                raise ConfigError(f"trajectory {traj}: the campaign has 0 to {n - 1}")
            if self._is_root:
                self._look()
        self._share()

    @classmethod
    def from_env(cls, comm: MPI.Comm | Any = None) -> Client:
        """Return the client that the environment describes.

        Raises
        ------
        ConfigError
            Names every variable that is missing or cannot be read.
        """
        found: dict[str, Any] = {}
        faults = []
        readers: dict[str, Callable[[str], Any]] = {
            "SIMLAB_STORE": _read_path,
            "SIMLAB_TRAJ": int,
            "SIMLAB_PARAMETERS": _read_parameters,
            "SIMLAB_N": int,
            "SIMLAB_SEED": int,
        }
        for name, read in readers.items():
            text = environment.read(name, "{}" if name == "SIMLAB_PARAMETERS" else "")
            try:
                found[name] = read(text)
            except ValueError:
                faults.append(f"{name} = {text!r} cannot be read" if text else f"{name} is not set")
        if faults:
            raise ConfigError(faults, "the environment of this client")
        return cls(
            found["SIMLAB_STORE"],
            found["SIMLAB_TRAJ"],
            found["SIMLAB_PARAMETERS"],
            n=found["SIMLAB_N"],
            seed=found["SIMLAB_SEED"],
            comm=comm,
        )

    @property
    def is_done(self) -> bool:
        """Whether the store had the whole trajectory at the start."""
        return self._is_done

    def declare(
        self,
        fields: Mapping[str, str] | Sequence[FieldSpec],
        grid: Mapping[str, Sequence[float] | np.ndarray] | Sequence[Axis],
        times: Sequence[float] | np.ndarray = (0.0,),
        *,
        inputs: Mapping[str, np.ndarray] | None = None,
        name: str = "",
        units: Mapping[str, str] | None = None,
        constants: Mapping[str, float] | None = None,
        boundaries: Sequence[Boundary] = (),
        mesh: Mesh | None = None,
        layout: Any = None,
    ) -> None:
        """Say what a trajectory looks like, and begin it; the same for all of a campaign.

        Parameters
        ----------
        fields : mapping of str to str, or sequence of FieldSpec
            Output fields and their units; as FieldSpec also vectors and fields on vertices.
        grid : mapping of str to array, or sequence of Axis
            Coordinates along each axis, first axis slowest.
        times : sequence of float
            Of all steps that will be sent.
        inputs : mapping of str to ndarray, optional
            Input fields of this trajectory, whole on the root; scalars unless ``fields`` has them.
        name : str, optional
            Of the data; default: the store's.
        units : mapping of str to str, optional
            Of parameters.
        constants, boundaries, mesh : optional
            As in :class:`simlab.store.schema.Schema`.
        layout : PETSc.DMDA, or mapping of str to PETSc.DMDA, optional
            Of all fields, or of those named, that are sent as Vecs of a DMDA. Its x is the first
            axis of the grid.
        """
        inputs = dict(inputs or {})
        with self._together():
            if self._schema is not None:
                raise SchemaError(f"trajectory {self.traj}: declared already")
            specs = [
                item if isinstance(item, FieldSpec) else FieldSpec(item, units=fields[item])  # type: ignore[call-overload]
                for item in fields
            ]
            known = {spec.name for spec in specs}
            specs[:0] = [FieldSpec(item, role="input") for item in inputs if item not in known]
            axes = [
                item if isinstance(item, Axis) else Axis(item, _floats(grid[item]))  # type: ignore[call-overload]
                for item in grid
            ]
            schema = Schema(
                name or self._path.name,
                tuple(axes),
                tuple(specs),
                _floats(times),
                {key: (units or {}).get(key, "1") for key in self.parameters},
                dict(constants or {}),
                tuple(boundaries),
                mesh,
            )
            if self._is_root:
                self._begin(schema, Sample(self.traj, self.seed, self.parameters, inputs))
            self._schema = schema
            names = [spec.name for spec in schema.outputs]
            self._layouts = dict(
                layout if isinstance(layout, Mapping) else dict.fromkeys(names, layout)
            )
        self._share()

    def send(
        self,
        step: int,
        time: float,
        fields: Mapping[str, Any],
        *,
        solve: Provenance = _UNKNOWN,
    ) -> None:
        """Store one step; one that the store has is passed over.

        Parameters
        ----------
        step : int
            0, 1, ... without gaps.
        time : float
            The declared time of that step.
        fields : mapping of str to ndarray or PETSc.Vec
            Every output field. With a communicator each rank gives its own part: arrays are joined
            in order of rank, as parts along the first axis; so are Vecs, by rows, unless a layout
            was declared, which puts them in the order of the grid.
        solve : Provenance, optional
            How the step was solved.
        """
        with self._together():
            if self._schema is None:
                raise SchemaError(f"step {step}: call declare first")
            specs = {spec.name: spec for spec in self._schema.outputs}
            if specs.keys() != fields.keys():
                raise SchemaError(
                    f"step {step}: fields {', '.join(fields)} sent, {', '.join(specs)} declared"
                )
            if any(np.iscomplexobj(values) for values in fields.values()):
                raise SchemaError(f"step {step}: send real and imaginary part as two fields")
        if step < self.resume_step:
            return
        parts = [_own_part(fields[key], self._layouts.get(key)) for key in specs]
        whole = [self._gathered(part) for part, _ in parts]
        with self._together():
            if self._writer is not None:
                ready = {
                    key: self._in_order(values, is_natural, specs[key], step)
                    for key, values, (_, is_natural) in zip(specs, whole, parts, strict=True)
                }
                self._writer.append(self.traj, step, time, ready, solve=solve)
        self.resume_step = step + 1

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            with self._together():
                self._end()
            return
        if isinstance(error, Exception) and error is not self._agreed and self._comm is not None:
            with suppress(Exception):  # the others hear of it in the call they are in
                agree(self._comm, error)
        if self._writer is not None:
            try:
                if isinstance(error, Exception):
                    self._writer.fail(self.traj, f"{type(error).__name__}: {error}")
            finally:
                self._writer.close()
            self._seal()

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Run rank-local work; a fault of one rank is raised on all. Collective."""
        try:
            with nullcontext() if self._comm is None else agreement(self._comm):
                yield
        except Exception as error:
            self._agreed = error
            raise

    def _share(self) -> None:
        """Let every rank know what the root has found."""
        if self._comm is not None:
            found = (self.resume_step, self._is_done)
            self.resume_step, self._is_done = self._comm.bcast(found)

    def _look(self) -> None:
        """See what the store has of this trajectory."""
        if not (self._path / "campaign.json").is_file():
            return
        store = self._store = SnapshotStore.open(self._path)
        given, there = (self._n, self.seed), (store.n, store.seed)
        if given != there:
            raise ConfigError(
                f"{self._path}: n, seed = {given} given, the store has {there}; name another store"
            )
        if self.traj in store.done():
            self._is_done, self.resume_step = True, len(store.schema.times)
            return
        part = find_partial(store, self.traj)
        if part is not None and part.is_of(Sample(self.traj, self.seed, self.parameters)):
            self._part, self.resume_step = part, part.n_steps

    def _begin(self, schema: Schema, sample: Sample) -> None:
        """Begin an attempt, with the steps of the one before where it is the same trajectory."""
        store = self._store
        if store is None:
            store = SnapshotStore.create(self._path, schema, n=self._n, seed=self.seed)
        else:
            there, given = (json.loads(json.dumps(s.to_json())) for s in (store.schema, schema))
            changed = differences(there, given)
            if changed:
                raise ConfigError(
                    [line[:200] for line in changed], f"{self._path}: declared otherwise before"
                )
        self._store = store
        if self._is_done:
            return
        schema.check_sample(sample)
        part = self._part if self._part and self._part.is_of(sample, schema) else None
        said = self.resume_step
        self.resume_step = 0
        self._writer = store.writer()
        facts = {"client": Path(sys.argv[0]).name, "resumes": part.attempt if part else 0}
        self._writer.begin(sample, provenance=facts)
        for old in part.steps(schema) if part else ():
            self._writer.append(self.traj, old.step, old.time, old.fields, solve=old.solve)
            self.resume_step = old.step + 1
        if self.resume_step < said:
            log.warning(
                "trajectory %d begins again at step %d: what was stored up to step %d is damaged "
                "or had other input fields",
                self.traj,
                self.resume_step,
                said,
            )

    def _end(self) -> None:
        """Finish when all steps are there; the next start goes on otherwise."""
        if self._writer is None or self._schema is None:
            return
        n_steps = len(self._schema.times)
        try:
            if self.resume_step == n_steps:
                self._writer.finish(self.traj)
            else:
                log.warning(
                    "trajectory %d was left at step %d of %d; started again it goes on from there",
                    self.traj,
                    self.resume_step,
                    n_steps,
                )
        finally:
            self._writer.close()
        if self.resume_step == n_steps:
            self._seal()

    def _seal(self) -> None:
        """Turn the segments of clients into shards, all of them after the last trajectory."""
        assert self._store is not None
        is_complete = self._store.is_complete()
        try:
            self._store.seal(final=is_complete)
        except StoreError as error:
            if is_complete:
                raise
            log.warning("nothing was sealed, which the next client tries again: %s", error)

    def _gathered(self, part: np.ndarray) -> np.ndarray | None:
        """Return the parts of all ranks in a row, on the root."""
        if self._comm is None:
            return part
        part = np.ascontiguousarray(part, dtype=np.float64).reshape(-1)
        counts = self._comm.gather(part.size) or []
        whole = np.empty(sum(counts)) if self._is_root else None
        self._comm.Gatherv(part, None if whole is None else [whole, counts])
        return whole

    def _in_order(
        self, values: np.ndarray | None, is_natural: bool, spec: FieldSpec, step: int
    ) -> np.ndarray:
        """Return a field as the schema has it."""
        assert values is not None
        assert self._schema is not None
        shape = self._schema.field_shape(spec)
        if values.size != math.prod(shape):
            raise SchemaError(
                f"step {step}: field {spec.name!r} has {values.size} values, "
                f"{math.prod(shape)} expected: shape {shape}"
            )
        if is_natural:
            d = self._schema.n_dims
            values = values.reshape(*shape[:d][::-1], *shape[d:])
            return values.transpose(*range(d)[::-1], *range(d, len(shape)))
        is_row = self._comm is not None or values.ndim == 1
        return values.reshape(shape) if is_row else values


def _own_part(values: Any, layout: Any) -> tuple[np.ndarray, bool]:
    """Return this rank's values, and whether the ranks' are in PETSc's natural order (x fastest).

    PETSc numbers the unknowns of a DMDA box by box, which is no order of the grid.
    """
    if not hasattr(values, "getArray"):
        return np.asarray(values), False
    if layout is None:
        return values.getArray().copy(), False
    natural = layout.createNaturalVec()
    layout.globalToNatural(values, natural)
    own = natural.getArray().copy()
    natural.destroy()
    return own, True


def _floats(values: Sequence[float] | np.ndarray) -> tuple[float, ...]:
    return tuple(np.asarray(values, dtype=np.float64).reshape(-1).tolist())


def _read_path(text: str) -> Path:
    if not text:
        raise ValueError("no path")
    return Path(text)


def _read_parameters(text: str) -> dict[str, float]:
    plain = json.loads(text)
    if not isinstance(plain, dict):
        raise ValueError("not a table")
    try:
        return {str(name): float(value) for name, value in plain.items()}
    except TypeError as error:
        raise ValueError(str(error)) from None
