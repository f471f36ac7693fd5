"""PETSc on first use, as in petsc4py: ``from simlab.linalg import petsc as PETSc``.

Importing this module loads nothing, so problem families and solvers can be described, checked and
printed on a machine, or in a process, without PETSc. The first attribute asked for initialises
PETSc with the words that the command line gave after ``--`` (:func:`set_arguments`).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from simlab.core.errors import DependencyError

__all__ = ["arguments", "is_loaded", "set_arguments"]

_arguments: list[str] = []


def set_arguments(words: Sequence[str]) -> None:
    """Remember the user's PETSc words; they must come before PETSc is first used."""
    if is_loaded():
        raise RuntimeError("PETSc is already initialised; its arguments come too late")
    _arguments[:] = words


def arguments() -> list[str]:
    """Return the user's PETSc words."""
    return list(_arguments)


def is_loaded() -> bool:
    """Return whether PETSc has been initialised in this process."""
    return "petsc4py.PETSc" in sys.modules


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    try:
        import petsc4py

        if not is_loaded():  # each call leaves a collective clean-up for the end of the process
            petsc4py.init(["simlab", *_arguments])
        from petsc4py import PETSc
    except ImportError as error:
        raise DependencyError(
            f"petsc4py cannot be imported ({error}); run `make setup`, see docs/install.md"
        ) from error
    value = getattr(PETSc, name)
    globals()[name] = value
    return value
