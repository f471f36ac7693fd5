"""The families of the recycling tables: what is solved, at which size, in which orders.

Systems are walked in two orders at once, as drawn and along a greedy path; every turn has one
system of each, so that contestants that want neighbours and those that do not care meet the same
set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simlab.core.comm import self_comm
from simlab.core.config import nearest
from simlab.core.errors import ConfigError
from simlab.linalg.ordering import orderings, sample_keys
from simlab.linalg.system import LinearSystem
from simlab.pipeline.case import load_case
from simlab.problems.family import ProblemFamily, families
from simlab.problems.reference import reference

__all__ = ["FAMILIES", "Entry", "Study", "entry"]

SEED = 71093


@dataclass(frozen=True)
class Entry:
    """A family by name.

    Attributes
    ----------
    title : str
    table : callable
        ``table(n)`` returns the family's settings for about n unknowns.
    pc : str
        Preconditioner unless another one is asked for.
    n : int
        Unknowns unless another number is asked for.
    """

    title: str
    table: Callable[[int], Any]
    pc: str = "ilu"
    n: int = 10_000


def _darcy(**settings: Any) -> Callable[[int], Any]:
    return lambda n: {"kind": "darcy", "cells": _root(n, 2), **settings}


def _square(n: int) -> dict[str, Any]:
    """Return a constant matrix with random data: quadratic elements on the unit square."""
    sums = {"kind": "chebyshev", "degree": 5}
    sides = dict.fromkeys(("left", "right", "bottom", "top"), sums)
    mesh = {"kind": "square", "size": (4.63 / n) ** 0.5}
    return {"kind": "poisson", "mesh": mesh, "degree": 2, "source": sums, "dirichlet": sides}


def _slotted_plate(n: int) -> dict[str, Any]:
    mesh = {"kind": "slotted_plate", "size": min((7.02 / n) ** 0.5, 0.1)}
    data = {"dirichlet": {"left": [0.0, 100.0]}, "neumann": {"right": [-100.0, 0.0]}}
    return {"kind": "poisson", "mesh": mesh, "degree": 2, **data}


def _released(**settings: Any) -> Callable[[int], Any]:
    return lambda n: {"kind": "released_darcy", "side": _root(n, 2), **settings}


def _root(n: int, dim: int) -> int:
    return max(round(n ** (1.0 / dim)), 4)


FAMILIES = {
    "C1": Entry("Darcy, a = exp(g)", _darcy()),
    "C2": Entry("Darcy, two phases 12/3", _darcy(fields="two_phase")),
    "C3": Entry("Darcy, four parameters", _darcy(fields="four_parameter")),
    "C4": Entry("Darcy, a = exp(5 g)", _darcy(fields={"kind": "lognormal", "scale": 5.0})),
    "C5": Entry(
        "convection-diffusion, three dimensions",
        lambda n: {"kind": "convection_diffusion", "cells": _root(n, 3)},
        n=24**3,
    ),
    "C6": Entry("Helmholtz, k near 20", lambda n: {"kind": "helmholtz", "cells": _root(n, 2)}),
    "C7": Entry("Darcy along a path, a = exp(3 g)", _darcy(fields={"kind": "path"})),
    "C8": Entry("Poisson, one matrix", _square),
    "C9": Entry("C1 without a matrix", _darcy(matrix_free=True), "none"),
    "F0": Entry("released Darcy", _released(), "none", 2_500),
    "F0h": Entry("released Helmholtz", _released(helmholtz=True), "none", 2_500),
    "F0s": Entry("released Darcy without the slip", _released(slip=False), "none", 2_500),
    "thermal": Entry("slotted plate, one matrix", _slotted_plate, n=11_000),
    "poisson": Entry("Poisson, one matrix", _square, n=11_000),
}


def entry(name: str) -> Entry:
    """Return a family by its name here, or the one of a case file.

    Raises
    ------
    ConfigError
        When there is neither.
    """
    if name in FAMILIES:
        return FAMILIES[name]
    if name.endswith(".toml"):
        family = load_case(name).family
        return Entry(family.kind, lambda n: family, n=0)
    raise ConfigError(
        f"no family {name!r}{nearest(name, FAMILIES)}; known: {', '.join(FAMILIES)}, or a case "
        "file, NAME.toml"
    )


class Study:
    """Samples of one family at one size, and their systems in both orders.

    Parameters
    ----------
    name : str
        A key of ``FAMILIES``, or a case file, which fixes the size itself.
    n : int, optional
        About how many unknowns; the entry's own number when left out.
    n_samples : int
    seed : int

    Attributes
    ----------
    label : str
        The family's name in tables.
    n : int
        Unknowns.
    orders : dict of str to ndarray of int
        ``"sample"`` and ``"greedy"``.
    """

    def __init__(
        self, name: str, n: int | None = None, n_samples: int = 24, seed: int = SEED
    ) -> None:
        found = entry(name)
        self.label = Path(name).stem
        self.family: ProblemFamily = families.build(found.table(n or found.n))
        self.samples = self.family.space.sample(n_samples, seed)
        keys = sample_keys(self.samples)
        self.orders = {kind: orderings.build(kind).order(keys) for kind in ("sample", "greedy")}
        self._workspaces = {kind: self.family.setup(self_comm()) for kind in self.orders}
        self._reference: Any = None
        first = self.family.assemble(self.samples[0], self._workspaces["sample"])
        self.n = int(first.A.getSize()[0])
        self.traits = first.traits

    def systems(self) -> Iterator[dict[str, LinearSystem]]:
        """Yield both walks' next systems, by order; the next turn overwrites them."""
        for turn in range(len(self.samples)):
            yield {
                kind: self.family.assemble(self.samples[int(order[turn])], self._workspaces[kind])
                for kind, order in self.orders.items()
            }

    def system(self, place: int, order: str = "sample") -> LinearSystem:
        """Return the system at one place of an order; the next call overwrites it."""
        sample = self.samples[int(self.orders[order][place])]
        return self.family.assemble(sample, self._workspaces[order])

    def reference(self) -> LinearSystem:
        """Return the system of the mean of all samples; it stays as it is."""
        if self._reference is None:
            self._reference = self.family.setup(self_comm())
        return self.family.assemble(reference(self.samples), self._reference)

    def destroy(self) -> None:
        """Free PETSc objects."""
        for workspace in (*self._workspaces.values(), self._reference):
            if workspace is not None:
                workspace.destroy()
