"""PETSc options from nested tables: present while an object is set up or solves, gone afterwards.

    {"pc_type": "hypre", "pc_hypre_boomeramg": {"strong_threshold": 0.5}}
    ->  -pc_type hypre  -pc_hypre_boomeramg_strong_threshold 0.5

A key that is in PETSc's database already came from the user's command line and wins. Keys of ours
are removed again, so ``-options_left`` complains about the user's own words only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from simlab.core.errors import ConfigError
from simlab.linalg import petsc as PETSc

__all__ = ["flatten", "inserted", "merged", "user_gave"]


def flatten(options: Mapping[str, Any], prefix: str = "") -> dict[str, str | None]:
    """Return flat option names without the dash, and their values as PETSc reads them.

    Parameters
    ----------
    options : mapping
        Nested tables; levels are joined by ``_``. ``None`` and ``""`` make a flag without a value,
        a list is joined by commas.
    prefix : str
        Put before every name, as it is.

    Raises
    ------
    ConfigError
        For a value PETSc cannot read.

    Examples
    --------
    >>> flatten({"ksp_type": "cg", "pc": {"factor": {"levels": 1}, "view": None}}, "flow_")
    {'flow_ksp_type': 'cg', 'flow_pc_factor_levels': '1', 'flow_pc_view': None}
    """
    flat: dict[str, str | None] = {}
    for key, value in options.items():
        name = f"{prefix}{str(key).lstrip('-')}"
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{name}_")
        elif value is None or (isinstance(value, str) and not value):
            flat[name] = None
        elif isinstance(value, bool):
            flat[name] = "true" if value else "false"
        elif isinstance(value, list | tuple):
            flat[name] = ",".join(map(str, value))
        elif isinstance(value, str | int | float):
            flat[name] = str(value)
        else:
            raise ConfigError(f"option {name}: PETSc cannot read {value!r}")
    return flat


def merged(defaults: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, str | None]:
    """Return both flattened, ``extra`` winning."""
    return flatten(defaults) | flatten(extra)


@contextmanager
def inserted(options: Mapping[str, str | None], prefix: str = "") -> Iterator[None]:
    """Put flat options into PETSc's database for a while; keys that are there already win."""
    database = PETSc.Options()
    mine = [name for name in options if f"{prefix}{name}" not in database]
    for name in mine:
        database.setValue(f"{prefix}{name}", options[name])
    try:
        yield
    finally:
        for name in mine:
            database.delValue(f"{prefix}{name}")


def user_gave(*names: str, prefix: str = "") -> list[str]:
    """Return which of these options the user's command line set."""
    database = PETSc.Options()
    return [name for name in names if f"{prefix}{name}" in database]
