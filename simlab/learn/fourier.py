"""neuraloperator's U-shaped operator on our spectral layers.

    level:     0   1  ..  L   L-1  ..  0     0
    channels:  w  2w .. 2^L w  ..  2w  w     w

Every layer is a Fourier layer with a pointwise shortcut and a channel network; the second half
reads the first half's outputs of its own level. The last layer leads to the grid of the input.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

from simlab.learn.layers import with_constants

__all__ = ["UShapedNetwork"]


class UShapedNetwork(nn.Module):
    """UNO with parameters and time as constant channels (settings: ``UNO``).

    Parameters
    ----------
    n_in, n_out : int
    modes : sequence of sequence of int
        Modes along each axis, for each level from the finest.
    width : int
    """

    def __init__(
        self, n_in: int, n_out: int, *, modes: Sequence[Sequence[int]], width: int
    ) -> None:
        super().__init__()
        os.environ.setdefault("WANDB_MODE", "disabled")  # neuraloperator imports a web logger
        from neuralop.layers.fno_block import FNOBlocks
        from neuralop.models import UNO

        from simlab.learn.spectral import MatrixSpectralConv, with_matrix_products

        coarsest, n_dims = len(modes) - 1, len(modes[0])
        levels = [*range(coarsest + 1), *reversed(range(coarsest)), 0]
        factors = [1.0] + [0.5] * coarsest + [2.0] * coarsest + [1.0]
        with contextlib.redirect_stdout(io.StringIO()):  # its constructor prints
            network = UNO(
                in_channels=n_in,
                out_channels=n_out,
                hidden_channels=width,
                lifting_channels=2 * width,
                projection_channels=2 * width,
                n_layers=len(levels),
                uno_out_channels=[width * 2**level for level in levels],
                uno_n_modes=[list(modes[level]) for level in levels],
                uno_scalings=[[factor] * n_dims for factor in factors],
                channel_mlp_skip="linear",
                operator_block=partial(FNOBlocks, conv_module=MatrixSpectralConv),
            )
        self.operator = with_matrix_products(network)

    def forward(
        self, parameters: torch.Tensor, fields: torch.Tensor, time: torch.Tensor
    ) -> torch.Tensor:
        """Return (B, C_out, *grid)."""
        return self.operator(with_constants(parameters, fields, time))
