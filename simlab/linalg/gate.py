"""Whether carrying pays: now and then a system is solved without it, and the costs are compared.

What a solver carries from system to system costs something with every new matrix (``A U``, its
orthonormalisation, longer projections) and saves iterations, or does not. Nothing but trying tells:

    s s s C s s s C s s s C ...      C: a control, solved without the carried part

A window is four controls and the systems between them; its verdict compares the medians of their
costs, CPU seconds of the solve without the set-up that both kinds share. No system is solved twice.
A window in which carrying costs more than 0.95 of doing without speaks against it, and two such
windows in a row end it for good. Controls come every fourth system until a window has spoken for
carrying, and again after one that speaks against; every twentieth in between. So the end may come
at the 32nd system, and a space that pays is left out of 5 % of the solves.

Systems are counted, and the root's costs decide, so all ranks of a group do the same.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import numpy as np

from simlab.linalg.blocks import Reducer

__all__ = ["Gate"]

log = logging.getLogger("simlab.linalg.gate")

_PAYS = 0.95  # of the control's cost: carrying must be cheaper than that
_N_CONTROLS = 4  # in a window
_OFTEN, _SELDOM = 4, 20  # systems from control to control
_N_WINDOWS = 2  # in a row that end it


class Gate:
    """The decision for one sequence of systems.

    Parameters
    ----------
    reduce : Reducer
        Of the group.
    clock : callable
        Seconds; CPU time of the process unless a test brings its own.

    Attributes
    ----------
    is_open : bool
        Carrying goes on.
    """

    def __init__(self, reduce: Reducer, clock: Callable[[], float] = time.process_time) -> None:
        self.is_open = True
        self._reduce, self._clock = reduce, clock
        self._every = _OFTEN
        self._n_systems = 1  # the first one of a sequence has nothing to carry yet
        self._since_control = 1
        self._n_against = 0
        self._is_control = False
        self._begun = 0.0
        self._clear()

    @property
    def ends_window(self) -> bool:
        """Whether the next system is a window's last control: the time to measure drift."""
        is_next = self.is_open and self._since_control == self._every - 1
        return is_next and len(self._without) == _N_CONTROLS - 1

    def admits(self) -> bool:
        """Return whether the next system may use the carried part, and start its clock."""
        if self.is_open:
            self._n_systems += 1
            self._since_control += 1
            self._is_control = self._since_control >= self._every
            if self._is_control:
                self._since_control = 0
            self._begun = self._clock()
        return self.is_open and not self._is_control

    def book(self, captured: float = np.nan, drift: float = np.nan) -> str:
        """Book the system that :meth:`admits` began. Collective at the end of a window.

        Parameters
        ----------
        captured : float
            Share of the right-hand side that the deflated space took care of, ``||C^T b||/||b||``.
        drift : float
            Sine of the largest angle between that space's images under the last two matrices; NaN
            when not measured.

        Returns
        -------
        str
            What the report should say: empty, that this was a control, or why carrying ends.
        """
        if not self.is_open:
            return ""
        seconds = self._clock() - self._begun
        if not self._is_control:
            self._with.append(seconds)
            self._captured.append(captured)
            self._drift = drift if np.isfinite(drift) else self._drift
            return ""
        self._without.append(seconds)
        said = "control: solved without the carried part"
        if len(self._without) < _N_CONTROLS:
            return said
        return "; ".join(filter(None, (said, self._judge())))

    def _judge(self) -> str:
        """Compare the window's costs; return why carrying ends, or nothing."""
        carried, control = self._reduce.from_root(
            lambda: (float(np.median(self._with)), float(np.median(self._without)))
        )
        is_against = carried > _PAYS * control
        self._n_against = self._n_against + 1 if is_against else 0
        self._every = _OFTEN if is_against else _SELDOM
        reason = ""
        if self._n_against >= _N_WINDOWS:
            self.is_open = False
            turned = f"; A U turned by sin {self._drift:.2g}" if np.isfinite(self._drift) else ""
            reason = (
                f"carrying ends after {self._n_systems} systems: {1e3 * carried:.3g} ms each with "
                f"it, {1e3 * control:.3g} ms without; it held {np.median(self._captured):.2g} of "
                f"the right-hand side{turned}"
            )
            if self._reduce.is_root:
                log.info("%s", reason)
        self._clear()
        return reason

    def _clear(self) -> None:
        """Begin a window."""
        self._with: list[float] = []
        self._without: list[float] = []
        self._captured: list[float] = []
        self._drift = np.nan
