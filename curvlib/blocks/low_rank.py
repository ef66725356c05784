"""The low-rank block: the leading directions of a second moment, and the diagonal of the rest."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor

from .. import moments
from ..layout import Layout
from ..low_rank import truncated, whitened
from ..moments import Weight
from ..precision import flush_subnormals_
from ..recipe import Recipe
from ..roots import RootJob, solve
from ..solvers import SILENT, How
from .base import Block, Spec, State
from .standard import put_in_place


class LowRankBlock(Block):
    """Every mini-block is F = diag(Υ) + W Wᵀ with L columns in W, the precision that LO-FI keeps (Chang et al. 2023).

    With G the gradients that a block averages (one, or those of its ties), a new one is taken in exactly and then cut back::

        W̃ = [√β W, √(1 - β) G],    W̃ᵀ W̃ = V S² Vᵀ:   W <- the L largest columns of W̃ V,
        Υ <- β Υ + the squares of the others, row by row              so that diag(F) is that of the average

    and (F + λI)^-1 v by Woodbury's identity, from what a refresh solves for. A block of f entries takes 2 f (L + 1) numbers
    instead of 2 f². ``Moment(window=L)`` sets L. What filters do with the same matrix is :mod:`curvlib.filtering`.

    State of a region: ``diagonal_…``, ``basis_…`` (W), and as of the last refresh ``inverse_…``, (Υ + λ)^-1, and ``white_…``,
    the T with (F + λI)^-1 = (Υ + λ)^-1 - TᵀT, and ``kept_…``.
    """

    rowwise: ClassVar[bool] = True
    uses: ClassVar[frozenset[str]] = frozenset({"window"})

    def __init__(self, layout: Layout, recipe: Recipe) -> None:
        super().__init__(layout, recipe)
        moment, damping = recipe.moment, recipe.damping
        if moment.window is None:
            raise ValueError("LowRankBlock needs Moment(window=L), the number of columns, got window=None")
        if moment.listens:
            raise ValueError(
                f"LowRankBlock takes in batch gradients, of='gradient' or 'momentum', got of={moment.of!r}"
            )
        if any(len(region.factors) != 1 or region.factors[0].diagonal for region in layout.regions):
            raise ValueError(
                f"LowRankBlock needs one dense factor, such as 'o | i'; got partition {str(recipe.partition)!r}"
            )
        if recipe.root.exponent != 1 or damping.outside or damping.relative_to == "largest" or damping.split:
            raise ValueError(
                "LowRankBlock inverts, exponent 1, with a damping that is absolute or relative to 'trace' or 'layer'; "
                f"got exponent={float(recipe.root.exponent):g}, {damping}"
            )
        self._memory = moment.window

    def spec(self) -> dict[str, Spec]:
        """See the class; ``[blocks, f]``, ``[blocks, f, L]``, ``[blocks, L, f]``."""
        specs: dict[str, Spec] = {}
        for index, region in enumerate(self.layout.regions):
            blocks, f = region.blocks, region.factors[0].size
            specs[f"diagonal_{index}"] = Spec((blocks, f))
            specs[f"basis_{index}"] = Spec((blocks, f, self._memory))
            specs[f"inverse_{index}"] = Spec((blocks, f), "roots", fill=1.0)
            specs[f"white_{index}"] = Spec((blocks, self._memory, f), "roots")
            specs[f"kept_{index}"] = Spec((blocks,), "diagnostics", dtype=torch.int64)
        return specs

    def update(self, state: State, operand: Tensor, keep: Weight, gain: Weight) -> None:
        """Take the gradients in, and cut back to L columns."""
        wanted = torch.as_tensor(gain, device=operand.device) > 0  # a masked step turns no basis
        root, share = (torch.as_tensor(one, dtype=operand.dtype, device=operand.device).sqrt() for one in (keep, gain))
        for (index, region), block in zip(enumerate(self.layout.regions), self.layout.block(operand), strict=True):
            diagonal, basis = (state[f"{what}_{index}"].flatten(0, 1) for what in ("diagonal", "basis"))
            wide = torch.cat([root * basis, share / region.ties**0.5 * block.mT], 2)  # own f (L ties)
            columns, rest = truncated(wide, self._memory)
            diagonal.copy_(torch.where(wanted, diagonal * keep + rest, diagonal))
            basis.copy_(torch.where(wanted, columns, basis))
            flush_subnormals_(diagonal)
            flush_subnormals_(basis)

    def roots(self, state: State, recipe: Recipe, scale: float) -> Iterable[RootJob]:
        """Solve by itself, with a Gram matrix of size L for every block; nothing is left for the engine."""
        for index, region in enumerate(self.layout.regions):
            diagonal, basis = (state[f"{what}_{index}"].flatten(0, 1) * scale for what in ("diagonal", "basis"))
            basis = basis * scale**-0.5
            damping = self._damping(diagonal, basis, recipe, region.blocks)
            silent = (damping <= SILENT) & (recipe.damping.relative_to is not None)
            shifted = torch.where(silent, 1.0, diagonal + damping)
            white = whitened(shifted, torch.where(silent[:, :, None], 0.0, basis))
            inverse, held = (state[f"{what}_{index}"].flatten(0, 1) for what in ("inverse", "white"))
            sound = white.flatten(1).isfinite().all(1) & (shifted > 0).all(1)
            inverse.copy_(torch.where(sound[:, None], shifted.reciprocal(), inverse))
            held.copy_(torch.where(sound[:, None, None], white, held))
            state[f"kept_{index}"].flatten().add_(~sound)
        return ()

    @staticmethod
    def _damping(diagonal: Tensor, basis: Tensor, recipe: Recipe, blocks: int) -> Tensor:
        """λ of every block, ``[n * blocks, 1]``."""
        own = diagonal + basis.square().sum(-1)  # the diagonal of F, which has its trace
        (damping,) = moments.dampings([own], [1.0], recipe.damping, [blocks])
        return torch.as_tensor(damping, dtype=own.dtype, device=own.device).expand(own.shape[0])[:, None]

    def apply(self, state: State, operand: Tensor, recipe: Recipe, exponent: float, scale: float) -> Tensor:
        """Two passes over the basis; another exponent than 1 and -1 by eigendecomposition of the blocks."""
        directions = []
        for (index, region), block in zip(enumerate(self.layout.regions), self.layout.block(operand), strict=True):
            if exponent == recipe.root.exponent:
                inverse, white = (state[f"{what}_{index}"].flatten(0, 1) for what in ("inverse", "white"))
                directions.append(torch.baddbmm(inverse[:, None] * block, block @ white.mT, white, alpha=-1))
                continue
            diagonal, basis = (state[f"{what}_{index}"].flatten(0, 1) for what in ("diagonal", "basis"))
            if exponent == -1:
                directions.append(scale * torch.baddbmm(diagonal[:, None] * block, block @ basis, basis.mT))
                continue
            damping = self._damping(scale * diagonal, scale**0.5 * basis, recipe, region.blocks)[:, 0]
            how = How(exponent, "eigh", block.dtype)
            dense = self._blocks(state, index, scale)
            directions.append(block @ solve(dense, damping if exponent > 0 else 0 * damping, how)[0])
        return self.layout.unblock(directions, operand)

    def _blocks(self, state: State, index: int, scale: float) -> Tensor:
        """F, ``[n * blocks, f, f]``."""
        diagonal, basis = (state[f"{what}_{index}"].flatten(0, 1) for what in ("diagonal", "basis"))
        return scale * (diagonal.diag_embed() + basis @ basis.mT)

    def dense(self, state: State, recipe: Recipe, scale: float) -> Tensor:
        """diag(Υ) + W Wᵀ, put in place."""
        blocks = [self._blocks(state, index, scale) for index in range(len(self.layout.regions))]
        return put_in_place(self.layout, blocks, next(iter(state.values())))
