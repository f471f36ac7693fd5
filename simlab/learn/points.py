"""A graph operator on a sample of points, decoded anywhere by a local learned kernel.

The idea is GIOROM's (Viswanath et al. 2024): work on far fewer points than the field has, and let a
kernel carry the answer to whatever points are asked for.

    read:    a_j = input fields interpolated to m fixed points p_j, spread evenly over the box
    lift:    h_j = MLP(a_j, mu, t, p_j)
    mix:     h_j += MLP(h_j, M mean_i gelu(A h_j + B h_i + D (p_i - p_j)), q_j S),
             i the nearest points; S = mean_i k_i v_i^T sees all points at once (linear attention)
    decode:  u(x) = MLP(sum_i w_i(x) (1 + kappa(x - p_i)) * V h_i),   i the points nearest to x,

with w falling to 0 at the distance of the first point left out, so that u is continuous. Points and
neighbours are the same for every grid, so the answer hardly depends on resolution; what is finer
than the points is not seen. Cost: O(B m w (w + k)) per round, and O(B N w (w + k)) to decode N
points, which is most of it. Neighbours come from a k-d tree, once per grid.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import nn
from torch.nn import functional

from simlab.learn.layers import coordinates, dense

__all__ = ["PointNetwork", "spread_points"]

_CHUNK = 16384


def spread_points(n: int, n_dims: int) -> np.ndarray:
    """Return points that fill the box [-1, 1]^d evenly, shape (n, d), float64.

    Multiples of powers of 1/g modulo 1, where g^(d+1) = g + 1 (Roberts 2018).
    """
    g = 2.0
    for _ in range(64):
        g = (1.0 + g) ** (1.0 / (n_dims + 1))
    steps = np.outer(np.arange(n) + 0.5, g ** -np.arange(1.0, n_dims + 1))
    points: np.ndarray = 2.0 * (steps % 1.0) - 1.0
    return points


def _nearest(points: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return distances and indices of the ``k`` nearest points, nearest first, shape (n, k)."""
    distances, index = cKDTree(points).query(queries, k=range(1, k + 1))
    return distances, index


@lru_cache(maxsize=16)
def _decoding(
    n_points: int, grid: tuple[int, ...], k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return indices (N, k), scaled offsets (N, k, d) and weights (N, k) for the points of a grid.

    ``k`` is at most ``n_points``; the first point left out is where the weights end.
    """
    points = spread_points(n_points, len(grid))
    queries = coordinates(grid, torch.zeros((), dtype=torch.float64)).flatten(1).T.numpy()
    distances, index = _nearest(points, queries, min(k + 1, n_points))
    weights = np.square(np.clip(1.0 - np.square(distances / distances[:, -1:]), 0.0, None))
    if index.shape[1] == 1 or not weights.sum(1).all():
        weights += 1e-6
    weights /= weights.sum(1, keepdims=True)
    offsets = (queries[:, None] - points[index]) / distances[:, -1:, None].mean()
    return (
        torch.from_numpy(index),
        torch.from_numpy(offsets).float(),
        torch.from_numpy(weights).float(),
    )


def _of(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return ``values[:, index]``, whose gradient is the slower of the two."""
    return values.index_select(1, index.flatten()).unflatten(1, index.shape)


class _Mixing(nn.Module):
    """Messages between near points, and linear attention over all of them."""

    def __init__(self, width: int, n_dims: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.own = nn.Linear(width, width)
        self.other = nn.Linear(width, width, bias=False)
        self.offset = nn.Linear(n_dims, width, bias=False)
        self.message = nn.Linear(width, width)
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.node = dense([3 * width, width, width])

    def forward(
        self, h: torch.Tensor, neighbours: torch.Tensor, offsets: torch.Tensor
    ) -> torch.Tensor:
        """Return the new features (B, m, width)."""
        x = self.norm(h)
        edges = self.own(x)[:, :, None] + _of(self.other(x), neighbours) + self.offset(offsets)
        message = self.message(functional.gelu(edges).mean(2))
        keys, values = functional.gelu(self.key(x)), self.value(x)
        seen = self.query(x) @ (keys.transpose(1, 2) @ values / x.shape[1])
        return h + self.node(torch.cat([x, message, seen], dim=2))


class PointNetwork(nn.Module):
    """Sampled points in, any grid out (settings: ``PointOperator``)."""

    _points: torch.Tensor
    _index: torch.Tensor
    _offsets: torch.Tensor

    def __init__(
        self,
        n_scalars: int,
        n_inputs: int,
        n_out: int,
        *,
        n_dims: int,
        points: int,
        neighbours: int,
        width: int,
        layers: int,
    ) -> None:
        super().__init__()
        self.neighbours = neighbours
        where = spread_points(points, n_dims)
        distances, index = _nearest(where, where, min(neighbours + 1, points))
        offsets = (where[index] - where[:, None]) / max(distances[:, -1].mean(), 1e-12)
        for name, values in (
            ("_points", torch.from_numpy(where).float()),
            ("_index", torch.from_numpy(index)),
            ("_offsets", torch.from_numpy(offsets).float()),
        ):
            self.register_buffer(name, values, persistent=False)  # settings say them all
        self.lift = dense([n_scalars + n_inputs + n_dims, width, width])
        self.layers = nn.ModuleList(_Mixing(width, n_dims) for _ in range(layers))
        self.value = nn.Linear(width, width)
        self.kernel = dense([n_dims, width, width])
        self.project = dense([width, width, n_out])

    def forward(
        self, parameters: torch.Tensor, fields: torch.Tensor, time: torch.Tensor
    ) -> torch.Tensor:
        """Return (B, C_out, *grid)."""
        grid = tuple(fields.shape[2:])
        scalars = torch.cat([parameters, time], dim=1)[:, None].expand(-1, len(self._points), -1)
        where = self._points.expand(len(fields), -1, -1)
        h = self.lift(torch.cat([self._read(fields), scalars, where], dim=2))
        for layer in self.layers:
            h = layer(h, self._index, self._offsets)
        made = self._decode(self.value(h), grid)
        return made.transpose(1, 2).reshape(len(fields), -1, *grid)

    def _read(self, fields: torch.Tensor) -> torch.Tensor:
        """Return the fields at the points, linear between cells, shape (B, m, C_in)."""
        where, n_dims = self._points.flip(1), fields.ndim - 2  # grid_sample wants x last axis first
        if n_dims == 1:
            fields = fields[:, :, None]
            where = functional.pad(where, (0, 1))
        where = where.reshape(1, *(1,) * (max(n_dims, 2) - 1), *where.shape)
        read = functional.grid_sample(
            fields,
            where.expand(len(fields), *(-1,) * (where.ndim - 1)).to(fields),
            padding_mode="border",
            align_corners=False,
        )
        return read.flatten(2).transpose(1, 2)

    def _decode(self, values: torch.Tensor, grid: tuple[int, ...]) -> torch.Tensor:
        """Return the outputs at the points of a grid, shape (B, N, C_out)."""
        parts = []
        near = _decoding(len(self._points), grid, self.neighbours)
        for index, offsets, weights in zip(*(t.split(_CHUNK) for t in near), strict=True):
            kernel = (1.0 + self.kernel(offsets)) * weights[..., None]
            parts.append(self.project((_of(values, index) * kernel).sum(2)))
        return torch.cat(parts, dim=1)
