"""Settings of the graph operator on sampled points."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pydantic import Field

from simlab.learn.encoding import Encoding
from simlab.learn.operators import check_inputs, operators
from simlab.store.schema import Schema

if TYPE_CHECKING:
    from torch import nn

__all__ = ["PointOperator"]


@operators.register("points")
class PointOperator:
    """Graph network on a sample of points, decoded by a local learned kernel (idea of GIOROM).

    Reads input fields at ``points`` places only, mixes features of near points and of all points,
    and decodes them wherever values are asked for. Works at any resolution.

    Attributes
    ----------
    points : int
        Places that are sampled, spread evenly; at most as many as the grid has.
    neighbours : int
        Nearest points that a point hears from, and that a value is decoded from.
    width : int
        Features of a point.
    layers : int
        Rounds of mixing.
    """

    points: int = Field(512, ge=2)
    neighbours: int = Field(6, ge=1)
    width: int = Field(48, ge=1)
    layers: int = Field(4, ge=1)

    def check(self, schema: Schema) -> None:
        """Raise :class:`ConfigError` unless there is an input on a grid of 1 to 3 dimensions."""
        check_inputs("points", schema, (1, 2, 3))

    def build(self, schema: Schema) -> nn.Module:
        """Return the network."""
        self.check(schema)
        from simlab.learn.points import PointNetwork

        encoding = Encoding(schema)
        return PointNetwork(
            encoding.n_parameters + encoding.n_time,
            encoding.n_inputs,
            encoding.n_outputs,
            n_dims=schema.n_dims,
            points=min(self.points, math.prod(schema.shape)),
            neighbours=self.neighbours,
            width=self.width,
            layers=self.layers,
        )
