"""Settings of the U-Net."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from simlab.learn.encoding import Encoding
from simlab.learn.operators import check_inputs, operators, periodic_axes
from simlab.store.schema import Schema

if TYPE_CHECKING:
    from torch import nn

__all__ = ["UNet"]


@operators.register("unet")
class UNet:
    """U-Net (Ronneberger et al. 2015) in one or two dimensions; belongs to one grid spacing.

    Parameters, time and coordinates enter as channels. Convolutions wrap around the axes that the
    schema calls periodic.

    Attributes
    ----------
    width : int
        Channels on the finest grid, twice as many on each coarser one.
    levels : int
        Grids, each half as fine as the one before.
    """

    width: int = Field(32, ge=1)
    levels: int = Field(3, ge=1)

    def check(self, schema: Schema) -> None:
        """Raise :class:`ConfigError` unless there is an input on a grid of 1 or 2 dimensions."""
        check_inputs("unet", schema, (1, 2))

    def build(self, schema: Schema) -> nn.Module:
        """Return the network."""
        self.check(schema)
        from simlab.learn.unet import UNetwork

        encoding = Encoding(schema)
        return UNetwork(
            encoding.n_parameters + encoding.n_inputs + encoding.n_time,
            encoding.n_outputs,
            width=self.width,
            levels=self.levels,
            periodic=periodic_axes(schema),
        )
