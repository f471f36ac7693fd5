"""A running average of weights, and its place in the network while it is evaluated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["Average"]


class Average:
    """Exponential moving average of the parameters of a network.

    After batch t the average is ``d a + (1 - d) w`` with ``d = min(decay, (1 + t) / (10 + t))``, so
    that the first batches are forgotten soon.

    Parameters
    ----------
    network : Module
    decay : float

    Attributes
    ----------
    is_placed : bool
        Whether the network holds the average for good.
    """

    def __init__(self, network: torch.nn.Module, decay: float) -> None:
        self._network, self._decay = network, decay
        self._values = [parameter.detach().clone() for parameter in network.parameters()]
        self.is_placed = False

    @torch.no_grad()
    def update(self, batch: int) -> None:
        """Take in the weights after a batch."""
        decay = min(self._decay, (1 + batch) / (10 + batch))
        weights = [parameter.detach() for parameter in self._network.parameters()]
        torch._foreach_lerp_(self._values, weights, 1.0 - decay)

    @torch.no_grad()
    def _exchange(self) -> None:
        for parameter, value in zip(self._network.parameters(), self._values, strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(value)
            value.copy_(kept)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Have the network hold the average inside the block."""
        if self.is_placed:
            yield
            return
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def place(self) -> None:
        """Have the network hold the average for good; training does not go on from there."""
        if not self.is_placed:
            self._exchange()
            self.is_placed = True

    def tensors(self) -> list[torch.Tensor]:
        """Return the average, one tensor per parameter."""
        return list(self._values)

    @torch.no_grad()
    def load(self, tensors: list[torch.Tensor]) -> None:
        """Take over an average."""
        for value, new in zip(self._values, tensors, strict=True):
            value.copy_(new)
