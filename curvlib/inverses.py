"""Inverses of positive definite matrices, in the way that is fastest for their size and number.

* Tiny ones on a CPU: by planes, see :mod:`curvlib.planes`.
* Small ones: W = L⁻¹ and A⁻¹ = WᵀW, on a CPU in halves, so that most of the work is products of matrices::

    L₂₁ = A₂₁ W₁ᵀ        W₂ = chol(A₂₂ - L₂₁ L₂₁ᵀ)⁻¹        W₂₁ = -W₂ L₂₁ W₁

* Large ones on a CPU, whose products are no faster than LAPACK: Cholesky's factor and its inverse.

All of them lose the digits that Cholesky's method loses, c·n·κ·u.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import planes
from .calibration import calibration


def inverse(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Inverses of a batch ``[N, f, f]``, of which one triangle is read, and which failed, ``[N]`` bool.

    An inverse that failed is anything.
    """
    n, f, _ = matrix.shape
    known = calibration(matrix.device)
    if planes.suits(n, f, matrix.device):
        return planes.inverse(matrix)
    if known.lapack_rows is not None and f >= known.lapack_rows:
        lower, failed = torch.linalg.cholesky_ex(matrix)
        if failed.any():  # what failed may be singular
            lower = torch.where(failed[:, None, None] == 0, lower, _identity(matrix))
        return torch.cholesky_inverse(lower).mT, failed != 0  # symmetric, but laid out by columns
    leaf = f if known.halves_rows is None else known.halves_rows - 1
    lower, failed = _inverse_factor(matrix, leaf)
    inverses = torch.empty_like(lower)
    _gram(lower, inverses, 2 * leaf)
    return inverses, failed


def _halves(f: int) -> int:
    return (f // 2 + 15) // 16 * 16


def _inverse_factor(matrix: Tensor, leaf: int) -> tuple[Tensor, Tensor]:
    """W = L⁻¹, and which failed; matrices up to ``leaf`` rows are factored at once."""
    f = matrix.shape[-1]
    if f <= max(leaf, 16):
        lower, failed = torch.linalg.cholesky_ex(matrix)
        if matrix.device.type == "cpu" and failed.any():
            lower = torch.where(failed[:, None, None] == 0, lower, _identity(matrix))
        return torch.linalg.solve_triangular(lower, _identity(matrix).expand_as(lower), upper=False), failed != 0
    h = _halves(f)
    first, failed = _inverse_factor(matrix[:, :h, :h], leaf)
    below = matrix[:, h:, :h] @ first.mT
    second, also = _inverse_factor(torch.baddbmm(matrix[:, h:, h:], below, below.mT, alpha=-1), leaf)
    whole = matrix.new_zeros(matrix.shape)
    whole[:, :h, :h] = first
    whole[:, h:, h:] = second
    whole[:, h:, :h] = (second @ below).neg_() @ first
    return whole, failed | also


def _gram(lower: Tensor, out: Tensor, leaf: int) -> None:
    """WᵀW of lower triangles, into a tensor that is there."""
    f = lower.shape[-1]
    if f <= max(leaf, 16):
        out.copy_(lower.mT @ lower)
        return
    h = _halves(f)
    below, second = lower[:, h:, :h], lower[:, h:, h:]
    _gram(lower[:, :h, :h], out[:, :h, :h], leaf)
    out[:, :h, :h] += below.mT @ below
    _gram(second, out[:, h:, h:], leaf)
    out[:, h:, :h] = second.mT @ below
    out[:, :h, h:] = out[:, h:, :h].mT


def _identity(matrix: Tensor) -> Tensor:
    return torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
