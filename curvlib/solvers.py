"""Solvers: ways to compute (F + λI)^-p for a batch of factors, with a residual for every matrix.

* ``"cholesky"`` for p = 1: (F + λI)^-1, or the factor L to solve with. Its residual is ‖(F + λI) X v - v‖ / ‖v‖ for a fixed
  probe v.
* ``"eigh"`` for any p: Q (Λ + λ)^-p Qᵀ, or Q (Λ^p + ε)^-1 Qᵀ for a damping outside the root; eigenvalues that rounding
  made negative count as zero. Its residual is ‖F v - Q Λ Qᵀ v‖ / (‖F‖ ‖v‖). Also Q and Λ themselves, for structures that
  damp the eigenvalues of a product.
* ``"qr"`` for eigenvectors only: one orthogonal iteration from the last ones, Q <- qr(F Q), with the columns of Q in the
  descending order of diag(QᵀFQ); ``"eigh"`` at the start and for those whose residual is above the tolerance. Its residual
  is what is left off the diagonal, ‖QᵀFQ - Λ‖ / ‖F‖, to the square root of the precision; a tolerance of 1 is never exceeded.
* ``"newton"`` for p = 1/2, 1/4, 1/8, by products alone, see :mod:`curvlib.newton`.
* Others by :func:`register_solver`, as these are.

What becomes of a solve that fails is :mod:`curvlib.roots`. Batched LU is never used: it is unreliable on CPU (pytorch#141358,
#142815).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import planes
from .calibration import calibration
from .grams import add_grams
from .inverses import inverse

SILENT = 1e-30
"""A factor whose relative damping is no larger has no signal yet; its inverse would leave the range of float32."""

Solution = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class How:
    """How a root is computed: everything that must agree for matrices to be solved in one batch.

    Attributes:
        power: the exponent p of this factor.
        solver: the name of a registered solver.
        dtype: dtype of the solve.
        outside: the damping is added to the denominator, outside the power.
        largest: the damping is a multiple of the largest eigenvalue, at least ``floor``.
        floor: where the damping is relative, its least value. A relative damping below :data:`SILENT` means that the
            factor has no signal yet: its root is the identity. ``None`` where the damping is absolute.
        tolerance: largest residual of a root that is used.
        basis: eigenvectors and eigenvalues are wanted instead of a root.
        estimates: of a basis: estimates of the eigenvalues are enough.
        triangular: L with F + λI = LLᵀ is wanted instead of a root, to be solved with once.
        auto: the solver may be another one, where that is faster, see :mod:`curvlib.calibration`.
    """

    power: float
    solver: str
    dtype: torch.dtype
    outside: bool = False
    largest: bool = False
    floor: float | None = None
    tolerance: float = 0.1
    basis: bool = False
    estimates: bool = False
    triangular: bool = False
    auto: bool = False

    @property
    def plain(self) -> bool:
        """Whether (F + λI)^-p is wanted, with λ known beforehand."""
        return not (self.outside or self.largest or self.basis or self.triangular)


Solve = Callable[..., Solution]


@dataclass(frozen=True)
class Solver:
    """A way to compute roots, see :func:`register_solver`."""

    solve: Solve
    takes: Callable[[How], bool]
    waits: bool
    warm: bool


SOLVERS: dict[str, Solver] = {}
"""All registered solvers, by name."""


def register_solver(
    name: str,
    solve: Solve,
    *,
    takes: Callable[[How], bool] = lambda how: how.plain,
    waits: bool = False,
    warm: bool = False,
) -> None:
    """Teach the library a way to compute roots, ``Root(solver=name)``.

    Retries, roots that are kept where a solve fails, and ``health()`` are the engine's work, the same for every solver.

    Args:
        name: a new name.
        solve: (matrix ``[N, f, f]``, damping ``[N]``, how) -> (roots ``[N, f, f]``, residuals ``[N]``), in the dtype of the
            matrix, which stays as it is. The matrix is scaled, symmetric up to rounding and not yet damped, see
            :func:`damped`. A residual above ``how.tolerance``, or one that is not finite, is a failure, and so is a root
            that is not finite. A basis has the eigenvalues as one more row, ``[N, f + 1, f]``.
        takes: which roots it can compute; by default (F + λI)^-p with any p.
        waits: whether it waits for the device anyway, so that it may retry there.
        warm: whether it starts from the last roots, given to it as a fourth argument ``[N, f, f]``.

    Raises:
        ValueError: for a name that there is already.
    """
    if name == "auto" or name in SOLVERS:
        raise ValueError(f"solver {name!r} exists; registered are {', '.join(map(repr, SOLVERS))}, and 'auto' chooses")
    SOLVERS[name] = Solver(solve, takes, waits, warm)


def chosen(how: How) -> How:
    """``how`` with a solver that takes it: the named one, or for ``"auto"`` the first that can (but see :func:`suited`).

    Powers of the curvature itself, which only diagnostics ask for, are always taken by the first that can.

    Raises:
        ValueError: where the named one can't, with those that can.
    """
    able = [name for name, solver in SOLVERS.items() if solver.takes(how)]
    if how.solver == "auto" or how.power < 0:
        return replace(how, solver=able[0], auto=how.power > 0)
    if how.solver not in able:
        wanted = "a basis" if how.basis else f"the power {-how.power:g} of a factor"
        wanted = "Cholesky's factor" if how.triangular else wanted
        damping = " with the damping outside of it" if how.outside else ""
        damping = " with a damping relative to its largest eigenvalue" if how.largest else damping
        raise ValueError(
            f"solver={how.solver!r} does not compute {wanted}{damping}; "
            f"use solver='auto' or one of {', '.join(map(repr, able))}"
        )
    return how


def suited(how: How, size: int, device: torch.device) -> How:
    """``how`` with the solver that is the fastest for a size, where the choice was left open."""
    least = calibration(device).newton_rows
    if how.auto and least is not None and size >= least and SOLVERS["newton"].takes(how):
        return replace(how, solver="newton")
    return how


def symmetric(matrix: Tensor) -> Tensor:
    """A without what rounding made of its symmetry."""
    return (matrix + matrix.mT) / 2


def _probe(matrix: Tensor) -> Tensor:
    """A fixed vector of ±1, ``[f]``; a factor may well be orthogonal to it, so nothing is divided by its image."""
    number = torch.arange(matrix.shape[-1], device=matrix.device)
    return torch.where((number * 2654435761) % 4294967296 < 2147483648, 1.0, -1.0).to(matrix.dtype)


def damped(matrix: Tensor, damping: Tensor, how: How) -> Tensor:
    """F + λI, ``[N, f, f]``, for a plain ``how``; the identity where a factor has no signal yet (see :class:`How`)."""
    shifted = matrix.clone()
    shifted.diagonal(dim1=-2, dim2=-1).add_(damping[:, None])
    if how.floor is None or (matrix.device.type == "cpu" and bool((damping > SILENT).all())):
        return shifted
    return torch.where(damping[:, None, None] > SILENT, shifted, identity(matrix))


def identity(matrix: Tensor) -> Tensor:
    """The identity of the size of a batch's matrices, ``[f, f]``."""
    return torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)


def _cholesky(matrix: Tensor, damping: Tensor, how: How) -> Solution:
    shifted = damped(matrix, damping, how)
    if how.triangular:
        root, info = torch.linalg.cholesky_ex(shifted)
        failed, solved = info != 0, torch.cholesky_solve(_probe(root)[:, None], root)[..., 0]
    else:
        root, failed = inverse(shifted)
        solved = image(root)
    return root, torch.where(failed, torch.inf, _residual(shifted, solved))


def _residual(shifted: Tensor, solved: Tensor) -> Tensor:
    """‖(F + λI) x - v‖ / ‖v‖ of the probe v, ``[N]``."""
    probe = _probe(shifted)
    return (_times(shifted, solved) - probe).norm(dim=1) / probe.norm()


def _times(matrix: Tensor, vectors: Tensor) -> Tensor:
    """A vector for every matrix, ``[N, f]``."""
    return planes.times(matrix, vectors) if planes.laid(matrix) else (matrix @ vectors[:, :, None])[:, :, 0]


def image(root: Tensor) -> Tensor:
    """The probe's image under every root, ``[N, rows]``."""
    return (root.flatten(0, 1) @ _probe(root)).view(root.shape[:2])


def _eigh(matrix: Tensor, damping: Tensor, how: How) -> Solution:
    matrix = symmetric(matrix)
    values, vectors = _eigendecomposition(matrix)
    positive = values.clamp_min(0)
    if how.basis:
        root = torch.cat([vectors, positive[:, None, :]], 1)
    else:
        if how.largest:
            damping = (damping * positive[:, -1]).clamp_min(how.floor or 0.0)
        powered = diagonal_root(positive, damping[:, None], how.power, how.outside)
        if how.floor is not None:
            powered = torch.where(damping[:, None] > SILENT, powered, 1.0)
        half = vectors * powered.sqrt()[:, None, :]
        root = torch.empty_like(half, memory_format=torch.contiguous_format)
        add_grams(root, half.mT, 1.0, keep=0.0)  # which does half of the products, where a matrix is large
    probe = _probe(matrix)[:, None]
    error = (matrix @ probe - vectors @ (values[:, :, None] * (vectors.mT @ probe))).norm(dim=(-2, -1))
    norm = values.abs().amax(-1) * probe.norm()
    return root, torch.where(norm > 0, error / norm, error)


def _eigendecomposition(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and vectors; NaN for a matrix on which the solver does not converge."""
    try:
        return torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:
        if matrix.shape[0] == 1:
            return torch.full_like(matrix[:, 0], torch.nan), torch.full_like(matrix, torch.nan)
        parts = [_eigendecomposition(one) for one in matrix.split(1)]
        return torch.cat([values for values, _ in parts]), torch.cat([vectors for _, vectors in parts])


def _qr(matrix: Tensor, damping: Tensor, how: How, previous: Tensor) -> Solution:
    rows = previous.mT @ matrix  # (F Q)ᵀ
    order = torch.linalg.vecdot(previous.mT, rows).argsort(-1, descending=True)  # it converges column by column
    basis, values = _orthonormal(rows.gather(1, order[:, :, None].expand_as(rows)).mT)
    if not (how.estimates and how.tolerance >= 1):  # else those of R = QᵀF Q_previous do, which tends to Λ
        values = torch.linalg.vecdot(matrix @ basis, basis, dim=-2)
    norm = matrix.norm(dim=(-2, -1)).clamp_min(torch.finfo(matrix.dtype).tiny)
    # An orthogonal Q keeps the norm, so that what is left off the diagonal of QᵀFQ is known without it.
    residual = (1 - (values / norm[:, None]).square().sum(-1)).clamp_min(0).sqrt()
    root = torch.cat([basis, values.clamp_min(0)[:, None, :]], 1)
    fresh = (previous == identity(matrix)).flatten(1).all(1)
    bad = (fresh | ~(residual <= how.tolerance)).nonzero().flatten()
    if bad.numel():
        root[bad], residual[bad] = _eigh(matrix[bad], damping[bad], how)
    return root, residual


_SKEW = 1e-2
"""A column whose share across the others is larger loses at most two digits of their orthogonality."""


def _orthonormal(columns: Tensor) -> tuple[Tensor, Tensor]:
    """Q and the diagonal of R, up to signs, of ``[N, f, f]`` = Q R.

    B R⁻¹ takes half the time of multiplying reflections, which is done where columns of B are almost dependent, and on
    devices that would have to be asked which these are.
    """
    reflections, lengths = torch.geqrf(columns)
    diagonal = reflections.diagonal(dim1=-2, dim2=-1).abs()
    skew = ~(diagonal > _SKEW * columns.norm(dim=-2)).all(-1)
    if columns.device.type != "cpu" or skew.all():
        return torch.linalg.householder_product(reflections, lengths), diagonal
    basis = torch.linalg.solve_triangular(reflections, columns, upper=True, left=False)
    if skew.any():
        rows = skew.nonzero().flatten()
        basis[rows] = torch.linalg.householder_product(reflections[rows], lengths[rows])
    return basis, diagonal


def diagonal_root(value: Tensor, damping: Tensor | float, power: float, outside: bool) -> Tensor:
    """The root of a diagonal: (v + λ)^-p, or (v^p + ε)^-1."""
    if outside:
        return 1 / (_power(value, power) + damping)
    return _power(value + damping, -power)


def _power(value: Tensor, power: float) -> Tensor:
    named: dict[float, Callable[[Tensor], Tensor]] = {
        0.5: torch.sqrt,
        -0.5: torch.rsqrt,
        -1.0: torch.reciprocal,
    }
    return named[power](value) if power in named else value**power


register_solver("cholesky", _cholesky, takes=lambda how: (how.plain or how.triangular) and how.power == 1)
register_solver("eigh", _eigh, takes=lambda how: not how.triangular, waits=True)
register_solver("qr", _qr, takes=lambda how: how.basis, waits=True, warm=True)
