"""Batched roots: from factors, damping and an exponent to (F + λI)^-p, with a residual for every matrix.

A solve never harms: a matrix whose root fails after every retry keeps its previous root, on the device, and is counted.

* ``"cholesky"`` for p = 1: (F + λI)^-1. Its residual is ‖(F + λI) X v - v‖ / ‖v‖ for a fixed probe v.
* ``"eigh"`` for any p: Q (Λ + λ)^-p Qᵀ, or Q (Λ^p + ε)^-1 Qᵀ for a damping outside the root; eigenvalues that rounding
  made negative count as zero. Its residual is ‖F v - Q Λ Qᵀ v‖ / (‖F‖ ‖v‖). Also Q and Λ themselves, for structures that
  damp the eigenvalues of a product.
* ``"qr"`` for eigenvectors only: one orthogonal iteration from the last ones, Q <- qr(F Q), with the columns of Q in the
  descending order of diag(QᵀFQ); ``"eigh"`` at the start and for those whose residual is above the tolerance. Its residual
  is what is left off the diagonal, ‖QᵀFQ - Λ‖ / ‖F‖, to the square root of the precision; a tolerance of 1 is never exceeded.
* ``"newton"`` for p = 1/2, 1/4, 1/8, by products alone, see :mod:`curvlib.newton`.
* Others by :func:`register_solver`, as these are.

The retry ladder: what is decomposed is symmetrised (Cholesky reads one triangle only); what fails is solved once more in
float64, then in float64 with 1e-6 of its mean eigenvalue added. On an accelerator only a solver that waits for the device
anyway retries; failures of the others keep the previous root at once. Where memory runs out, the previous roots of that batch
stay, and are counted. Batched LU is never used: it is unreliable on CPU (pytorch#141358, #142815).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import planes
from .calibration import calibration
from .interrupts import unbroken
from .inverses import inverse
from .precision import copy_flushed_
from .threads import shared

SILENT = 1e-30
"""A factor whose relative damping is no larger has no signal yet; its inverse would leave the range of float32."""

_JITTER = 1e-6
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
    auto: bool = False

    @property
    def plain(self) -> bool:
        """Whether (F + λI)^-p is wanted, with λ known beforehand."""
        return not (self.outside or self.largest or self.basis)


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
        damping = " with the damping outside of it" if how.outside else ""
        damping = " with a damping relative to its largest eigenvalue" if how.largest else damping
        raise ValueError(
            f"solver={how.solver!r} does not compute {wanted}{damping}; "
            f"use solver='auto' or one of {', '.join(map(repr, able))}"
        )
    return how


Moved = Callable[[int, Tensor, Tensor], None]


@dataclass
class RootJob:
    """A batch of factors whose roots are due; ``root``, ``residual`` and ``kept`` are written in place.

    Attributes:
        factor: ``[N, f, f]``, symmetric up to rounding, finite.
        scale: the factor is multiplied by it first: a number, or ``[N]``.
        damping: λ, after the scale: a number, or ``[N]``.
        how: the solver and its options.
        root: ``[N, f, f]``, the previous roots.
        residual: ``[N]``, of the last solve.
        kept: ``[N]``, int64, how often the previous root was kept.
        values: ``[N, f]``, of a basis: the eigenvalues, whose eigenvectors are the columns of ``root``.
        moved: told (first row, old roots, new roots) before new ones replace the old, for what lives in a basis.
        first: where row 0 stands among the rows of the whole job.
    """

    factor: Tensor
    scale: Tensor | float
    damping: Tensor | float
    how: How
    root: Tensor
    residual: Tensor
    kept: Tensor
    values: Tensor | None = None
    moved: Moved | None = None
    first: int = 0

    def rows(self, first: int, last: int) -> RootJob:
        """The same job for some of its rows."""

        def part(value: Tensor | float | None) -> Any:
            return value[first:last] if isinstance(value, Tensor) else value

        tensors = (self.factor, self.scale, self.damping), (self.root, self.residual, self.kept)
        (factor, scale, damping), (root, residual, kept) = (tuple(map(part, some)) for some in tensors)
        values, start = part(self.values), self.first + first
        return RootJob(factor, scale, damping, self.how, root, residual, kept, values, self.moved, start)


def refresh(jobs: Iterable[RootJob]) -> None:
    """Solve all jobs, in one batch for all factors of a size, device and way of solving."""
    batches: dict[tuple[int, torch.device, How], list[RootJob]] = defaultdict(list)
    for job in jobs:
        size = job.factor.shape[-1]
        step = max(1, _workspace(job.factor.device) // (size * size))
        for first in range(0, job.factor.shape[0], step):
            part = job.rows(first, first + step)
            batches[size, part.factor.device, suited(part.how, size, part.factor.device)].append(part)
    for (size, _, how), parts in batches.items():
        for chunk in _chunks(parts, size):
            _refresh_chunk(chunk, how)


def _workspace(device: torch.device) -> int:
    """Entries of one chunk of a batched solve; on a CPU they stay in its caches."""
    return calibration(device).chunk


def suited(how: How, size: int, device: torch.device) -> How:
    """``how`` with the solver that is the fastest for a size, where the choice was left open."""
    least = calibration(device).newton_rows
    if how.auto and least is not None and size >= least and SOLVERS["newton"].takes(how):
        return replace(how, solver="newton")
    return how


def _chunks(jobs: list[RootJob], size: int) -> Iterable[list[RootJob]]:
    chunk: list[RootJob] = []
    filled = 0
    for job in jobs:
        entries = job.factor.shape[0] * size * size
        if chunk and filled + entries > _workspace(job.factor.device):
            yield chunk
            chunk, filled = [], 0
        chunk.append(job)
        filled += entries
    yield chunk


def _refresh_chunk(jobs: list[RootJob], how: How) -> None:
    def rows(value: Tensor | float, job: RootJob) -> Tensor:
        return torch.as_tensor(value, dtype=how.dtype, device=job.factor.device).expand(job.factor.shape[0])

    factor = _join([job.factor for job in jobs]).to(how.dtype)
    damping = _join([rows(job.damping, job) for job in jobs])
    previous = _join([job.root for job in jobs]).to(how.dtype) if SOLVERS[how.solver].warm else None
    try:
        if any(isinstance(job.scale, Tensor) or job.scale != 1.0 for job in jobs):
            factor = factor * _join([rows(job.scale, job) for job in jobs])[:, None, None]
        root, residual = solve(factor, damping, how, previous)
    except RuntimeError as error:  # without memory old roots stay, and are counted
        if not (isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)):
            raise
        for job in jobs:
            job.kept.add_(1)
            job.residual.fill_(torch.inf)
        return
    good = residual <= how.tolerance
    first = 0
    for job in jobs:
        mine = slice(first, first := first + job.factor.shape[0])
        with unbroken:
            _put(job, root[mine], residual[mine], good[mine])


def _put(job: RootJob, root: Tensor, residual: Tensor, good: Tensor) -> None:
    """Put the roots that are good in, and what lives in a basis with them."""
    solved, keep = root.to(job.root.dtype), ~good
    if job.root.device.type != "cpu" or keep.any():
        old = job.root if job.values is None else torch.cat([job.root, job.values[:, None]], 1)
        solved = torch.where(keep[:, None, None], old, solved)
    if job.values is not None:
        job.values.copy_(solved[:, -1])
        solved = solved[:, :-1]
    if job.moved is not None:
        job.moved(job.first, job.root, solved)
    copy_flushed_(job.root, solved)
    job.residual.copy_(residual)
    job.kept.add_(keep)


def _join(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def solve(matrix: Tensor, damping: Tensor, how: How, previous: Tensor | None = None) -> Solution:
    """Roots and residuals of a batch, with the retry ladder.

    Args:
        matrix: ``[N, f, f]``, symmetric up to rounding.
        damping: ``[N]``.
        how: the solver and its options.
        previous: ``[N, f, f]``, what a solver that starts warm starts from; none is the identity.

    Returns:
        Roots ``[N, f, f]`` (of a basis ``[N, f + 1, f]``, the eigenvalues as last row) and residuals ``[N]``; a root that
        failed has an infinite residual.
    """
    solver = SOLVERS[how.solver]

    def attempt(matrix: Tensor, damping: Tensor, rows: Tensor | None = None) -> Solution:
        if not solver.warm:
            return _judged(solver.solve(matrix, damping, how))
        start = (
            _identity(matrix).expand_as(matrix) if previous is None else previous if rows is None else previous[rows]
        )
        return _judged(solver.solve(matrix, damping, how, start.to(matrix.dtype)))

    root, residual = attempt(matrix, damping)
    if matrix.device.type != "cpu" and not solver.waits:
        return root, residual
    for jitter in (0.0, _JITTER):
        bad = (residual > how.tolerance).nonzero().flatten()
        if not bad.numel():
            break
        again = _symmetric(matrix[bad].double())
        again.diagonal(dim1=-2, dim2=-1).add_(jitter * _mean_eigenvalue(again)[:, None])
        retried, error = attempt(again, damping[bad].double(), bad)
        root[bad], residual[bad] = retried.to(root.dtype), error.to(residual.dtype)
    return root, residual


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.mT) / 2


def _mean_eigenvalue(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1).mean(-1)


def _probe(matrix: Tensor) -> Tensor:
    """A fixed vector of ±1, ``[f]``; a factor may well be orthogonal to it, so nothing is divided by its image."""
    number = torch.arange(matrix.shape[-1], device=matrix.device)
    return torch.where((number * 2654435761) % 4294967296 < 2147483648, 1.0, -1.0).to(matrix.dtype)


def _judged(solution: Solution) -> Solution:
    """Make every failure an infinite residual; an entry that is not finite shows in the root's image of the probe."""
    root, residual = solution
    finite = _image(root).isfinite().all(1) & residual.isfinite()
    return root, torch.where(finite, residual, torch.inf)


def damped(matrix: Tensor, damping: Tensor, how: How) -> Tensor:
    """F + λI, ``[N, f, f]``, for a plain ``how``; the identity where a factor has no signal yet (see :class:`How`)."""
    shifted = matrix.clone()
    shifted.diagonal(dim1=-2, dim2=-1).add_(damping[:, None])
    if how.floor is None or (matrix.device.type == "cpu" and bool((damping > SILENT).all())):
        return shifted
    return torch.where(damping[:, None, None] > SILENT, shifted, _identity(matrix))


def _identity(matrix: Tensor) -> Tensor:
    return torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)


def _cholesky(matrix: Tensor, damping: Tensor, how: How) -> Solution:
    shifted = damped(matrix, damping, how)
    root, failed = inverse(shifted)
    return root, torch.where(failed, torch.inf, _residual(shifted, root))


def _residual(shifted: Tensor, root: Tensor) -> Tensor:
    """‖(F + λI) X v - v‖ / ‖v‖, ``[N]``."""
    probe = _probe(root)
    return (_times(shifted, _image(root)) - probe).norm(dim=1) / probe.norm()


def _times(matrix: Tensor, vectors: Tensor) -> Tensor:
    """A vector for every matrix, ``[N, f]``."""
    return planes.times(matrix, vectors) if planes.laid(matrix) else (matrix @ vectors[:, :, None])[:, :, 0]


def _image(root: Tensor) -> Tensor:
    """The probe's image under every root, ``[N, rows]``."""
    return (root.flatten(0, 1) @ _probe(root)).view(root.shape[:2])


def _eigh(matrix: Tensor, damping: Tensor, how: How) -> Solution:
    matrix = _symmetric(matrix)
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
        root = (vectors * powered[:, None, :]) @ vectors.mT
    probe = _probe(matrix)[:, None]
    error = (matrix @ probe - vectors @ (values[:, :, None] * (vectors.mT @ probe))).norm(dim=(-2, -1))
    norm = values.abs().amax(-1) * probe.norm()
    return root, torch.where(norm > 0, error / norm, error)


def _eigendecomposition(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and vectors; NaN for a matrix on which the solver does not converge."""
    try:
        values, vectors = shared(torch.linalg.eigh, matrix)
    except torch.linalg.LinAlgError:
        if matrix.shape[0] == 1:
            return torch.full_like(matrix[:, 0], torch.nan), torch.full_like(matrix, torch.nan)
        parts = [_eigendecomposition(one) for one in matrix.split(1)]
        return torch.cat([values for values, _ in parts]), torch.cat([vectors for _, vectors in parts])
    return values, vectors


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
    fresh = (previous == _identity(matrix)).flatten(1).all(1)
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


register_solver("cholesky", _cholesky, takes=lambda how: how.plain and how.power == 1)
register_solver("eigh", _eigh, takes=lambda how: True, waits=True)
register_solver("qr", _qr, takes=lambda how: how.basis, waits=True, warm=True)
