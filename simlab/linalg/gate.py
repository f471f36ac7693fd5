"""Whether carrying pays: now and then a system is solved without it, and the costs are compared.

What a solver carries from system to system costs something with every new matrix (``A U``, its
orthonormalisation, longer projections) and saves iterations, or does not. Nothing but trying tells:

    s C s C s C s C s C s s s ... s s C s s ...        C: a control, solved without the carried part

A window is five controls and the systems between them; its verdict compares the medians of their
costs, CPU seconds of the solve without the set-up that both kinds share. No system is solved twice.
A window in which carrying costs more than 0.95 of doing without speaks against it, and two of them
end it for good. One in which it costs less than 0.8, or three below 0.95, settle for carrying:
every twentieth system is a control from then on, every second one before, and again after a window
that speaks against. So carrying may end at the 20th system, and a space that pays is left out of
5 % of the solves.

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

_PAYS, _PAYS_CLEARLY = 0.95, 0.8  # of the control's cost
_N_CONTROLS = 5  # in a window
_OFTEN, _SELDOM = 2, 20  # systems from control to control
_N_AGAINST, _N_FOR = 2, 3  # windows that settle it


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
    reason : str
        Why it does not; empty while it does.
    """

    def __init__(self, reduce: Reducer, clock: Callable[[], float] = time.process_time) -> None:
        self.is_open, self.reason = True, ""
        self._reduce, self._clock = reduce, clock
        self._every = _OFTEN
        self._n_systems = 1  # the first one of a sequence has nothing to carry yet
        self._since_control = 1
        self._n_against = self._n_for = 0
        self._is_control = False
        self._begun, self._drift = 0.0, float("nan")
        self._clear()

    @property
    def watches(self) -> bool:
        """Whether to measure drift across the present control: once in a window."""
        return self._is_control and len(self._without) == _N_CONTROLS - 2

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
            Sine of the largest angle between that space's images under this matrix and the one
            it was last used with; NaN when not measured.

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
        self._judge()
        return f"{said}; {self.reason}" if self.reason else said

    def _judge(self) -> None:
        """Compare the window's costs."""
        carried, control = self._reduce.from_root(
            lambda: (float(np.median(self._with)), float(np.median(self._without)))
        )
        if carried > _PAYS * control:
            self._n_against += 1
            self._every = _OFTEN
        else:
            self._n_for += 1 if carried > _PAYS_CLEARLY * control else _N_FOR
        if self._n_for >= _N_FOR:
            self._every = _SELDOM
            self._n_against = self._n_for = 0
        if self._n_against >= _N_AGAINST:
            self.is_open = False
            turned = f"; A U turned by sin {self._drift:.2g}" if np.isfinite(self._drift) else ""
            self.reason = (
                f"carrying ends after {self._n_systems} systems: {1e3 * carried:.3g} ms each with "
                f"it, {1e3 * control:.3g} ms without; it held {np.median(self._captured):.2g} of "
                f"the right-hand side{turned}"
            )
            if self._reduce.is_root:
                log.info("%s", self.reason)
        self._clear()

    def _clear(self) -> None:
        """Begin a window."""
        self._with: list[float] = []
        self._without: list[float] = []
        self._captured: list[float] = []
        self._drift = float("nan")
