"""neuraloperator's GINO: points to a latent grid, Fourier layers there, and back to points.

    latent(x) = mean_j kappa_in(x, y_j) * lift(a(y_j), mu, t),        |x - y_j| < r
    latent    = Fourier layers(latent)
    u(x)      = projection(sum_i w(|x - x_i|) kappa_out(x, x_i) * latent(x_i))

(Li et al. 2023; the weights w, half a cosine, make u continuous.) Without the package torch_scatter
neuraloperator sums in a Python loop over points; here the same sums are one gather and one
``index_add``, and neighbours are looked up once per geometry. Parameters and their names stay.
"""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any, cast

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import nn

from simlab.learn.layers import coordinates

__all__ = ["GeometryNetwork"]

Neighbours = dict[str, torch.Tensor]


@lru_cache(maxsize=32)
def _pairs(data: tuple[int, ...], queries: tuple[int, ...], radius: float) -> Neighbours:
    """Return, for cell centres of two grids of the unit box, the pairs nearer than a radius.

    ``of`` (E,) is the query and ``neighbors_index`` (E,) the datum of each; ``weights`` their
    squared distance.
    """
    points = [_centres(grid).double().numpy() for grid in (data, queries)]
    near = cKDTree(points[1]).query_ball_tree(cKDTree(points[0]), radius)
    of = np.repeat(np.arange(len(near)), [len(found) for found in near])
    index = np.fromiter((i for found in near for i in sorted(found)), np.int64, len(of))
    squares = np.square(points[1][of] - points[0][index]).sum(1)
    return {
        "of": torch.from_numpy(of),
        "neighbors_index": torch.from_numpy(index),
        "weights": torch.from_numpy(squares).float(),
    }


def _centres(grid: tuple[int, ...]) -> torch.Tensor:
    """Return the cell centres of the unit box, shape (N, d)."""
    return (coordinates(grid, torch.zeros(())).flatten(1).T + 1.0) / 2.0


class _Integral(nn.Module):
    """The linear kernel integral of neuraloperator, by index_add."""

    def __init__(self, theirs: Any) -> None:
        super().__init__()
        self.channel_mlp = theirs.channel_mlp
        self._weigh, self._is_mean = theirs.weighting_fn, theirs.reduction == "mean"

    def forward(
        self, y: torch.Tensor, neighbors: Neighbours, x: torch.Tensor, f_y: torch.Tensor
    ) -> torch.Tensor:
        """Return the integral at ``x`` (n, d) of ``f_y`` (B, m, C) given at ``y``, (B, n, C)."""
        of, index = neighbors["of"], neighbors["neighbors_index"]
        kernel = self.channel_mlp(torch.cat([y[index], x[of]], dim=1))
        if self._weigh is not None:
            kernel = kernel * self._weigh(neighbors["weights"])[:, None]
        elif self._is_mean:
            kernel = kernel / torch.bincount(of, minlength=len(x))[of, None]
        made = f_y.new_zeros(len(f_y), len(x), kernel.shape[1])
        return made.index_add(1, of, kernel * f_y.index_select(1, index))


class _Search(nn.Module):
    """Pairs of the two grids that a pass is about."""

    pairs: Neighbours

    def forward(self, data: torch.Tensor, queries: torch.Tensor, radius: float) -> Neighbours:
        """Return the pairs; what they are was said before the pass."""
        return self.pairs


class GeometryNetwork(nn.Module):
    """GINO between the cell centres of grids (settings: ``GINO``).

    Parameters
    ----------
    n_in, n_out, n_dims : int
    latent : tuple of int
        Points of the latent grid along each axis.
    modes : tuple of int
    width, layers : int
    radius : float
        In cells of the latent grid, or of the input grid where that is coarser.
    """

    def __init__(
        self,
        n_in: int,
        n_out: int,
        *,
        latent: tuple[int, ...],
        modes: tuple[int, ...],
        width: int,
        layers: int,
        radius: float,
    ) -> None:
        super().__init__()
        os.environ.setdefault("WANDB_MODE", "disabled")  # neuraloperator imports a web logger
        from neuralop.models import GINO

        from simlab.learn.spectral import MatrixSpectralConv, with_matrix_products

        self._latent, self._cells = latent, radius
        self.lift = nn.Linear(n_in, width)
        network = GINO(
            in_channels=width,
            out_channels=n_out,
            projection_channel_ratio=2,
            gno_coord_dim=len(latent),
            in_gno_radius=radius / min(latent),
            out_gno_radius=radius / min(latent),
            gno_weighting_function="half_cos",
            in_gno_pos_embed_type="nerf",
            out_gno_pos_embed_type="nerf",
            gno_embed_channels=4,
            fno_in_channels=width,
            fno_n_modes=modes,
            fno_hidden_channels=width,
            fno_n_layers=layers,
            in_gno_channel_mlp_hidden_layers=[2 * width],
            out_gno_channel_mlp_hidden_layers=[2 * width],
            gno_use_open3d=False,
            gno_use_torch_scatter=False,
            fno_conv_module=MatrixSpectralConv,
        )
        for block in (network.gno_in, network.gno_out):
            block.integral_transform = _Integral(block.integral_transform)
            block.neighbor_search = _Search()
        self.operator = with_matrix_products(network)

    def forward(
        self, parameters: torch.Tensor, fields: torch.Tensor, time: torch.Tensor
    ) -> torch.Tensor:
        """Return (B, C_out, *grid)."""
        grid = tuple(fields.shape[2:])
        points = _centres(grid)
        scalars = torch.cat([parameters, time], dim=1)[:, None].expand(-1, len(points), -1)
        values = self.lift(torch.cat([fields.flatten(2).transpose(1, 2), scalars], dim=2))
        inner = self._cells / min(self._latent)
        gino: Any = self.operator
        gino.gno_in.neighbor_search.pairs = _pairs(
            grid, self._latent, max(inner, self._cells / min(grid))
        )
        gino.gno_out.neighbor_search.pairs = _pairs(self._latent, grid, inner)
        latent = _centres(self._latent).reshape(*self._latent, -1)
        made = gino(points[None], latent[None], points[None], x=values)
        return cast(torch.Tensor, made).transpose(1, 2).reshape(len(fields), -1, *grid)
