"""U-Net: convolutions on a pyramid of grids (Ronneberger, Fischer and Brox 2015).

    down:  x_0 = two convolutions of the input,  x_l = two convolutions of the averaged x_{l-1}
    up:    y_L = x_L,  y_l = two convolutions of (x_l, interpolated y_{l+1})
    out:   1 x 1 convolution of y_0

Grids of any size: averaging rounds up, interpolation goes back to the size it came from. Cost:
O(B N w^2) for N grid points and width w, every level a quarter (in 2-D, at twice the width as much)
of the one above. What it learns belongs to one grid spacing.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional

from simlab.learn.layers import coordinates, with_constants

__all__ = ["UNetwork"]

_CONV: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d)
_POOL: tuple[type[nn.Module], ...] = (nn.AvgPool1d, nn.AvgPool2d)


class _Convolution(nn.Module):
    """Kernel of 3, same size: wraps around periodic axes, zeros beyond the others."""

    def __init__(self, n_in: int, n_out: int, periodic: tuple[bool, ...]) -> None:
        super().__init__()
        padding = tuple(0 if wraps else 1 for wraps in periodic)
        self.convolution = _CONV[len(periodic) - 1](n_in, n_out, 3, padding=padding)
        self.norm = nn.GroupNorm(1, n_out)
        self._wrap = tuple(w for wraps in reversed(periodic) for w in (int(wraps),) * 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if any(self._wrap):
            x = functional.pad(x, self._wrap, mode="circular")
        return functional.gelu(self.norm(self.convolution(x)))


def _pair(n_in: int, n_out: int, periodic: tuple[bool, ...]) -> nn.Sequential:
    return nn.Sequential(_Convolution(n_in, n_out, periodic), _Convolution(n_out, n_out, periodic))


class UNetwork(nn.Module):
    """U-Net in one or two dimensions with parameters and time as constant channels (``UNet``)."""

    def __init__(
        self, n_in: int, n_out: int, *, width: int, levels: int, periodic: tuple[bool, ...]
    ) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(levels)]
        self.down = nn.ModuleList(
            _pair(a, b, periodic)
            for a, b in zip([n_in + len(periodic), *widths], widths, strict=False)
        )
        self.up = nn.ModuleList(_pair(a + b, a, periodic) for a, b in pairwise(widths))
        self.out = _CONV[len(periodic) - 1](width, n_out, 1)
        self.average = _POOL[len(periodic) - 1](2, ceil_mode=True, count_include_pad=False)
        self._interpolation = ("linear", "bilinear")[len(periodic) - 1]

    def forward(
        self, parameters: torch.Tensor, fields: torch.Tensor, time: torch.Tensor
    ) -> torch.Tensor:
        """Return (B, C_out, *grid)."""
        x = with_constants(parameters, fields, time)
        points = coordinates(x.shape[2:], x).expand(len(x), *(-1,) * (x.ndim - 1))
        x = torch.cat([x, points], dim=1)
        passed = []
        for level, block in enumerate(self.down):
            x = block(self.average(x) if level else x)
            passed.append(x)
        passed.pop()
        for block in reversed(self.up):
            finer = passed.pop()
            x = functional.interpolate(x, size=finer.shape[2:], mode=self._interpolation)
            x = block(torch.cat([finer, x], dim=1))
        return self.out(x)
