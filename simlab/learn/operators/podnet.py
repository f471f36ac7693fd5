"""Settings of the network for POD coefficients."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from simlab.learn.encoding import Encoding
from simlab.learn.operators import Count, check_inputs, operators
from simlab.store.schema import Schema

if TYPE_CHECKING:
    from torch import nn

__all__ = ["PODNet"]


@operators.register("podnet")
class PODNet:
    """Fully connected layers to the coefficients of a POD basis of the training outputs.

    For outputs that few modes describe. Belongs to the grid it was trained on; the basis grows with
    the first outputs drawn for training, then stays, and is saved with the weights.

    Attributes
    ----------
    modes : int
        Basis vectors, at most as many as an output has values.
    hidden : tuple of int
        Widths of the hidden layers.
    pool : int
        Cells along each axis to which input fields are averaged.
    snapshots : int
        Outputs, repeats included, after which the basis stays as it is.
    """

    modes: int = Field(32, ge=1)
    hidden: tuple[Count, ...] = (128, 128)
    pool: int = Field(8, ge=1)
    snapshots: int = Field(1000, ge=1)

    def check(self, schema: Schema) -> None:
        """Raise :class:`ConfigError` unless there is an input on a grid of 1 to 3 dimensions."""
        check_inputs("podnet", schema, (1, 2, 3))

    def build(self, schema: Schema) -> nn.Module:
        """Return the network."""
        self.check(schema)
        from simlab.learn.podnet import PODNetwork

        encoding = Encoding(schema)
        return PODNetwork(
            encoding.n_parameters + encoding.n_time,
            encoding.n_inputs,
            encoding.n_outputs,
            schema.shape,
            modes=self.modes,
            hidden=self.hidden,
            pool=min(self.pool, *schema.shape),
            snapshots=self.snapshots,
        )
