"""Which solvers may be quickest for a system, by what is known of it without solving anything.

    tiny                        a factor; Jacobi where a null space is attached
    constant matrix             a factor, made once; on a grid also fast transforms
    SPD                         fast transforms on a grid, multigrid, CG+ICC, a factor for each
                                matrix or kept; off the grid also deflated CG
    other matrices              a factor for each matrix or kept, BiCGStab and GMRES with ILU or
                                multigrid, GCRO-DR
    no entries                  fast transforms on a grid, Krylov methods with Jacobi, recycled ones
    -pc_type given              the plain Krylov method with it, and the recycled ones

Factors are left out where their cost grows out of proportion or a null space is attached, recycled
solvers where something an order of magnitude quicker is at hand: a pilot has to pay for every
candidate.
"""

from __future__ import annotations

from typing import Any

from simlab.linalg import petsc as PETSc
from simlab.linalg.options import user_gave
from simlab.linalg.system import LinearSolver, LinearSystem, solvers

__all__ = ["MANY", "candidates"]

_TINY = 400  # unknowns; below, every solver takes well under a millisecond
_FACTOR_2D, _FACTOR_3D = 60_000, 12_000  # unknowns up to which one factor per system may win
_FACTOR_ONCE_2D, _FACTOR_ONCE_3D = 500_000, 50_000  # the same for one factor per campaign
_ICC_2D = 40_000  # unknowns up to which CG+ICC may beat multigrid in two dimensions
_PATIENCE = 300  # iterations, where a factor costs less than that many
_INTERVAL = 8  # systems between two renewals of what GCRO-DR carries
MANY = 100  # systems from which on a static space may be worth its price


def candidates(
    system: LinearSystem, rtol: float, n_systems: int = 0
) -> tuple[list[LinearSolver], str]:
    """Return the solvers that may be quickest for such systems, likely ones first, and why.

    A single one means that there is nothing to find out by a pilot.

    Parameters
    ----------
    system : LinearSystem
    rtol : float
    n_systems : int
        How many are to come, 0 when that is not known.
    """
    traits, n = system.traits, system.A.getSize()[0]
    grid = traits.grid
    given = user_gave("ksp_type", "pc_type")
    if given:
        words = " and ".join(f"-{name}" for name in given)
        pc = "jacobi" if traits.matrix_free else _multigrid()  # unless -pc_type says otherwise
        found = _with_preconditioner(system, rtol, pc, n_systems)
        if "ksp_type" in given:
            return found[:1], f"{words} on the command line"
        if traits.spd:  # the one on the command line may not be symmetric
            found.append(_make("gcrodr", rtol, preconditioner=pc))
        return found, f"{words} on the command line"
    sort = "SPD" if traits.spd else "symmetric" if traits.symmetric else "nonsymmetric"
    where = f"{'x'.join(map(str, grid.shape))} grid" if grid else "no grid"
    about = f"{sort}, n = {n}, {where}" + (", constant matrix" if traits.constant_matrix else "")
    is_3d = grid is not None and len(grid.shape) == 3
    limits = (
        (_FACTOR_ONCE_2D, _FACTOR_ONCE_3D) if traits.constant_matrix else (_FACTOR_2D, _FACTOR_3D)
    )
    is_singular = bool(system.A.getNullSpace().handle)
    may_factor = n <= limits[is_3d] and not is_singular
    fast, direct = _make("fast", rtol), _make("direct", rtol)
    is_fast = fast.suits(system)
    if traits.matrix_free:
        free = _with_preconditioner(system, rtol, "jacobi", n_systems)
        if not traits.spd:
            free.append(_make("krylov", rtol, method="bcgs", preconditioner="jacobi"))
        return [fast, *free] if is_fast else free, f"{about}, matrix-free"
    if n <= _TINY and is_singular:
        method = "cg" if traits.spd else "gmres"
        plain = _make("krylov", rtol, method=method, preconditioner="jacobi")
        return [plain], f"{about}: tiny, with a null space"
    if n <= _TINY:
        return [direct], f"{about}: tiny"
    if traits.constant_matrix and may_factor:
        return ([direct, fast], about) if is_fast else ([direct], f"{about}: factor once")
    found = [fast] if is_fast else []
    factored = [direct, _make("kept", rtol)] if may_factor else []
    if traits.spd:
        found.append(_make("cg_amg" if _has("hypre") else "cg_gamg", rtol))
        if n > 2_000 and _has("hypre"):
            found.append(_make("cg_gamg", rtol))
        if not (may_factor or is_fast):
            found.append(_make("kept", rtol, preconditioner=_multigrid()))
        if is_3d or grid is None or n <= _ICC_2D:
            recycled = _with_preconditioner(system, rtol, "icc", n_systems)
            found += recycled[:1] if is_fast else recycled
        return found + factored, about
    patience: dict[str, Any] = {"max_iterations": _PATIENCE} if may_factor else {}
    found += factored
    found.append(_make("krylov", rtol, method="bcgs", preconditioner="ilu", **patience))
    found += _with_preconditioner(system, rtol, "ilu", n_systems, **patience)
    if not traits.symmetric:  # multigrid does not bear indefinite matrices
        found.append(_make("krylov", rtol, method="gmres", preconditioner=_multigrid(), **patience))
    return found, about


def _with_preconditioner(
    system: LinearSystem, rtol: float, preconditioner: str, n_systems: int, **settings: Any
) -> list[LinearSolver]:
    """Return the plain method and the recycled ones with one preconditioner, in this order.

    A static space is among them where ``n_systems`` are enough to pay for it.
    """
    is_spd, settings = system.traits.spd, {"preconditioner": preconditioner, **settings}
    plain, recycled = ("cg", "deflated_cg") if is_spd else ("gmres", "gcrodr")
    rarely = {} if system.traits.symmetric else {"interval": _INTERVAL}
    preset = {"cg+icc": "cg_icc", "gmres+ilu": "gmres_ilu"}.get(f"{plain}+{preconditioner}")
    found = [
        _make(preset, rtol, **settings)
        if preset
        else _make("krylov", rtol, method=plain, **settings),
        _make(recycled, rtol, **settings, **rarely),
    ]
    if n_systems >= MANY and not system.traits.matrix_free:
        found.append(_make(recycled, rtol, static=20, carried=0, **settings))
    return found


def _make(kind: str, rtol: float, **settings: Any) -> LinearSolver:
    return solvers.build({"kind": kind, "rtol": rtol, **settings})


def _has(package: str) -> bool:
    return bool(PETSc.Sys.hasExternalPackage(package))


def _multigrid() -> str:
    return "hypre" if _has("hypre") else "gamg"
