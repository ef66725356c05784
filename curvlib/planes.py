"""Tiny symmetric matrices by planes: one entry of all matrices side by side, so that arithmetic runs along the matrices.

A batch ``[B, f, f]`` lies by planes if its strides are those of a tensor ``[f, f, B]``. Everything works on it as on any
other batch; but what libraries do matrix by matrix on a CPU, and pay for by the call, is here done for all at once. Of
symmetric matrices the diagonals on and above the main one are read: P_d, the entries (i, i + d), are a view ``[f - d, B]``::

    (M x)_i  = Σ_d  P_d[i] x_{i+d}  +  Σ_{d>0} P_d[i-d] x_{i-d}
    M + x xᵀ:  P_d[i] <- P_d[i] + x_i x_{i+d}
    M⁻¹:       sweep every k: M_ij <- M_ij - M_ik M_kj / M_kk, M_ik <- M_ik / M_kk, M_kk <- -1 / M_kk; then change all signs

(Goodnight 1979, the sweep operator; for positive definite matrices it needs no pivoting.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from .calibration import calibration
from .precision import flush_subnormals_

_RUN = 1 << 15  # matrices at a time, whose vectors stay in the cache


def suits(matrices: int, size: int, device: torch.device) -> bool:
    """Whether so many matrices of a size should lie by planes."""
    known = calibration(device)
    return known.planes_rows is not None and 1 < size <= known.planes_rows and matrices >= known.planes_count


def lay(matrix: Tensor) -> Tensor:
    """The same batch ``[..., f, f]``, by planes."""
    f = matrix.shape[-1]
    planes = matrix.reshape(-1, f, f).permute(1, 2, 0).contiguous()
    return planes.permute(2, 0, 1).view(matrix.shape)


def identities(shape: tuple[int, ...], fill: float, dtype: torch.dtype) -> Tensor:
    """Multiples of the identity, ``[..., f, f]``, by planes."""
    f = shape[-1]
    planes = torch.zeros(f, f, math.prod(shape[:-2]), dtype=dtype)
    planes.diagonal(0, 0, 1).fill_(fill)
    return planes.permute(2, 0, 1).view(shape)


def laid(matrix: Tensor) -> bool:
    """Whether a batch ``[B, f, f]`` lies by planes, or is a run of rows of one that does."""
    b, f, _ = matrix.shape
    row, down, across = matrix.stride()
    return suits(b, f, matrix.device) and row == 1 and across >= b and down == f * across


def _diagonals(matrix: Tensor, first: int, last: int, sign: int = 1) -> list[Tensor]:
    """P_d ``[f - d, last - first]`` for every d from 0; with sign -1 those below the main diagonal, which is left out."""
    f, planes = matrix.shape[-1], matrix.permute(1, 2, 0)[..., first:last]
    return [planes.diagonal(sign * d, 0, 1).mT for d in range(sign < 0, f)]


def _runs(matrix: Tensor) -> Iterator[tuple[int, int]]:
    b = matrix.shape[0]
    for first in range(0, b, _RUN):
        yield first, min(b, first + _RUN)


def _across(vectors: Tensor) -> Tensor:
    """``[B, f]`` -> ``[f, B]``: a product with the identity, which is exact, and ten times as fast as a copy."""
    return torch.mm(torch.eye(vectors.shape[1], dtype=vectors.dtype), vectors.mT)


def times(matrix: Tensor, vectors: Tensor) -> Tensor:
    """The product of every matrix with its vector: ``[B, f, f]``, ``[B, f]`` -> ``[B, f]``."""
    f, identity = matrix.shape[-1], torch.eye(matrix.shape[-1], dtype=matrix.dtype)
    products = vectors.new_empty(vectors.shape)
    for first, last in _runs(matrix):
        x = _across(vectors[first:last])
        main, *above = _diagonals(matrix, first, last)
        image = main * x
        for d, entries in enumerate(above, start=1):
            image[: f - d].addcmul_(entries, x[d:])
            image[d:].addcmul_(entries, x[: f - d])
        torch.mm(image.mT, identity, out=products[first:last])
    return products


def accumulate(matrix: Tensor, vectors: Tensor, keep: float | Tensor, gain: float | Tensor) -> None:
    """M <- keep M + gain x xᵀ, in place: ``[B, f, f]``, ``[B, f]``."""
    f = matrix.shape[-1]
    for first, last in _runs(matrix):
        x = _across(vectors[first:last])
        scaled = x * gain
        upper, lower = _diagonals(matrix, first, last), _diagonals(matrix, first, last, -1)
        for d, entries in enumerate(upper):
            flush_subnormals_(entries.mul_(keep).addcmul_(x[: f - d], scaled[d:]))
        for below, entries in zip(lower, upper[1:], strict=True):
            below.copy_(entries)


def _starts(f: int) -> list[int]:
    """Where each P_d begins, and the last one ends, among all of them one after the other."""
    return [d * f - d * (d - 1) // 2 for d in range(f + 1)]


@lru_cache(maxsize=32)
def _places(f: int) -> Tensor:
    """Where the entry (i, j) stands among all diagonals one after the other, ``[f, f]``."""
    starts = _starts(f)
    return torch.tensor([[starts[abs(i - j)] + min(i, j) for j in range(f)] for i in range(f)])


def inverse(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The inverses ``[B, f, f]`` of positive definite matrices, one after the other, and which failed, ``[B]``."""
    b, f, _ = matrix.shape
    starts, places = _starts(f), _places(f)
    # A product with ones and zeros puts entries in place, which is exact, and faster than copies.
    unpacked = torch.nn.functional.one_hot(places.flatten(), starts[-1]).to(matrix.dtype).mT
    inverses = matrix.new_empty(b, f * f)
    failed = torch.zeros(b, dtype=torch.bool)
    for first, last in _runs(matrix):
        swept = torch.cat(_diagonals(matrix, first, last))
        diagonals = [swept[start:end] for start, end in pairwise(starts)]
        for k, row in enumerate(places):
            column = swept.index_select(0, row)
            failed[first:last] |= ~(column[k] > 0)
            pivot = column[k].reciprocal()
            column[k] = 0
            share = column * pivot
            for d, entries in enumerate(diagonals):
                entries.addcmul_(column[: f - d], share[d:], value=-1)
            share[k] = -pivot
            swept.index_copy_(0, row, share)
        torch.mm(swept.neg_().mT, unpacked, out=inverses[first:last])
    return inverses.view(b, f, f), failed
