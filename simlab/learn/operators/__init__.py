"""The networks a case can name: settings that build a torch module for a schema.

Every network answers one call,

    forward(parameters (B, P), fields (B, C_in, *grid), time (B, N_t)) -> (B, C_out, *grid),

on normalised float32 tensors; ``N_t`` is 1 when the schema has several times and 0 when it has one,
``P`` and ``C_in`` may be 0 (``fields`` then still carries the grid in its shape). Components of
vectors and tensors are channels. Fields on mesh vertices are not learned.

Here are the registry, the protocol and three networks; further ones are in the modules of this
package, which the registry imports at its first look-up. None imports torch: describing and
checking a case must not cost its start-up time.

    operators.build({"kind": "fno", "modes": 12}).build(schema)      # an nn.Module
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Protocol, runtime_checkable

from pydantic import Field

from simlab.core.config import Registry
from simlab.core.errors import ConfigError
from simlab.learn.encoding import Encoding
from simlab.store.schema import Schema

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "FNO",
    "MLP",
    "Count",
    "DeepONet",
    "Operator",
    "check_inputs",
    "operators",
    "periodic_axes",
]

Count = Annotated[int, Field(ge=1)]


@runtime_checkable
class Operator(Protocol):
    """Settings of a network."""

    kind: ClassVar[str]

    def check(self, schema: Schema) -> None:
        """Raise :class:`ConfigError` when this network cannot learn such data. Needs no torch."""
        ...

    def build(self, schema: Schema) -> nn.Module:
        """Return an untrained network for data of this schema."""
        ...


operators: Registry[Operator] = Registry("operator", "simlab.learn.operators", "simlab.operators")


def check_inputs(kind: str, schema: Schema, dims: tuple[int, ...] | None = None) -> Encoding:
    """Return the encoding of a schema that gives a network something to learn from.

    Raises
    ------
    ConfigError
        When there is no input at all, or the grid has none of the dimensions ``dims``.
    """
    encoding = Encoding(schema)
    if not encoding.n_parameters + encoding.n_inputs + encoding.n_time:
        raise ConfigError(
            f"operator {kind!r}: schema {schema.name!r} has no parameter, input field or time, so "
            "there is nothing to learn from"
        )
    if dims and schema.n_dims not in dims:
        expected = " or ".join(map(str, dims)) if len(dims) < 3 else f"{dims[0]} to {dims[-1]}"
        raise ConfigError(f"operator {kind!r}: {schema.n_dims} dimensions, expected {expected}")
    return encoding


def periodic_axes(schema: Schema) -> tuple[bool, ...]:
    """Return which axes of the grid the schema calls periodic."""
    wraps = {boundary.axis for boundary in schema.boundaries if boundary.kind == "periodic"}
    return tuple(axis.name in wraps for axis in schema.axes)


@operators.register("fno")
class FNO:
    """Fourier neural operator (Li et al. 2021), as in neuraloperator.

    Parameters and time enter as constant channels, grid coordinates as further ones. Works at any
    resolution with at least ``modes`` points along each axis.

    Attributes
    ----------
    modes : int or tuple of int
        Fourier modes kept along each axis; never more than there are grid points.
    width : int
        Channels of the hidden layers.
    layers : int
    channel_mlp : bool
        Add a two-layer channel mixing after every Fourier layer: a quarter more time per batch.
    lifting, projection : int
        Width of the hidden layer that leads into and out of the Fourier layers, as a multiple of
        ``width``.
    padding : float
        Share of each axis that is padded before the Fourier layers, for fields that do not repeat.
    """

    kind: ClassVar[str]
    modes: Count | tuple[Count, ...] = 12
    width: int = Field(24, ge=1)
    layers: int = Field(4, ge=1)
    channel_mlp: bool = False
    lifting: int = Field(1, ge=1)
    projection: int = Field(2, ge=1)
    padding: float = Field(0.0, ge=0.0, le=1.0)

    def modes_along(self, schema: Schema) -> tuple[int, ...]:
        """Return the modes kept along each axis of the schema's grid."""
        wanted = self.modes if isinstance(self.modes, tuple) else (self.modes,) * schema.n_dims
        return tuple(min(m, n) for m, n in zip(wanted, schema.shape, strict=True))

    def check(self, schema: Schema) -> None:
        """Raise :class:`ConfigError` unless there is an input and ``modes`` fits the grid."""
        check_inputs(self.kind, schema, (1, 2, 3))
        if isinstance(self.modes, tuple) and len(self.modes) != schema.n_dims:
            raise ConfigError(
                f"modes: {len(self.modes)} numbers for a grid of {schema.n_dims} dimensions"
            )

    def build(self, schema: Schema) -> nn.Module:
        """Return the network."""
        return self.network(schema)

    def network(self, schema: Schema, rank: float | None = None) -> nn.Module:
        """Return the network, with Tucker factors of this relative size for dense weights."""
        self.check(schema)
        from simlab.learn.networks import FourierNetwork

        encoding = Encoding(schema)
        return FourierNetwork(
            encoding.n_parameters + encoding.n_inputs + encoding.n_time,
            encoding.n_outputs,
            modes=self.modes_along(schema),
            width=self.width,
            layers=self.layers,
            channel_mlp=self.channel_mlp,
            lifting=self.lifting,
            projection=self.projection,
            padding=self.padding,
            rank=rank,
        )


@operators.register("mlp")
class MLP:
    """Fully connected network (mu, t) -> u on a fixed grid, ReLU.

    For samples that scalars describe, or states of few numbers. Input fields of more than 64 values
    together are refused: each asks for a weight per hidden unit, which the other networks do
    better.

    Attributes
    ----------
    hidden : tuple of int
        Widths of the hidden layers.
    """

    _MOST_VALUES: ClassVar[int] = 64
    hidden: tuple[Count, ...] = (256, 256)

    def check(self, schema: Schema) -> None:
        """Raise :class:`ConfigError` when scalars do not describe a sample."""
        encoding = check_inputs("mlp", schema)
        n_values = encoding.n_inputs * encoding.n_points
        if n_values > self._MOST_VALUES:
            names = ", ".join(spec.name for spec in schema.inputs)
            raise ConfigError(
                f"operator 'mlp' learns from scalar parameters only, and from fields of at most "
                f"{self._MOST_VALUES} values together; those of {schema.name!r} have {n_values}: "
                f"{names}; use 'fno' or 'deeponet'"
            )

    def build(self, schema: Schema) -> nn.Module:
        """Return the network."""
        self.check(schema)
        from simlab.learn.networks import DirectNetwork

        encoding = Encoding(schema)
        n_in = encoding.n_parameters + encoding.n_inputs * encoding.n_points + encoding.n_time
        return DirectNetwork(n_in, encoding.n_outputs, schema.shape, self.hidden)


@operators.register("deeponet")
class DeepONet:
    """Deep operator network (Lu et al. 2021): u_c(x, t) = sum_k b_ck(mu, a) phi_ck(x, t) + bias_c.

    The branch net reads the parameters and the input fields, averaged over ``pool`` cells along
    each axis; the trunk net reads coordinates in [0, 1] and the time. Works at any resolution.

    Attributes
    ----------
    basis : int
        Products summed per output channel.
    branch, trunk : tuple of int
        Widths of the hidden layers.
    pool : int
        Cells along each axis to which input fields are averaged.
    """

    basis: int = Field(64, ge=1)
    branch: tuple[Count, ...] = (256, 256)
    trunk: tuple[Count, ...] = (128, 128, 128)
    pool: int = Field(16, ge=1)

    def check(self, schema: Schema) -> None:
        """Raise :class:`ConfigError` when the schema gives the branch net nothing to read."""
        encoding = check_inputs("deeponet", schema, (1, 2, 3))
        if not encoding.n_parameters + encoding.n_inputs:
            raise ConfigError(
                f"operator 'deeponet': {schema.name!r} has no parameter and no input field"
            )

    def build(self, schema: Schema) -> nn.Module:
        """Return the network."""
        self.check(schema)
        from simlab.learn.networks import BranchTrunkNetwork

        encoding = Encoding(schema)
        return BranchTrunkNetwork(
            encoding.n_parameters,
            encoding.n_inputs,
            encoding.n_time,
            encoding.n_outputs,
            n_dims=schema.n_dims,
            basis=self.basis,
            branch=self.branch,
            trunk=self.trunk,
            pool=min(self.pool, *schema.shape),
        )
