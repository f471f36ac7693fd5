"""Message passing that marches in time (after Brandstetter, Worrall and Welling 2022, MP-PDE).

A solution at n points of a line is made K stored times at a time, a bundle:

    h_i  = encoder(inputs_i, x_i, mu, last bundle at i, its time)
    m_i  = M mean_j gelu(A (h_i, z_i, mu) + B (h_j, z_j) + d (x_j - x_i)),    j within r of i
    h_i += LayerNorm(node layers(h_i, m_i, mu))                               several times over
    u^{k+l}_i = u^k_i + (l / K) D_l(h_i),   l = 1 .. K

with z the last bundle and the input fields, D a convolution along the bundle, and u^0 a linear
function of the input fields. The second matrix of the edge network acts after the mean, which is
the same and 2 r times cheaper. Between stored times the answer is linear.

Where this departs from the paper: the first bundle is made from the input fields, not from K given
steps; LayerNorm in place of InstanceNorm; gradients go through all bundles up to the time asked
for, so that a batch of single steps trains it. Cost: O(B N w (w + r)) per layer and bundle, and
ceil(k / K) bundles for the k-th time: with many times, make K large.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from simlab.learn.layers import coordinates, dense, time_scale

__all__ = ["MarchingNetwork"]


@lru_cache(maxsize=64)
def _line(n: int, reach: int, is_periodic: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the neighbours (2 r, n) of every point, and their weights (2 r, n) in the mean."""
    offsets = torch.tensor([o for o in range(-reach, reach + 1) if o])
    index = torch.arange(n) + offsets[:, None]
    if is_periodic:
        return index % n, torch.full(index.shape, 1.0 / len(offsets))
    inside = ((index >= 0) & (index < n)).float()
    return index.clamp(0, n - 1), inside / inside.sum(0).clamp(min=1.0)


class _Messages(nn.Module):
    """One round of messages between the points within reach."""

    def __init__(
        self, width: int, n_state: int, n_scalars: int, reach: int, periodic: bool
    ) -> None:
        super().__init__()
        self._reach, self._is_periodic = reach, periodic
        self.own = nn.Linear(width + n_state + n_scalars, width)
        self.other = nn.Linear(width + n_state, width, bias=False)
        self.distance = nn.Linear(1, width, bias=False)
        self.message = nn.Linear(width, width)
        self.node = dense([2 * width + n_scalars, width, width])
        self.norm = nn.LayerNorm(width)

    def forward(self, h: torch.Tensor, state: torch.Tensor, scalars: torch.Tensor) -> torch.Tensor:
        """Return the new features (B, n, width)."""
        index, weights = _line(h.shape[1], self._reach, self._is_periodic)
        offsets = torch.tensor([o for o in range(-self._reach, self._reach + 1) if o]).to(h)
        own = self.own(torch.cat([h, state, scalars], dim=2))
        other = self.other(torch.cat([h, state], dim=2))
        steps = self.distance(offsets[:, None] / self._reach)[:, None]
        edges = functional.gelu(own[:, None] + other[:, index] + steps)
        message = self.message(torch.einsum("bonw,on->bnw", edges, weights.to(h)))
        return h + self.norm(self.node(torch.cat([h, message, scalars], dim=2)))


class MarchingNetwork(nn.Module):
    """Bundles of times on a line by message passing (settings: ``MPPDE``)."""

    _TRACKS = 8
    _times: torch.Tensor

    def __init__(
        self,
        n_parameters: int,
        n_inputs: int,
        n_out: int,
        times: Sequence[float],
        *,
        bundle: int,
        width: int,
        layers: int,
        reach: int,
        periodic: bool,
    ) -> None:
        super().__init__()
        self.n_out, self.bundle, self._n_times = n_out, min(bundle, len(times)), len(times)
        mean, std = time_scale(times)
        scaled = (torch.tensor(np.asarray(times), dtype=torch.float64) - mean) / std
        self.register_buffer("_times", scaled.float(), persistent=False)
        n_state = self.bundle * n_out + n_inputs
        self.start = nn.Linear(n_inputs, n_out) if n_inputs else None
        self.encode = dense([n_state + n_parameters + 2, width, width])
        self.layers = nn.ModuleList(
            _Messages(width, n_state, n_parameters, reach, periodic) for _ in range(layers)
        )
        self.spread = nn.Linear(width, self._TRACKS * self.bundle)
        self.decode = nn.Conv1d(self._TRACKS, n_out, 5, padding=2)

    def forward(
        self, parameters: torch.Tensor, fields: torch.Tensor, time: torch.Tensor
    ) -> torch.Tensor:
        """Return (B, C_out, n)."""
        step, share = self._position(time[:, 0].contiguous())
        made = self._march(parameters, fields, (int(step.max()) + 1) // self.bundle + 1)
        pick = step[:, None, None, None].expand(-1, *made.shape[1:3], 1)
        before, after = (made.gather(3, pick + k)[..., 0] for k in (0, 1))
        return torch.lerp(before, after, share[:, None, None]).transpose(1, 2)

    def _position(self, time: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the stored time before each time (B,), and the share of the way to the next."""
        step = torch.searchsorted(self._times, time, right=True).clamp(1, self._n_times - 1) - 1
        begin, end = self._times[step], self._times[step + 1]
        return step, ((time - begin) / (end - begin)).clamp(0.0, 1.0)

    def _march(self, parameters: torch.Tensor, fields: torch.Tensor, n: int) -> torch.Tensor:
        """Return ``n`` bundles, shape (B, points, C_out, n K)."""
        fields, size = fields.transpose(1, 2), fields.shape[2]
        x = coordinates((size,), fields).T.expand(len(fields), -1, -1)
        scalars = parameters[:, None].expand(-1, size, -1)
        last = x.new_zeros(len(x), size, self.n_out) if self.start is None else self.start(fields)
        bundle = x.new_zeros(len(x), size, self.n_out, self.bundle)
        share = torch.arange(1, self.bundle + 1).to(x) / self.bundle
        bundles = []
        for k in range(n):
            state = torch.cat([bundle.flatten(2), fields], dim=2)
            begun = torch.full_like(x, k * self.bundle / self._n_times)
            h = self.encode(torch.cat([state, scalars, x, begun], dim=2))
            for layer in self.layers:
                h = layer(h, state, scalars)
            tracks = functional.gelu(self.spread(h)).reshape(-1, self._TRACKS, self.bundle)
            slopes = self.decode(tracks).reshape(bundle.shape)
            bundle = last[..., None] + share * slopes
            last = bundle[..., -1]
            bundles.append(bundle)
        return torch.cat(bundles, dim=3)
