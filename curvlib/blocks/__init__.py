"""Block structures, and the named partitions of the literature."""

from __future__ import annotations

from ..layout import Layout
from ..recipe import Recipe
from .base import Block, Means, Spec, State, Sums
from .diagonal import DiagonalBlock
from .eigen import EigenBlock
from .eigenbasis import EigenbasisBlock, LikelihoodBlock, RunningEigenbasisBlock
from .low_rank import LowRankBlock
from .named import BLOCKED_KRONECKER, DIAGONAL, FULL_LAYER, KERNELS, KRONECKER, MODES, PER_INPUT, PER_OUTPUT
from .quasi_newton import AdditiveQuasiNewtonBlock, QuasiNewtonBlock
from .rank_one import RankOneBlock
from .standard import StandardBlock
from .tracked import InverseFreeBlock, WhiteningBlock
from .window import WindowBlock

__all__ = [
    "BLOCKED_KRONECKER",
    "DIAGONAL",
    "FULL_LAYER",
    "KERNELS",
    "KRONECKER",
    "MODES",
    "PER_INPUT",
    "PER_OUTPUT",
    "AdditiveQuasiNewtonBlock",
    "Block",
    "DiagonalBlock",
    "EigenBlock",
    "EigenbasisBlock",
    "InverseFreeBlock",
    "LikelihoodBlock",
    "LowRankBlock",
    "Means",
    "QuasiNewtonBlock",
    "RankOneBlock",
    "RunningEigenbasisBlock",
    "Spec",
    "StandardBlock",
    "State",
    "Sums",
    "WhiteningBlock",
    "WindowBlock",
    "block_for",
]


def block_for(layout: Layout, recipe: Recipe, joined: bool = False) -> Block | None:
    """The structure that a recipe means for an operand; ``None`` where the exponent is 0 and nothing is needed.

    Joined operands are always packed, since their parameters do not lie together.
    """
    if recipe.root.exponent == 0:
        return None
    if recipe.block is not None:
        if not issubclass(recipe.block, Block):
            raise TypeError(f"block must be a subclass of curvlib.blocks.Block, got {recipe.block!r}")
        return recipe.block(layout, recipe)
    if recipe.moment.window is not None:
        return WindowBlock(layout, recipe)
    return (DiagonalBlock if layout.elementwise and not joined else StandardBlock)(layout, recipe)
