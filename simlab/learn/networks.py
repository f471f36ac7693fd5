"""The torch modules behind :mod:`simlab.learn.operators`, and the one that scales around them."""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from torch import nn

from simlab.learn.encoding import Encoding, Normaliser
from simlab.learn.layers import coordinates, dense, time_scale, with_constants

__all__ = ["BranchTrunkNetwork", "DirectNetwork", "FourierNetwork", "ScaledNetwork"]


class FourierNetwork(nn.Module):
    """neuraloperator's FNO with parameters and time as constant channels (``FNO``, ``TFNO``)."""

    def __init__(
        self,
        n_in: int,
        n_out: int,
        *,
        modes: tuple[int, ...],
        width: int,
        layers: int,
        channel_mlp: bool,
        lifting: int,
        projection: int,
        padding: float,
        rank: float | None = None,
    ) -> None:
        super().__init__()
        os.environ.setdefault("WANDB_MODE", "disabled")  # neuraloperator imports a web logger
        from neuralop.models import FNO

        from simlab.learn.spectral import MatrixSpectralConv, with_matrix_products

        self.operator = with_matrix_products(
            FNO(
                n_modes=modes,
                in_channels=n_in,
                out_channels=n_out,
                hidden_channels=width,
                n_layers=layers,
                use_channel_mlp=channel_mlp,
                lifting_channel_ratio=lifting,
                projection_channel_ratio=projection,
                domain_padding=padding or None,
                positional_embedding="grid",
                factorization=None if rank is None else "tucker",
                rank=1.0 if rank is None else rank,
                conv_module=MatrixSpectralConv,
            )
        )

    def forward(
        self, parameters: torch.Tensor, fields: torch.Tensor, time: torch.Tensor
    ) -> torch.Tensor:
        """Return (B, C_out, *grid)."""
        return self.operator(with_constants(parameters, fields, time))


class DirectNetwork(nn.Module):
    """Fully connected, all values of one grid out of scalars and few values (settings: ``MLP``)."""

    def __init__(
        self, n_in: int, n_out: int, grid: tuple[int, ...], hidden: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.shape = (n_out, *grid)
        self.layers = dense([n_in, *hidden, math.prod(self.shape)], nn.ReLU)

    def forward(
        self, parameters: torch.Tensor, fields: torch.Tensor, time: torch.Tensor
    ) -> torch.Tensor:
        """Return (B, C_out, *grid)."""
        read = torch.cat([parameters, fields.flatten(1), time], dim=1)
        return self.layers(read).reshape(-1, *self.shape)


class BranchTrunkNetwork(nn.Module):
    """Branch on parameters and pooled fields, trunk on coordinates and time (``DeepONet``)."""

    def __init__(
        self,
        n_parameters: int,
        n_inputs: int,
        n_time: int,
        n_out: int,
        *,
        n_dims: int,
        basis: int,
        branch: tuple[int, ...],
        trunk: tuple[int, ...],
        pool: int,
    ) -> None:
        super().__init__()
        self.n_out = n_out
        n_branch = n_parameters + n_inputs * pool**n_dims
        self.branch = dense([n_branch, *branch, basis * n_out])
        self.trunk = dense([n_dims + n_time, *trunk, basis])
        self.bias = nn.Parameter(torch.zeros(n_out))
        average = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[n_dims - 1]
        self.average = average(pool)

    def forward(
        self, parameters: torch.Tensor, fields: torch.Tensor, time: torch.Tensor
    ) -> torch.Tensor:
        """Return (B, C_out, *grid)."""
        grid = fields.shape[2:]
        read = [parameters]
        if fields.shape[1]:
            read.append(self.average(fields).flatten(1))
        b = self.branch(torch.cat(read, dim=1)).reshape(len(fields), self.n_out, -1)
        points = coordinates(grid, fields).flatten(1).T
        if time.shape[1]:
            points = torch.cat(
                [
                    points.expand(len(fields), -1, -1),
                    time[:, None].expand(-1, len(points), -1),
                ],
                dim=2,
            )
            values = torch.einsum("bck,bpk->bcp", b, self.trunk(points))
        else:
            values = torch.einsum("bck,pk->bcp", b, self.trunk(points))
        values = values / math.sqrt(b.shape[-1]) + self.bias[:, None]
        return values.reshape(len(fields), self.n_out, *grid)


class ScaledNetwork(nn.Module):
    """A network between normalisations: physical values in, physical values out.

    Mean and standard deviation are buffers, so they are saved with the weights; time is scaled by
    the times of the schema. To outputs that come after an input field (``FieldSpec.after``) the
    network gives the change.
    """

    mean_in: torch.Tensor
    std_in: torch.Tensor
    mean_out: torch.Tensor
    std_out: torch.Tensor

    def __init__(self, network: nn.Module, encoding: Encoding) -> None:
        super().__init__()
        self.network = network
        self._n_parameters, self._n_time = encoding.n_parameters, encoding.n_time
        self._time = time_scale(encoding.schema.times)
        self._base = None if encoding.base is None else torch.from_numpy(encoding.base)
        for name in ("mean_in", "std_in", "mean_out", "std_out"):
            self.register_buffer(name, torch.zeros(0))
        self.normalise(Normaliser.identity(encoding), encoding)

    def normalise(self, normaliser: Normaliser, encoding: Encoding) -> None:
        """Fix the statistics."""
        n = encoding.n_parameters + encoding.n_inputs
        for kind in ("mean", "std"):
            values = torch.from_numpy(getattr(normaliser, kind)).float()
            setattr(self, f"{kind}_in", values[:n].clone())
            setattr(self, f"{kind}_out", values[n:].clone())

    def observe(self, fields: torch.Tensor, outputs: torch.Tensor) -> None:
        """Show inputs and outputs of a training batch, in physical units, to a network that asks.

        A network does by having a method ``observe``; it gets what it is to give, normalised,
        before the step.
        """
        observe: Any = getattr(self.network, "observe", None)
        if observe is not None:
            mean = self.mean_out.reshape(-1, *(1,) * (outputs.ndim - 2))
            observe((outputs - self._before(fields) - mean) / self.scale_of(outputs))

    def _before(self, fields: torch.Tensor) -> torch.Tensor:
        """Return what is added to the changes, broadcastable to (B, C_out, *grid)."""
        if self._base is None:
            return fields.new_zeros(())
        return torch.cat([fields, torch.zeros_like(fields[:, :1])], dim=1)[:, self._base]

    def scale_of(self, outputs: torch.Tensor) -> torch.Tensor:
        """Return the standard deviation of what is learned of each channel, to broadcast."""
        return self.std_out.reshape(-1, *(1,) * (outputs.ndim - 2))

    def forward(
        self, parameters: torch.Tensor, fields: torch.Tensor, time: torch.Tensor
    ) -> torch.Tensor:
        """Return outputs (B, C_out, *grid) in physical units, float32."""
        p, ones = self._n_parameters, (1,) * (fields.ndim - 2)
        parameters = (parameters - self.mean_in[:p]) / self.std_in[:p]
        mean, std = (v[p:].reshape(-1, *ones) for v in (self.mean_in, self.std_in))
        before, fields = self._before(fields), (fields - mean) / std
        time = (time - self._time[0]) / self._time[1]
        made = self.network(parameters, fields, time)
        return before + made * self.scale_of(made) + self.mean_out.reshape(-1, *ones)
