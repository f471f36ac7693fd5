"""The errors simlab raises: one base class and six children, each also a builtin.

A message says what went wrong, where, which value was found and what to do about it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from simlab.core.reports import SolveReport

__all__ = [
    "CollectiveError",
    "ConfigError",
    "ConvergenceError",
    "DependencyError",
    "SchemaError",
    "SimlabError",
    "StoreError",
]


class SimlabError(Exception):
    """Base of every error that simlab raises on purpose.

    Attributes
    ----------
    is_agreed : bool
        Every rank of the communicator raises this error, so nobody waits for anybody.
    """

    is_agreed = False


class ConfigError(SimlabError, ValueError):
    """A case, an option or a user's input file is wrong.

    Parameters
    ----------
    faults : str or sequence of str
        One line per fault; all faults found are shown together.
    where : str, optional
        File or table the faults were found in.
    """

    def __init__(self, faults: str | Sequence[str], where: str = "") -> None:
        self.faults = [faults] if isinstance(faults, str) else list(faults)
        self.where = where
        head = f"{where}: " if where else ""
        if len(self.faults) == 1:
            text = head + self.faults[0]
        else:
            lines = "".join(f"\n  - {fault}" for fault in self.faults)
            text = f"{head}{len(self.faults)} faults{lines}"
        super().__init__(text)

    def __reduce__(self) -> tuple[type[ConfigError], tuple[list[str], str]]:
        return type(self), (self.faults, self.where)


class SchemaError(SimlabError, ValueError):
    """Data do not have the fields, shapes or types that their schema promises."""


class StoreError(SimlabError, OSError):
    """A store, shard, segment or manifest cannot be read or written."""


class ConvergenceError(SimlabError, ArithmeticError):
    """A linear or nonlinear solve failed; carries the report when there is one."""

    def __init__(self, message: str, report: SolveReport | None = None) -> None:
        self.report = report
        super().__init__(message)

    def __reduce__(self) -> tuple[type[ConvergenceError], tuple[str, SolveReport | None]]:
        return type(self), (str(self), self.report)


class DependencyError(SimlabError, ImportError):
    """A package or external library is missing; the message names what to install."""


class CollectiveError(SimlabError, RuntimeError):
    """Some ranks of a communicator failed; the message lists ranks and reasons."""
