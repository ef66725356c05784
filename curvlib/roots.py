"""Batched roots: all that are due, in one solve for every size, and what becomes of those that fail.

A solve never harms: a matrix whose root fails after every retry keeps its previous root, on the device, and is counted. How
roots are computed is :mod:`curvlib.solvers`.

The retry ladder: what is decomposed is symmetrised (Cholesky reads one triangle only); what fails is solved once more in
float64, then in float64 with 1e-6 of its mean eigenvalue added. On an accelerator only a solver that waits for the device
anyway retries; failures of the others keep the previous root at once. Where memory runs out, the previous roots of that batch
stay, and are counted.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import solvers
from .calibration import calibration
from .interrupts import unbroken
from .precision import copy_flushed_
from .solvers import How, Solution, identity, image, suited, symmetric

_JITTER = 1e-6
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
    previous = _join([job.root for job in jobs]).to(how.dtype) if solvers.SOLVERS[how.solver].warm else None
    try:
        if any(isinstance(job.scale, Tensor) or job.scale != 1.0 for job in jobs):
            scales = _join([rows(job.scale, job) for job in jobs])[:, None, None]
            factor = factor * scales if len(jobs) == 1 else factor.mul_(scales)  # what was joined is our own
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
    solver = solvers.SOLVERS[how.solver]

    def attempt(matrix: Tensor, damping: Tensor, rows: Tensor | None = None) -> Solution:
        if not solver.warm:
            return _judged(solver.solve(matrix, damping, how))
        start = identity(matrix).expand_as(matrix) if previous is None else previous if rows is None else previous[rows]
        return _judged(solver.solve(matrix, damping, how, start.to(matrix.dtype)))

    root, residual = attempt(matrix, damping)
    if matrix.device.type != "cpu" and not solver.waits:
        return root, residual
    for jitter in (0.0, _JITTER):
        bad = (residual > how.tolerance).nonzero().flatten()
        if not bad.numel():
            break
        again = symmetric(matrix[bad].double())
        again.diagonal(dim1=-2, dim2=-1).add_(jitter * _mean_eigenvalue(again)[:, None])
        retried, error = attempt(again, damping[bad].double(), bad)
        root[bad], residual[bad] = retried.to(root.dtype), error.to(residual.dtype)
    return root, residual


def _mean_eigenvalue(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1).mean(-1)


def _judged(solution: Solution) -> Solution:
    """Make every failure an infinite residual; an entry that is not finite shows in the root's image of the probe."""
    root, residual = solution
    finite = image(root).isfinite().all(1) & residual.isfinite()
    return root, torch.where(finite, residual, torch.inf)
