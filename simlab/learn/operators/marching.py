"""Settings of the network that marches in time."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from simlab.core.errors import ConfigError
from simlab.learn.encoding import Encoding
from simlab.learn.operators import check_inputs, operators, periodic_axes
from simlab.store.schema import Schema

if TYPE_CHECKING:
    from torch import nn

__all__ = ["MPPDE"]


@operators.register("mppde")
class MPPDE:
    """Message passing with temporal bundling (Brandstetter et al. 2022), for 1-D in time.

    Makes ``bundle`` stored times at a time and goes on from there, up to the time asked for.
    Neighbours wrap around when the schema calls the axis periodic.

    Attributes
    ----------
    bundle : int
        Stored times made at once; at most as many as there are.
    width : int
        Features of a point.
    layers : int
        Rounds of messages per bundle.
    reach : int
        Points to either side that a point hears from.
    """

    marches: ClassVar[bool] = True
    bundle: int = Field(25, ge=1)
    width: int = Field(64, ge=1)
    layers: int = Field(6, ge=1)
    reach: int = Field(3, ge=1)

    def check(self, schema: Schema) -> None:
        """Raise :class:`ConfigError` unless the schema has one dimension and several times."""
        encoding = check_inputs("mppde", schema, (1,))
        if not encoding.n_time:
            raise ConfigError(
                f"operator 'mppde' marches in time, but {schema.name!r} has one time only; use "
                "'unet' or 'fno'"
            )

    def build(self, schema: Schema) -> nn.Module:
        """Return the network."""
        self.check(schema)
        from simlab.learn.marching import MarchingNetwork

        encoding = Encoding(schema)
        return MarchingNetwork(
            encoding.n_parameters,
            encoding.n_inputs,
            encoding.n_outputs,
            schema.times,
            bundle=self.bundle,
            width=self.width,
            layers=self.layers,
            reach=self.reach,
            periodic=periodic_axes(schema)[0],
        )
