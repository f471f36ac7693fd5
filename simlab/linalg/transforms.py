"""Fast inverses of the constant-coefficient Laplacian on a box of cells: sine, cosine, Fourier.

The cell-centred Laplacian ``L = sum_j weight_j L_j`` (five or seven points, grid spacing left out)
is diagonal in the basis of

    dirichlet   DST-II   s_k(j) = sin(pi (k+1)(j+1/2)/n)   lambda_k = 4 sin^2(pi (k+1)/2n)
    neumann     DCT-II   c_k(j) = cos(pi k (j+1/2)/n)      lambda_k = 4 sin^2(pi k/2n)
    periodic    FFT                                        lambda_k = 4 sin^2(pi k/n)

so ``(L + shift)^-1`` costs two transforms and one product per unknown. An axis whose length is a
product of small primes goes through scipy's FFT. Other lengths (421, a prime, is that of a
well-known data set) cost an FFT seven times as much; there the transform is a matrix product, with
half the work because every basis vector is even or odd about the middle: measured at 421 x 421 in
single precision, less than half of the time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Literal

import numpy as np
from scipy import fft

__all__ = ["LaplaceInverse", "is_smooth", "laplace_diagonal"]

Boundary = Literal["dirichlet", "neumann", "periodic"]

_LARGEST_PRIME = 11  # pocketfft's hand-written passes end here
_LONGEST_PRODUCT = 1500  # cells along an axis up to which a matrix product beats a rough FFT


def is_smooth(n: int) -> bool:
    """Whether a length is a product of primes that FFTs are quick for."""
    for prime in (2, 3, 5, 7, _LARGEST_PRIME):
        while n % prime == 0:
            n //= prime
    return n == 1


def laplace_diagonal(
    shape: Sequence[int], boundary: Boundary, weights: Sequence[float]
) -> np.ndarray:
    """Return the diagonal of ``L``, shape ``shape``.

    Half a cell lies between the first unknown and a Dirichlet wall, so that face counts twice.
    """
    at_wall = {"dirichlet": 2.0, "neumann": 0.0, "periodic": 1.0}[boundary]
    total = np.zeros(shape)
    for axis, (n, weight) in enumerate(zip(shape, weights, strict=True)):
        line = np.full(n, 2.0)
        line[0] += at_wall - 1.0
        line[-1] += at_wall - 1.0
        total += weight * _along(line, axis, len(shape))
    return total


class LaplaceInverse:
    """Apply ``(L + shift)^-1``. Rank-local.

    Parameters
    ----------
    shape : tuple of int
        Cells along each axis.
    boundary : {"dirichlet", "neumann", "periodic"}
    weights : sequence of float
        Factor of each axis.
    dtype : numpy dtype
        Precision of everything, ``float32`` or ``float64``.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        boundary: Boundary,
        weights: Sequence[float],
        dtype: type[np.floating] = np.float32,
    ) -> None:
        self._shape, self._boundary, self._dtype = shape, boundary, np.dtype(dtype)
        self._products = {
            axis: _FoldedProduct(shape, axis, boundary, self._dtype)
            for axis, n in enumerate(shape)
            if boundary != "periodic" and not is_smooth(n) and n <= _LONGEST_PRODUCT
        }
        self._fft_axes = tuple(axis for axis in range(len(shape)) if axis not in self._products)
        self._norm = prod(2.0 * shape[axis] for axis in self._fft_axes)
        self._eigenvalues = self._make_eigenvalues(weights)
        self._divisor = np.empty(0, dtype=self._dtype)
        self.shift = np.nan
        self.is_singular = False

    def set_shift(self, shift: float) -> None:
        """Choose ``shift``; where ``L + shift`` has a zero mode, that mode is treated as the next.

        Parameters
        ----------
        shift : float
            Larger than minus the smallest eigenvalue of ``L``, up to rounding.
        """
        if shift == self.shift:
            return
        self.shift = shift
        values = self._eigenvalues + shift
        largest = values.max()
        is_zero = values <= 1e-12 * largest
        self.is_singular = bool(is_zero.any())
        values[is_zero] = values[~is_zero].min() if not is_zero.all() else 1.0
        factor = 1.0 if self._boundary == "periodic" else 1.0 / self._norm
        self._divisor = (factor / values).astype(self._dtype)

    def apply(self, values: np.ndarray) -> np.ndarray:
        """Return ``(L + shift)^-1 values``; the argument is used as work space.

        Parameters
        ----------
        values : ndarray, shape ``shape``, the precision chosen
        """
        if self._boundary == "periodic":
            spectrum = fft.rfftn(values, workers=1)
            spectrum *= self._divisor
            return fft.irfftn(spectrum, s=self._shape, overwrite_x=True, workers=1)
        forward: Callable[..., np.ndarray]
        forward = fft.dstn if self._boundary == "dirichlet" else fft.dctn
        if self._fft_axes:
            values = forward(values, type=2, axes=self._fft_axes, overwrite_x=True, workers=1)
        for product in self._products.values():
            values = product.forward(values)
        values *= self._divisor
        for product in self._products.values():
            values = product.backward(values)
        if self._fft_axes:  # type 3 undoes type 2, up to the factor that the divisor holds
            values = forward(values, type=3, axes=self._fft_axes, overwrite_x=True, workers=1)
        return values

    def _make_eigenvalues(self, weights: Sequence[float]) -> np.ndarray:
        total = np.zeros([1] * len(self._shape))
        for axis, (n, weight) in enumerate(zip(self._shape, weights, strict=True)):
            if self._boundary == "periodic":
                is_last = axis == len(self._shape) - 1
                waves = np.arange(n // 2 + 1 if is_last else n)
                line = 4.0 * np.sin(np.pi * waves / n) ** 2
            else:
                waves = np.arange(n) + (self._boundary == "dirichlet")
                if axis in self._products:
                    waves = np.concatenate([waves[0::2], waves[1::2]])
                line = 4.0 * np.sin(np.pi * waves / (2 * n)) ** 2
            total = total + weight * _along(line, axis, len(self._shape))
        return total


class _FoldedProduct:
    """DST-II or DCT-II along one axis as two products of half the size, orthonormal.

    ``x`` is split into its even part ``x_j + x_(n-1-j)`` and its odd part; basis vectors 0, 2, 4...
    see only the first, 1, 3, 5... only the second. The spectrum stays in the order even, odd.
    """

    def __init__(
        self, shape: tuple[int, ...], axis: int, boundary: Boundary, dtype: np.dtype
    ) -> None:
        n = self._n = shape[axis]
        self._half, self._n_even = n // 2, n - n // 2
        self._shape = shape
        self._view = (prod(shape[:axis]), n, prod(shape[axis + 1 :]))
        places = np.arange(self._n_even) + 0.5
        waves = np.arange(n) + (boundary == "dirichlet")
        wave = np.sin if boundary == "dirichlet" else np.cos
        basis = wave(np.pi * np.outer(waves, places) / n) * np.sqrt(2.0 / n)
        basis[-1 if boundary == "dirichlet" else 0] *= np.sqrt(0.5)
        even, odd = basis[0::2], basis[1::2, : self._half]
        self._even, self._odd = even.astype(dtype), odd.astype(dtype)
        before, _, after = self._view
        self._is_last = after == 1
        sizes = ((before, k, after) for k in (self._n_even, self._half))
        self._even_part, self._odd_part = (np.empty(size, dtype) for size in sizes)
        self._spectrum = np.empty(self._view, dtype)
        self._values = np.empty(self._view, dtype)

    def forward(self, values: np.ndarray) -> np.ndarray:
        """Return the spectrum along the axis, in work space of this object."""
        x, h = values.reshape(self._view), self._half
        mirrored = x[:, : self._n - h - 1 : -1]
        np.add(x[:, :h], mirrored, out=self._even_part[:, :h])
        np.subtract(x[:, :h], mirrored, out=self._odd_part)
        if self._n % 2:
            self._even_part[:, h] = x[:, h]
        self._multiply(self._even, self._even_part, self._spectrum[:, : self._n_even])
        self._multiply(self._odd, self._odd_part, self._spectrum[:, self._n_even :])
        return self._spectrum.reshape(self._shape)

    def backward(self, spectrum: np.ndarray) -> np.ndarray:
        """Return the values whose spectrum this is, in work space of this object."""
        y, x, h = spectrum.reshape(self._view), self._values, self._half
        self._multiply(self._even.T, y[:, : self._n_even], self._even_part)
        self._multiply(self._odd.T, y[:, self._n_even :], self._odd_part)
        np.add(self._even_part[:, :h], self._odd_part, out=x[:, :h])
        np.subtract(self._even_part[:, :h], self._odd_part, out=x[:, : self._n - h - 1 : -1])
        if self._n % 2:
            x[:, h] = self._even_part[:, h]
        return x.reshape(self._shape)

    def _multiply(self, matrix: np.ndarray, x: np.ndarray, out: np.ndarray) -> None:
        """Multiply along the middle axis of a view (before, n, after)."""
        if self._is_last:
            np.matmul(x[..., 0], matrix.T, out=out[..., 0])
        else:
            np.matmul(matrix, x, out=out)


def _along(line: np.ndarray, axis: int, n_axes: int) -> np.ndarray:
    shape = [1] * n_axes
    shape[axis] = len(line)
    return line.reshape(shape)
