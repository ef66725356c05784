"""Diagonal plus low-rank matrices, diag(Υ) + W Wᵀ, batched: what a filter believes and what a block holds.

In float64, since Gram matrices hold the squares of what they are made of.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gram(left: Tensor, right: Tensor) -> Tensor:
    """The small matrix Aᵀ B, ``[..., f, a]``, ``[..., f, b]`` -> ``[..., a, b]``."""
    return left.mT.double() @ right.double()


def root_of_one_plus(matrix: Tensor) -> Tensor:
    """The Cholesky factor of I + a positive semidefinite matrix; NaN where that is not finite."""
    matrix = matrix.clone()
    matrix.diagonal(dim1=-2, dim2=-1).add_(1.0)
    lower, _ = torch.linalg.cholesky_ex(matrix)
    # The factor of an infinite matrix may be finite to its solves, and what they give zero.
    return torch.where(matrix.isfinite().all((-2, -1), keepdim=True), lower, torch.nan)


def whitened(diagonal: Tensor, basis: Tensor) -> Tensor:
    """T ``[..., L, f]`` with (diag(Υ) + W Wᵀ)⁻¹ = Υ⁻¹ - Tᵀ T.

    Args:
        diagonal: Υ, positive, ``[..., f]``, or ``[..., 1]`` for one number.
        basis: W, ``[..., f, L]``.
    """
    scaled = basis / diagonal.unsqueeze(-1)
    root = root_of_one_plus(gram(basis, scaled))
    return torch.linalg.solve_triangular(root, scaled.mT.double(), upper=False).to(scaled.dtype)


def truncated(wide: Tensor, memory: int) -> tuple[Tensor, Tensor]:
    """The best W of ``memory`` columns for wide Wideᵀ, and the diagonal of what is left out.

    With Wideᵀ Wide = V S² Vᵀ, the columns of Wide V are left singular vectors times S: the largest stay.

    Args:
        wide: ``[..., f, k]``, finite.
        memory: L.

    Returns:
        W ``[..., f, L]``, largest column first, zero beyond k; and ``[..., f]``.
    """
    values, vectors = torch.linalg.eigh(gram(wide, wide))
    # What is rounding of the largest is no column: it would come back ever smaller, and eigh fails on subnormals.
    kept = values > values.shape[-1] * torch.finfo(values.dtype).eps * values.amax(-1, keepdim=True)
    kept[..., : max(0, values.shape[-1] - memory)] = False
    columns = wide.double() @ vectors
    rest = torch.where(kept[..., None, :], 0.0, columns).square().sum(-1)
    basis = torch.where(kept[..., None, :], columns, 0.0).flip(-1)[..., :memory]
    basis = torch.nn.functional.pad(basis, (0, memory - basis.shape[-1]))
    return basis.to(wide.dtype).contiguous(), rest.to(wide.dtype)
