"""Gram matrices, averaged into what is stored."""

from __future__ import annotations

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
        total.baddbmm_(rows.mT, rows, beta=keep, alpha=gain)


def add_gram(total: Tensor, rows: Tensor, gain: float, keep: float = 1.0) -> None:
    """The same of one matrix, on a CPU panel by panel: what lies below the diagonal is copied, not computed."""
    size = total.shape[0]
    if size < 2 * _PANEL or total.device.type != "cpu":
        total.addmm_(rows.mT, rows, beta=keep, alpha=gain)
        return
    for first in range(0, size, _PANEL):
        last = min(size, first + _PANEL)
        total[first:last, first:].addmm_(rows[:, first:last].mT, rows[:, first:], beta=keep, alpha=gain)
        total[last:, first:last].copy_(total[first:last, last:].mT)
