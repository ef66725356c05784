"""Inverse roots by products of matrices alone: coupled Newton-Schulz iterations with minimax coefficients.

For a damped factor A with eigenvalues in [a, b] (a: the damping; b: the least of two norms), and p = 1/2::

    Y_0 = A / b,  Z_0 = I;        T = c_1 I + c_3 Z Y,  Y <- Y T,  Z <- T Z          Y -> (A/b)^½,  Z -> (A/b)^-½

Each step maps x = (eigenvalues of Z Y)^½ by the odd cubic that is nearest to 1 on the interval [l, u] where they lie, and
which is known in closed form; from [1 - ε, 1 + ε], where it leaves them, the next one is computed (CANS, Grishina et al.
2025; Chen & Chow 2014)::

    e² = (l² + l u + u²) / 3,   c_1 = 2 / (⅔ e + l u (l + u) / (3 e²)),   c_3 = -c_1 / (3 e²),   ε = ⅔ c_1 e - 1

which ends as Newton and Schulz's c_1 = 3/2, c_3 = -1/2. Coefficients are of each matrix, on its device, and the number of
steps depends on the dtype alone, so that nothing waits. p = 1/4, 1/8, … are roots of Y. The iteration loses c·κ·u, eigh in
float32 as many digits or more; it is worth its 20 to 40 products where these are fast and eigendecompositions slow (GPUs).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .solvers import SILENT, How, Solution, damped, register_solver

_POWER_STEPS = 32


def steps_for(condition: float) -> int:
    """After how many steps every eigenvalue of a matrix of some condition number is 1 to the precision of float64."""
    low, high, count = condition**-0.5, 1.0, 0
    while high - low > 1e-15 and count < 100:
        square = (low * low + low * high + high * high) / 3
        first = 2 / (2 / 3 * math.sqrt(square) + low * high * (low + high) / (3 * square))
        left = 2 / 3 * first * math.sqrt(square) - 1
        low, high, count = 1 - left, 1 + left, count + 1
    return count


def inverse_root(matrix: Tensor, least: Tensor, halvings: int, steps: int | None = None) -> Tensor:
    """A^(-1/2^h) of a batch.

    Args:
        matrix: A, ``[N, f, f]``, symmetric, positive definite.
        least: a lower bound of its eigenvalues, ``[N]``.
        halvings: h, from 1.
        steps: of each of the h iterations; by default enough for condition numbers up to the inverse of the precision.
    """
    steps = steps_for(1 / torch.finfo(matrix.dtype).eps) if steps is None else steps
    # Both norms bound the largest eigenvalue; rounding must not leave one above it.
    bound = torch.minimum(matrix.abs().sum(-1).amax(-1), torch.linalg.matrix_norm(matrix)) * (1 + 1e-3)
    bound = bound.clamp_min(torch.finfo(matrix.dtype).tiny)
    y, low = matrix / bound[:, None, None], (least / bound).clamp(torch.finfo(matrix.dtype).eps, 1.0).sqrt()
    for half in range(halvings):
        y, z = _coupled(y, low, steps, half < halvings - 1)
        low = low.sqrt()  # the next root is of (A/b)^½, whose smallest eigenvalue is that of A/b's root
    root = z * bound[:, None, None] ** -(0.5**halvings)
    return (root + root.mT) / 2


def _coupled(matrix: Tensor, low: Tensor, steps: int, wants_root: bool) -> tuple[Tensor, Tensor]:
    """(A^½, A^-½) of matrices with eigenvalues in [low², 1]; the first is left out where nobody wants it."""
    high, y, z = torch.ones_like(low), matrix, matrix
    for step in range(steps):
        square = (low * low + low * high + high * high) / 3
        first = 2 / (2 / 3 * square.sqrt() + low * high * (low + high) / (3 * square))
        third = -first / (3 * square)
        turn = (y if step == 0 else z @ y) * third[:, None, None]
        turn.diagonal(dim1=1, dim2=2).add_(first[:, None])
        z = turn if step == 0 else turn @ z
        if wants_root or step < steps - 1:
            y = y @ turn
        left = 2 / 3 * first * square.sqrt() - 1
        low, high = 1 - left, 1 + left
    return y, z


def largest_eigenvalue(matrix: Tensor) -> Tensor:
    """The largest eigenvalue of positive semidefinite matrices from below, ``[N]``: a Rayleigh quotient after 32 products.

    It is too small by a few per cent at most where eigenvalues crowd at the top, and by rounding where they do not.
    """
    n, f, _ = matrix.shape
    place = torch.arange(f, device=matrix.device)
    vector = torch.where((place * 2654435761) % 4294967296 < 2147483648, 1.0, -1.0).to(matrix.dtype).expand(n, f)
    vector = (
        vector[:, :, None] + matrix.diagonal(dim1=1, dim2=2)[:, :, None].sign()
    )  # not orthogonal to what is positive
    tiny = torch.finfo(matrix.dtype).tiny
    for _ in range(_POWER_STEPS):
        vector = vector / torch.linalg.vector_norm(vector, dim=1, keepdim=True).clamp_min(tiny)
        vector = matrix @ vector
    image = matrix @ vector
    return ((vector * image).sum((1, 2)) / vector.square().sum((1, 2)).clamp_min(tiny)).clamp_min(0)


def _newton(matrix: Tensor, damping: Tensor, how: How) -> Solution:
    matrix = (matrix + matrix.mT) / 2
    if how.largest:
        damping = (damping * largest_eigenvalue(matrix)).clamp_min(how.floor or 0.0)
    shifted = damped(matrix, damping, how)
    least = damping if how.floor is None else torch.where(damping > SILENT, damping, 1.0)
    halvings = round(-math.log2(how.power))
    root = inverse_root(shifted, least, halvings)
    probe = torch.ones_like(matrix[:, :, :1])
    image = probe
    for _ in range(2**halvings):
        image = root @ image
    return root, (shifted @ image - probe).norm(dim=(1, 2)) / probe.norm(dim=(1, 2))


register_solver("newton", _newton, takes=lambda how: not (how.outside or how.basis) and how.power in (0.5, 0.25, 0.125))
