"""Gram matrices, averaged into what is stored."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

_PANEL = 128  # columns of a large Gram matrix that are computed at once on a CPU


def add_grams(total: Tensor, rows: Tensor, gain: float, keep: float = 1.0) -> None:
    """T <- keep T + gain RᵀR for every matrix of a batch; or its diagonal.

    Args:
        total: T, ``[B, f, f]``, or ``[B, f]`` for diagonals; zero of it is kept even where it is not finite.
        rows: R, ``[B, rows, f]``.
        gain: a number.
        keep: a number.
    """
    if total.ndim == 2:
        (total.mul_(keep) if keep else total.zero_()).add_(rows.square().sum(1), alpha=gain)
    elif total.shape[0] == 1:
        add_gram(total[0], rows[0], gain, keep)
    else:
        for first, last in _panels(total):
            across = rows[..., first:last].mT
            total[:, first:last, first:].baddbmm_(across, rows[..., first:], beta=keep, alpha=gain)
            if last < total.shape[-1]:
                total[:, last:, first:last].copy_(total[:, first:last, last:].mT)


def add_gram(total: Tensor, rows: Tensor, gain: float, keep: float = 1.0) -> None:
    """The same of one matrix, ``[f, f]`` and ``[rows, f]``."""
    for first, last in _panels(total):
        total[first:last, first:].addmm_(rows[:, first:last].mT, rows[:, first:], beta=keep, alpha=gain)
        if last < total.shape[-1]:
            total[last:, first:last].copy_(total[first:last, last:].mT)


def _panels(total: Tensor) -> Iterator[tuple[int, int]]:
    """Runs of rows: on a CPU, what lies below the diagonal of large matrices is copied, not computed."""
    size, least = total.shape[-1], 2 * _PANEL if total.ndim == 2 else 4 * _PANEL
    step = _PANEL if size >= least and total.device.type == "cpu" else max(1, size)
    for first in range(0, size, step):
        yield first, min(size, first + step)
