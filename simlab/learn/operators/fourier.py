"""Settings of two relatives of the Fourier neural operator: low rank, and U-shaped."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from simlab.learn.encoding import Encoding
from simlab.learn.operators import FNO, check_inputs, operators
from simlab.store.schema import Schema

if TYPE_CHECKING:
    from torch import nn

__all__ = ["TFNO", "UNO"]


@operators.register("tfno")
class TFNO(FNO):
    """Tensorised Fourier neural operator (Kossaifi et al. 2024): an FNO with Tucker factors.

    A fraction of the weights of an FNO, at about its time per batch: the spectral weights are
    multiplied out in every pass.

    Attributes
    ----------
    rank : float
        Weights of the Tucker factors as a share of those of the dense spectral layers.
    """

    rank: float = Field(0.1, gt=0.0, le=1.0)

    def build(self, schema: Schema) -> nn.Module:
        """Return the network."""
        return self.network(schema, self.rank)


@operators.register("uno")
class UNO:
    """U-shaped neural operator (Rahman et al. 2023), as in neuraloperator.

    Fourier layers on a grid, on one half as fine with twice the channels, and so on, then back with
    shortcuts. Works at any resolution.

    Attributes
    ----------
    modes : int
        Fourier modes along each axis on the finest grid, half as many on each coarser one but at
        least 4; never more than there are points.
    width : int
        Channels on the finest grid.
    levels : int
        How often the grid is halved.
    """

    modes: int = Field(12, ge=1)
    width: int = Field(16, ge=1)
    levels: int = Field(2, ge=1)

    def modes_along(self, schema: Schema) -> list[list[int]]:
        """Return the modes kept along each axis, for every level from the finest."""
        wanted = [max(self.modes >> level, min(4, self.modes)) for level in range(self.levels + 1)]
        return [
            [max(1, min(m, n >> level)) for n in schema.shape] for level, m in enumerate(wanted)
        ]

    def check(self, schema: Schema) -> None:
        """Raise :class:`ConfigError` unless there is an input on a grid of 1 to 3 dimensions."""
        check_inputs("uno", schema, (1, 2, 3))

    def build(self, schema: Schema) -> nn.Module:
        """Return the network."""
        self.check(schema)
        from simlab.learn.fourier import UShapedNetwork

        encoding = Encoding(schema)
        return UShapedNetwork(
            encoding.n_parameters + encoding.n_inputs + encoding.n_time,
            encoding.n_outputs,
            modes=self.modes_along(schema),
            width=self.width,
        )
