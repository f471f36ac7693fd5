"""A network for the coefficients of a POD basis of the outputs it is trained on.

    u(mu, a, t) = sqrt(n) sum_k c_k(mu, a, t) v_k,

with c from fully connected layers and v_1 .. v_r the leading right singular vectors of the first
outputs drawn for training, normalised, channels stacked, n values each. (Hesthaven and Ubbiali
2018, without a mean field: the first mode is free to be it.)

The outputs arrive batch by batch, so the basis is a sequential one (Levy and Lindenbaum 2000): the
singular vectors of the rows (s_k v_k; new outputs), cut to r. Each such step turns the last layer
by V' V^T, so that what the network says does not jump. After ``snapshots`` outputs the basis stays
what it is. It is saved with the weights. Cost of a step: O((r + B)^2 n); of a prediction: O(r n).
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn

from simlab.learn.layers import dense

__all__ = ["PODNetwork"]


def _of_all_processes(values: torch.Tensor) -> torch.Tensor:
    """Return the rows of all processes in order of rank; those given when there is one."""
    if not (dist.is_available() and dist.is_initialized()):
        return values
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, values)
    return torch.cat(parts)


class PODNetwork(nn.Module):
    """Parameters, time and pooled fields to values on one grid (settings: ``PODNet``)."""

    basis: torch.Tensor
    singular: torch.Tensor
    seen: torch.Tensor

    def __init__(
        self,
        n_scalars: int,
        n_inputs: int,
        n_out: int,
        grid: tuple[int, ...],
        *,
        modes: int,
        hidden: tuple[int, ...],
        pool: int,
        snapshots: int,
    ) -> None:
        super().__init__()
        self.shape, self.snapshots = (n_out, *grid), snapshots
        n = math.prod(self.shape)
        rank = min(modes, n)
        self.coefficients = dense([n_scalars + n_inputs * pool ** len(grid), *hidden, rank])
        average = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[len(grid) - 1]
        self.average = average(pool)
        self.register_buffer("basis", torch.linalg.qr(torch.randn(n, rank))[0].T.contiguous())
        self.register_buffer("singular", torch.zeros(rank))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(
        self, parameters: torch.Tensor, fields: torch.Tensor, time: torch.Tensor
    ) -> torch.Tensor:
        """Return (B, C_out, *grid)."""
        read = [parameters, time]
        if fields.shape[1]:
            read.append(self.average(fields).flatten(1))
        made = self.coefficients(torch.cat(read, dim=1)) @ self.basis
        return math.sqrt(made.shape[1]) * made.reshape(-1, *self.shape)

    @torch.no_grad()
    def observe(self, outputs: torch.Tensor) -> None:
        """Take normalised training outputs (B, C_out, *grid) into the basis while it grows.

        Collective over the processes of a training, which take the outputs of all: one basis.
        """
        if self.seen >= self.snapshots:
            return
        outputs = _of_all_processes(outputs)
        rows = torch.cat([self.singular[:, None] * self.basis, outputs.flatten(1)])
        _, singular, vectors = torch.linalg.svd(rows.double(), full_matrices=False)
        rank = len(self.basis)
        basis = vectors[:rank].float()
        turn = basis @ self.basis.T
        last = cast(nn.Linear, self.coefficients[-1])
        last.weight.copy_(turn @ last.weight)
        last.bias.copy_(turn @ last.bias)
        self.basis.copy_(basis)
        self.singular.copy_(singular[:rank])
        self.seen += len(outputs)
