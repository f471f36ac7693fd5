"""Spectral convolution by matrix products: the map of neuraloperator in less time.

With few modes m << n a Fourier layer needs m of n coefficients, so the transforms are thin real
matrix products instead of full FFTs, shifts and zero filling. Along the last axis

    X_k = 1/n sum_j x_j exp(-2 pi i j k / n),    k = 0 .. m-1,

along every other axis the same for k = -m/2 .. m/2 - 1, then each mode is multiplied by its own
channel matrix, and back: y_j = Re sum_k c_k Y_k exp(2 pi i j k / n), c_k = 1 for k = 0 and
k = n/2, else 2. A complex matrix is a real one with 2 x 2 blocks [[re, im], [-im, re]], since real
products are far faster than complex ones on a CPU. Cost per layer: O(B C N m) for N grid points,
against O(B C N log N) that runs at memory speed.

Parameters and their names are those of ``neuralop.layers.spectral_convolution.SpectralConv``. Where
the two differ: an axis (but the last) with an odd number of points. There neuraloperator 2.0 shifts
frequencies back with ``fftshift`` in place of ``ifftshift``, so that a constant comes out as a wave
and a network trained on an even grid fails on an odd one; here frequencies stay what they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from neuralop.layers.spectral_convolution import SpectralConv
from torch import nn
from torch.nn import functional

__all__ = ["MatrixSpectralConv", "PointwiseConv", "with_matrix_products"]


def _real_blocks(z: torch.Tensor) -> torch.Tensor:
    """Turn complex (..., a, b) into real (..., 2 a, 2 b), real and imaginary parts interleaved."""
    upper = torch.view_as_real(z)
    lower = torch.stack([-z.imag, z.real], dim=-1)
    *front, a, b = z.shape
    return torch.stack([upper, lower], dim=-3).reshape(*front, 2 * a, 2 * b)


def _waves(n: int, frequencies: torch.Tensor) -> torch.Tensor:
    points = torch.arange(n, dtype=torch.float64)
    return torch.exp(-2j * math.pi * torch.outer(points, frequencies) / n)


@lru_cache(maxsize=64)
def _axis(n: int, m: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return transform (2n, 2m) and back transform (2m, 2n) along an axis but the last."""
    waves = _waves(n, torch.arange(-(m // 2), m - m // 2, dtype=torch.float64))
    forward, backward = _real_blocks(waves / n), _real_blocks(waves.conj_physical().T)
    return forward.float().contiguous(), backward.float().contiguous()


@lru_cache(maxsize=64)
def _last_axis(n: int, m: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return transform (n, 2m) and back transform (2m, n) along the last axis, of real values."""
    k = torch.arange(m, dtype=torch.float64)
    waves = _waves(n, k)
    forward = torch.view_as_real(waves / n).reshape(n, 2 * m)
    twice = torch.where((k == 0) | (2 * k == n), 1.0, 2.0)
    back = torch.view_as_real(waves * twice).reshape(n, 2 * m).T  # Re(Y conj(w)) = Yr wr + Yi wi
    return forward.float().contiguous(), back.float().contiguous()


def _on_grid(weight: torch.Tensor, grid: tuple[int, ...]) -> torch.Tensor:
    """Leave out the modes that a grid has no points for."""
    for axis, n in enumerate(grid[:-1], start=2):
        m = weight.shape[axis]
        if n < m:
            weight = weight.narrow(axis, m // 2 - n // 2, n)
    return weight[..., : grid[-1] // 2 + 1]


class MatrixSpectralConv(SpectralConv):
    """A spectral convolution that computes only the modes it keeps.

    It may lead to another grid (``resolution_scaling_factor``, ``output_shape``): modes that both
    grids hold are summed there, and skip connections are interpolated between cell centres.
    """

    def grid_after(
        self, grid: tuple[int, ...], output_shape: Sequence[int] | None = None
    ) -> tuple[int, ...]:
        """Return the grid that this layer leads to from a grid."""
        if output_shape is not None:
            return tuple(output_shape)
        scaling = self.resolution_scaling_factor or [1.0] * len(grid)
        return tuple(max(1, round(n * factor)) for n, factor in zip(grid, scaling, strict=True))

    def transform(self, x: torch.Tensor, output_shape: Sequence[int] | None = None) -> torch.Tensor:
        """Return ``x`` interpolated between cell centres to the grid the layer leads to."""
        grid = self.grid_after(tuple(x.shape[2:]), output_shape)
        if grid == tuple(x.shape[2:]):
            return x
        mode = ("linear", "bilinear", "trilinear")[len(grid) - 1]
        return functional.interpolate(x, size=grid, mode=mode)

    def forward(self, x: torch.Tensor, output_shape: Sequence[int] | None = None) -> torch.Tensor:
        """Return the convolution of ``x`` (B, C, *grid), float32, on the grid it leads to."""
        grid, d = tuple(x.shape[2:]), x.ndim - 2
        to = self.grid_after(grid, output_shape)
        weight = _on_grid(self.weight.to_tensor(), tuple(map(min, grid, to)))
        modes = tuple(weight.shape[2:])
        b, c, o = len(x), self.in_channels, self.out_channels
        forward = _last_axis(grid[-1], modes[-1])[0].to(x)
        z = (x.reshape(-1, grid[-1]) @ forward).reshape(b, c, *grid[:-1], modes[-1], 2)
        for n, m in zip(grid[:-1], modes[:-1], strict=True):  # axes move to the end one by one
            z = z.movedim(2, -2).flatten(-2) @ _axis(n, m)[0].to(x)
            z = z.unflatten(-1, (m, 2))
        by_mode = z.permute(*range(2, 2 + d), 0, 1, 2 + d).reshape(-1, b, 2 * c)
        matrices = _real_blocks(weight.permute(1 + d, *range(2, 1 + d), 0, 1))
        y = torch.bmm(by_mode, matrices.reshape(-1, 2 * c, 2 * o))
        y = y.reshape(modes[-1], *modes[:-1], b, o, 2).permute(d, d + 1, *range(d), d + 2)
        for n, m in zip(reversed(to[:-1]), reversed(modes[:-1]), strict=True):
            y = y.flatten(-2) @ _axis(n, m)[1].to(x)
            y = y.unflatten(-1, (n, 2)).movedim(-2, 2)
        back = _last_axis(to[-1], modes[-1])[1].to(x)
        y = (y.reshape(-1, 2 * modes[-1]) @ back).reshape(b, o, *to)
        return y if self.bias is None else y + self.bias


class PointwiseConv(nn.Conv1d):
    """A convolution of kernel size 1 as one batched matrix product, on the weights it is given."""

    def __init__(self, conv: nn.Conv1d) -> None:
        super().__init__(conv.in_channels, conv.out_channels, 1, bias=conv.bias is not None)
        self.weight, self.bias = conv.weight, conv.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``W x + b`` of ``x`` (B, C_in, points)."""
        weight = self.weight[:, :, 0].expand(len(x), -1, -1)
        if self.bias is None:
            return torch.bmm(weight, x)
        return torch.baddbmm(self.bias[:, None], weight, x)


def with_matrix_products(network: nn.Module) -> nn.Module:
    """Replace every convolution of kernel size 1 in a network, in place; parameter names stay."""
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Conv1d and child.kernel_size == (1,):
                setattr(module, name, PointwiseConv(child))
    return network
