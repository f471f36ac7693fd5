"""Numbers and values of a run as words on a page: three digits that count, units a person uses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from simlab.core.progress import duration

if TYPE_CHECKING:
    from simlab.store.schema import FieldSpec

__all__ = [
    "components",
    "digits",
    "field_name",
    "file_size",
    "flat",
    "number",
    "one_line",
    "percent",
    "timing",
]


def percent(value: float | None) -> str:
    """Write a share with three digits: ``1.23 %``; a dash where it is not finite."""
    return "-" if value is None else f"{digits(100 * value)} %"


def digits(value: float) -> str:
    """Write a number with three digits that count, without an exponent where one can.

    Examples
    --------
    >>> [digits(value) for value in (0.01234, 12.0, 3470.6, 568887.0, 2323058.7, 7.94e-10)]
    ['0.0123', '12.0', '3,471', '569,000', '2.32 million', '7.94e-10']
    """
    if 1e6 <= abs(value) < 1e9:
        return f"{value / 1e6:.3g} million"
    if 1e4 <= abs(value) < 1e6:
        return f"{float(f'{value:.3g}'):,.0f}"
    if value == 0 or not 1e-3 <= abs(value) < 1e4:
        return f"{value:.3g}"
    return f"{value:,.{max(2 - math.floor(math.log10(abs(value))), 0)}f}"


def number(value: float) -> str:
    """Write whole numbers whole, others with three digits."""
    return f"{value:,.0f}" if value == round(value) else digits(value)


def field_name(spec: FieldSpec) -> str:
    """Write a field's name, with the long one behind it when it has one."""
    return f"{spec.name} ({spec.long_name})" if spec.long_name else spec.name


def components(values: np.ndarray) -> str:
    """Write a scalar, or the components of a vector or tensor."""
    return ", ".join(digits(float(value)) for value in values.ravel())


def file_size(size: float) -> str:
    """Write bytes in the unit that suits them: ``25.4 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def one_line(value: Any) -> str:
    """Write any value of a case, a manifest or a pilot in one short line."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        words = [one_line(item) for item in value]
        return ", ".join(words[:12] or ["none"]) + (
            f", ... ({len(words)})" if len(words) > 12 else ""
        )
    return str(value)


def flat(table: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Return ``(dotted key, value)`` of nested tables."""
    rows: list[tuple[str, Any]] = []
    for key, value in table.items():
        if isinstance(value, Mapping):
            rows += flat(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", value))
    return rows


def timing(
    title: str, note: str, seconds: Mapping[str, float], *, lanes: bool = False
) -> dict[str, Any]:
    """Return one bar of parts, or with ``lanes`` a bar for each, longest first."""
    total, longest = sum(seconds.values()) or 1.0, max(seconds.values()) or 1.0
    parts = [
        {
            "name": name,
            "weight": f"{value / total:.5f}",
            "width": f"{value / longest:.2%}",
            "text": duration(value),
            "share": f"{value / total:.0%}",
        }
        for name, value in sorted(seconds.items(), key=lambda item: -item[1])
    ]
    return {"title": title, "note": note, "parts": parts, "lanes": lanes}
