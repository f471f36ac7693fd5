"""What several networks need: dense layers, channels of constants, coordinates of a grid."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import nn

__all__ = ["coordinates", "dense", "time_scale", "with_constants"]


def dense(widths: Sequence[int], activation: type[nn.Module] = nn.GELU) -> nn.Sequential:
    """Return linear layers of these widths with an activation between them."""
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), activation()]
    return nn.Sequential(*layers[:-1])


def coordinates(grid: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    """Return the cell centres of the box [-1, 1]^d, shape (d, *grid)."""
    axes = [(2 * torch.arange(n, dtype=like.dtype) + 1) / n - 1 for n in grid]
    return torch.stack(torch.meshgrid(*axes, indexing="ij")).to(like)


def with_constants(
    parameters: torch.Tensor, fields: torch.Tensor, time: torch.Tensor
) -> torch.Tensor:
    """Return fields, then parameters and time as constant channels, (B, C, *grid)."""
    grid = fields.shape[2:]
    scalars = torch.cat([parameters, time], dim=1)
    constant = scalars.reshape(*scalars.shape, *(1,) * len(grid)).expand(-1, -1, *grid)
    return torch.cat([fields, constant], dim=1)


def time_scale(times: Sequence[float]) -> tuple[float, float]:
    """Return mean and standard deviation of the times of a schema: how networks get to see time."""
    values = np.asarray(times)
    return float(values.mean()), float(values.std()) or 1.0
