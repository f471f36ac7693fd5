"""Configuration: TOML tables become frozen dataclasses chosen by ``kind``.

A class registered under a kind is at once the Python constructor, the TOML table, the repr and the
manifest entry: its constructor arguments are the schema, there is no second one. Precedence:
defaults < file < ``[smoke]`` (when asked for) < ``--set table.key=value``. Unknown keys are errors
with a nearest-name hint, and all faults of a case are shown together.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import pkgutil
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import fields as dataclass_fields
from dataclasses import is_dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Generic, TypeVar, cast, dataclass_transform

import numpy as np
from pydantic import ConfigDict, PlainValidator, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass

from simlab.core.errors import ConfigError

__all__ = ["Registry", "as_table", "build", "differences", "load_tables", "nearest", "settings"]

T = TypeVar("T")
_CONFIG = ConfigDict(extra="forbid", arbitrary_types_allowed=True, validate_default=True)


@dataclass_transform(frozen_default=True, kw_only_default=True)
def settings(cls: type[T]) -> type[T]:
    """Make a class a frozen, keyword-only, validated dataclass that refuses unknown keys.

    Its constructor raises :class:`ConfigError` with every fault found.
    """
    made: Any = pydantic_dataclass(cls, frozen=True, kw_only=True, config=_CONFIG)
    construct = made.__init__

    @functools.wraps(construct)
    def init(self: Any, *args: Any, **entries: Any) -> None:
        try:
            construct(self, *args, **entries)
        except ValidationError as error:
            raise ConfigError(list(_faults(made, error)), cls.__name__) from None

    made.__init__ = init
    return cast(type[T], made)


class Registry(Generic[T]):
    """Classes of one sort by ``kind``, found in our own modules and in other people's packages.

    Parameters
    ----------
    name : str
        What the classes are, for messages: ``"family"``, ``"solver"``.
    home : str
        Module or package whose modules register kinds; imported at the first look-up.
    entry_point : str, optional
        Entry-point group through which other packages add kinds (each entry loads a module or a
        class).
    """

    def __init__(self, name: str, home: str, entry_point: str | None = None) -> None:
        self.name = name
        self._home = home
        self._entry_point = entry_point
        self._kinds: dict[str, type[T]] = {}
        self._is_loaded = False

    @dataclass_transform(frozen_default=True, kw_only_default=True)
    def register(self, kind: str) -> Callable[[type[Any]], type[Any]]:
        """Return a class decorator: the class becomes :func:`settings` and is known as ``kind``."""

        def decorate(cls: type[Any]) -> type[Any]:
            made: Any = settings(cls)
            if kind in self._kinds:
                raise ValueError(
                    f"{self.name} kind {kind!r} is registered twice: {self._kinds[kind]} and {cls}"
                )
            made.kind = kind
            self._kinds[kind] = made
            return made

        return decorate

    def kinds(self) -> dict[str, type[T]]:
        """Return every known kind, sorted by name."""
        if not self._is_loaded:
            self._is_loaded = True
            home = importlib.import_module(self._home)
            for module in pkgutil.iter_modules(getattr(home, "__path__", [])):
                importlib.import_module(f"{self._home}.{module.name}")
            for entry in entry_points(group=self._entry_point) if self._entry_point else ():
                entry.load()
        return dict(sorted(self._kinds.items()))

    def build(self, value: Any) -> T:
        """Make an instance from ``"kind"``, ``{kind = ..., ...}`` or an instance.

        Raises
        ------
        ConfigError
            With every fault found in the table.
        """
        if isinstance(value, str):
            value = {"kind": value}
        if not isinstance(value, Mapping):
            if isinstance(value, tuple(self.kinds().values())):
                return cast(T, value)
            raise ConfigError(
                f"expected a {self.name} (a kind or a table with kind = ...), found {value!r}"
            )
        table = dict(value)
        kind = table.pop("kind", None)
        if kind is None:
            raise ConfigError(
                f"no kind given for this {self.name}; one of {', '.join(self.kinds())}"
            )
        cls = self.kinds().get(kind)
        if cls is None:
            raise ConfigError(f"unknown {self.name} kind {kind!r}{nearest(kind, self.kinds())}")
        return build(cls, table)

    @property
    def field(self) -> PlainValidator:
        """Annotation of a settings field: ``buffer: Annotated[Buffer, buffers.field]``."""
        return PlainValidator(self.build)

    def __iter__(self) -> Iterator[str]:
        return iter(self.kinds())


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint that names the closest known word, or all of them."""
    words = sorted(known)
    close = difflib.get_close_matches(str(name), words, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(words)}"


def build(cls: type[T], table: Mapping[str, Any]) -> T:
    """Construct a settings class from a table; every fault goes into one :class:`ConfigError`."""
    try:
        return cls(**table)
    except ConfigError as error:  # the caller knows the key that this table stands under
        raise ConfigError(error.faults) from None
    except TypeError as error:
        raise ConfigError(f"{getattr(cls, 'kind', cls.__name__)}: {error}") from None


def _faults(cls: type[Any], error: ValidationError) -> Iterator[str]:
    names = [item.name for item in dataclass_fields(cls)] if is_dataclass(cls) else []
    for fault in error.errors():
        where = ".".join(str(part) for part in fault["loc"])
        if fault["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            yield f"{where}: unknown key{nearest(str(fault['loc'][-1]), names)}"
        elif fault["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
            yield f"{where}: required, not given"
        else:
            inner = fault.get("ctx", {}).get("error")
            if isinstance(inner, ConfigError):
                for line in inner.faults:
                    yield (
                        f"{where}.{line}"
                        if _is_keyed(line) and where
                        else f"{where}: {line}"
                        if where
                        else line
                    )
            else:
                message = fault["msg"].removeprefix("Value error, ")
                found = fault.get("input")
                shown = f" (found {found!r})" if where and len(repr(found)) < 80 else ""
                yield f"{where}: {message}{shown}" if where else message


def _is_keyed(line: str) -> bool:
    """Whether a fault begins with the key it is about, so that keys can be joined with dots."""
    return (
        line.split(":", 1)[0].replace(".", "").replace("_", "").isalnum()
        and " " not in line.split(":", 1)[0]
    )


def load_tables(
    path: str | Path, *, overrides: Sequence[str] = (), smoke: bool = False
) -> dict[str, Any]:
    """Read a case file, then apply its ``[smoke]`` table when asked and the overrides.

    An override is ``table.key=value`` with a TOML value, or a bare word. No ``smoke`` table is
    left in the result.

    Raises
    ------
    ConfigError
        When the file is missing or not TOML, or an override is not of the form ``table.key=value``.
    """
    path = Path(path)
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = [str(p) for p in sorted(path.parent.glob("*.toml"))] if path.parent.is_dir() else []
        raise ConfigError(
            f"no case file {path}" + (nearest(str(path), near) if near else "")
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"not valid TOML: {error}", str(path)) from None
    small = tables.pop("smoke", {})
    if smoke:
        _merge(tables, small)
    faults = []
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            faults.append(f"--set {text}: expected table.key=value")
            continue
        _merge(tables, _nested(key.strip(), _value(value.strip())))
    if faults:
        raise ConfigError(faults)
    return tables


def _value(text: str) -> Any:
    """Read an override's value as TOML, and as a plain string when it is not TOML."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _merge(base: dict[str, Any], extra: Mapping[str, Any]) -> None:
    """Merge tables in place; a table that names another ``kind`` replaces the old one whole."""
    for key, value in extra.items():
        old = base.get(key)
        if isinstance(old, str) and isinstance(value, Mapping) and "kind" not in value:
            old = base[key] = {"kind": old}  # solver = "auto" overridden by solver.rtol=1e-6
        same_kind = (
            isinstance(old, dict)
            and isinstance(value, Mapping)
            and value.get("kind") in (None, old.get("kind"))
        )
        if same_kind:
            _merge(base[key], value)
        else:
            base[key] = deepcopy(value)


def as_table(value: Any) -> Any:
    """Turn settings into tables, lists and scalars for TOML and JSON; ``None`` is left out."""
    if is_dataclass(value) and not isinstance(value, type):
        kind = {"kind": value.kind} if hasattr(value, "kind") else {}
        entries = {
            item.name: as_table(getattr(value, item.name))
            for item in dataclass_fields(value)
            if item.init
        }
        return kind | {name: entry for name, entry in entries.items() if entry is not None}
    if isinstance(value, Mapping):
        return {str(name): as_table(entry) for name, entry in value.items() if entry is not None}
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, list | tuple | set | frozenset):
        return [as_table(entry) for entry in value]
    if isinstance(value, Path):
        return str(value)
    return value


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Return one line per key whose value differs between two tables: ``train.batch: 16 -> 32``."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        lines = []
        for key in sorted(set(old) | set(new)):
            lines += differences(
                old.get(key), new.get(key), f"{prefix}.{key}" if prefix else str(key)
            )
        return lines
    return [] if old == new else [f"{prefix}: {old!r} -> {new!r}"]
