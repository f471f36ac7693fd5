"""Settings of the geometry-informed neural operator."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from simlab.learn.encoding import Encoding
from simlab.learn.operators import check_inputs, operators
from simlab.store.schema import Schema

if TYPE_CHECKING:
    from torch import nn

__all__ = ["GINO"]


@operators.register("gino")
class GINO:
    """Geometry-informed neural operator (Li et al. 2023), as in neuraloperator; 2-D and 3-D.

    Kernel integrals lead from the points of the grid to a coarse latent grid, where Fourier layers
    work, and back. Works at any resolution; what is finer than the latent grid is smoothed.

    Attributes
    ----------
    latent : int
        Points of the latent grid along each axis; never more than the grid of the data has.
    modes : int
        Fourier modes along each axis of the latent grid.
    width : int
        Channels.
    layers : int
        Fourier layers.
    radius : float
        Reach of the kernels, in cells of the latent grid.
    """

    latent: int = Field(24, ge=2)
    modes: int = Field(12, ge=1)
    width: int = Field(24, ge=1)
    layers: int = Field(4, ge=1)
    radius: float = Field(1.5, ge=1.0)

    def check(self, schema: Schema) -> None:
        """Raise :class:`ConfigError` unless there is an input on a grid of 2 or 3 dimensions."""
        check_inputs("gino", schema, (2, 3))

    def build(self, schema: Schema) -> nn.Module:
        """Return the network."""
        self.check(schema)
        from simlab.learn.geometry import GeometryNetwork

        encoding = Encoding(schema)
        latent = tuple(min(self.latent, n) for n in schema.shape)
        return GeometryNetwork(
            encoding.n_parameters + encoding.n_inputs + encoding.n_time,
            encoding.n_outputs,
            latent=latent,
            modes=tuple(min(self.modes, n) for n in latent),
            width=self.width,
            layers=self.layers,
            radius=self.radius,
        )
