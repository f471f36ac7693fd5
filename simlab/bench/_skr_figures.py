"""Figures of the recycling page, each with its numbers as CSV.

``skr_convergence``  residual histories of one system in the middle of a chain
``skr_chain``        iterations along the chain: not carried, carried, along a greedy path, static
``skr_spectra``      lowest eigenvalues of two neighbours, and how far their eigenspaces are apart
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp
from scipy.sparse.linalg import eigsh

from simlab.bench._skr_families import Study
from simlab.bench._skr_solvers import Turn
from simlab.bench._skr_table import RTOL, Measured, measured
from simlab.linalg.system import LinearSystem
from simlab.pipeline.pictures import new_axes, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw"]

_SOLVERS = {
    "gmres40": "GMRES(40)",
    "notcarried": "GCRO-DR(40, 20), nothing carried",
    "carried_unsorted": "carried, as drawn",
    "carried_greedy": "carried, greedy order",
    "static": "static space",
    "deflated_cg": "deflated CG + ICC",
}
_HISTORIES = ("gmres40", "notcarried", "carried_greedy", "static", "deflated_cg")
_CHAINS = ("notcarried", "carried_unsorted", "carried_greedy", "static")
_N_EIGENVALUES, _N_DEFLATED = 40, 20
_DPI = 150


def draw(folder: str | Path, n: int, n_samples: int) -> list[Path]:
    """Draw all figures for the families C1 and C2 with ILU; returns the PNG files."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tables = {
        family: measured(family, n, "ilu", n_samples=n_samples, names=tuple(_SOLVERS), history=True)
        for family in ("C1", "C2")
    }
    return [
        _convergence(folder, tables, n_samples // 2),
        _chain(folder, tables),
        _spectra(folder, n),
    ]


@styled
def _convergence(folder: Path, tables: Mapping[str, Measured], sample: int) -> Path:
    axes = new_axes(1, len(tables), (4.8, 3.4))[0]
    columns: dict[str, Sequence[Any]] = {}
    for axis, (family, table) in zip(axes, tables.items(), strict=True):
        for name in _present(_HISTORIES, table):
            turn = _turn(table, name, sample)
            history, last = turn.history, turn.iterations
            count = range(last - len(history) + 1, last + 1)  # some begin at 0, some at 1
            axis.semilogy(count, history, label=_SOLVERS[name], linewidth=1.3)
            columns[f"{family}_{name}"] = history
        axis.axhline(RTOL, color="0.6", linewidth=0.8, linestyle="--")
        axis.set(xlabel="iteration", title=f"{table.title}: sample {sample}")
        axis.set_xlim(0, None)
    axes[0].set_ylabel("residual norm / ||b||")
    axes[-1].legend()
    return _saved(folder / "skr_convergence", axes[0], columns)


@styled
def _chain(folder: Path, tables: Mapping[str, Measured]) -> Path:
    axes = new_axes(1, len(tables), (4.8, 3.2))[0]
    columns: dict[str, Sequence[Any]] = {}
    for axis, (family, table) in zip(axes, tables.items(), strict=True):
        for name in _present(_CHAINS, table):
            its = [turn.iterations for turn in table.turns[name]]
            axis.plot(range(1, len(its) + 1), its, label=_SOLVERS[name], linewidth=1.3)
            columns[f"{family}_{name}"] = its
        axis.set(xlabel="position in the order of solving", title=table.title)
        axis.set_ylim(0, None)
    axes[0].set_ylabel("iterations")
    axes[0].legend(fontsize=7.0)
    return _saved(folder / "skr_chain", axes[0], columns)


@styled
def _spectra(folder: Path, n: int) -> Path:
    study = Study("C1", n, 100)
    place = len(study.samples) // 2
    near = [_lowest(study.system(place + step, "greedy")) for step in (0, 1)]
    far = [_lowest(study.system(place + step, "sample")) for step in (0, 1)]
    mean = _lowest(study.reference())
    pairs = {
        "neighbours on the greedy path": (near[0], near[1]),
        "two samples as drawn": (far[0], far[1]),
        "a sample and the mean": (near[0], mean),
    }
    values, angles = new_axes(1, 2, (4.8, 3.2))[0]
    count = np.arange(1, _N_EIGENVALUES + 1)
    columns: dict[str, Sequence[Any]] = {}
    spectra = {"one system": near[0], "its neighbour": near[1], "the mean": mean}
    for marker, (label, (eigenvalues, _)) in zip("o+x", spectra.items(), strict=True):
        values.plot(count, eigenvalues, marker, markersize=4, label=label, fillstyle="none")
        columns[f"eigenvalues of {label}"] = eigenvalues.tolist()
    values.set(xlabel="number", ylabel="eigenvalue of A", title=f"Spectra, C1, n = {study.n}")
    values.legend()
    for label, (one, other) in pairs.items():
        sines = _sines(one[1][:, :_N_DEFLATED], other[1][:, :_N_DEFLATED])
        angles.semilogy(count[:_N_DEFLATED], sines, marker="o", markersize=3, label=label)
        columns[f"sines, {label}"] = sines.tolist()
    angles.set(
        xlabel="number", ylabel="sine", title=f"Angles between {_N_DEFLATED} lowest eigenvectors"
    )
    angles.xaxis.get_major_locator().set_params(integer=True)
    angles.legend()
    study.destroy()
    return _saved(folder / "skr_spectra", values, columns)


def _lowest(system: LinearSystem) -> tuple[np.ndarray, np.ndarray]:
    """Return the lowest eigenvalues of a symmetric matrix, ascending, and their vectors."""
    rows, columns, entries = system.A.getValuesCSR()
    matrix = sp.csr_matrix((entries, columns, rows)).tocsc()
    values, vectors = eigsh(matrix, k=_N_EIGENVALUES, sigma=0.0, v0=np.ones(matrix.shape[0]))
    order = np.argsort(values)
    return values[order], vectors[:, order]


def _sines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the sines of the principal angles between two orthonormal bases, ascending."""
    rest = one - other @ (other.T @ one)
    return np.asarray(np.linalg.svd(rest, compute_uv=False)[::-1])


def _turn(table: Measured, name: str, sample: int) -> Turn:
    return next(turn for turn in table.turns[name] if turn.index == sample)


def _present(names: Sequence[str], table: Measured) -> list[str]:
    return [name for name in names if name in table.turns]


def _saved(path: Path, axis: Axes, columns: Mapping[str, Sequence[Any]]) -> Path:
    """Write the picture and its numbers; returns the picture's path."""
    picture = path.with_suffix(".png")
    figure: Any = axis.figure
    figure.savefig(picture, dpi=_DPI, facecolor="white", bbox_inches="tight")
    with path.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(zip_longest(*columns.values(), fillvalue=""))
    return picture
