"""The partition language: which entries of the curvature matrix are kept?

Axes left of the bar say *which block*; axes right of it say *what is inside the block*; a comma between factors means
*Kronecker product*::

    "... |"             every entry is its own block            Adam, AdaGrad, RMSprop
    "o i | k..."        one block per kernel                    MBF on convolutions
    "~i | o"            one block per input, tied: averaged     MBF on linear layers
    "| o, i k..."       one Kronecker product per layer         KFAC
    "| ,.../1024"       a factor for every axis, cut            blocked Shampoo

A curvature is always a batch of Kronecker products: own axes × (factor ⊗ factor ⊗ …). `docs/partitions.md` teaches the
language; `grammar.py` holds its grammar and `layout.py` what becomes of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from .grammar import PartitionError, Sentence, parse
from .layout import Layout, compile_layout

__all__ = ["Partition", "PartitionError"]


@dataclass(frozen=True)
class Partition:
    """A partition of the curvature matrix, from its text.

    Two partitions are equal when they say the same thing: spaces, and brackets that merge without a cut, do not matter.

    Args:
        text: the partition in the language above.

    Raises:
        PartitionError: with the text and the place, when it is no partition.
    """

    text: str = field(compare=False)
    sentence: Sentence = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise TypeError(f"partition must be a text such as 'o | i', got {self.text!r}")
        object.__setattr__(self, "sentence", parse(self.text))

    def __str__(self) -> str:
        return str(self.sentence)

    def layout(
        self, sizes: Mapping[str, int], joined: Sequence[str] = (), sources: Sequence[Sequence[str]] = ()
    ) -> Layout:
        """Make the partition exact for axes of these sizes.

        Args:
            sizes: axis name -> entries, in the operand's row-major order, e.g. ``{"o": 64, "i": 32, "k1": 3, "k2": 3}``.
            joined: the input axes when a bias is joined to them as one more column.
            sources: the axes that each of a layer's signals carries: the output gradient's, the input's.

        Raises:
            PartitionError: an unknown axis, an axis not named, or joined axes that the partition separates.
        """
        for name, size in sizes.items():
            if not isinstance(size, int) or size < 0:
                raise PartitionError(f"axis {name!r} has size {size!r}; sizes are whole numbers from 0", self.text)
        return compile_layout(self.sentence, self.text, sizes, joined, sources)

    @property
    def diagonal(self) -> bool:
        """Whether no factor is dense, whatever the sizes."""
        return all(factor.diagonal for factor in self.sentence.factors)

    @property
    def ordered(self) -> bool:
        """Whether :meth:`refines` is defined: at most one factor, not a diagonal one, and nothing tied."""
        factors = self.sentence.factors
        tied = any(term.tied or (term.cut is not None and term.cut.tied) for term in self.sentence.terms())
        return not tied and len(factors) <= 1 and not any(factor.diagonal or factor.spread for factor in factors)

    def refines(self, other: Partition, sizes: Mapping[str, int] | None = None) -> bool:
        """Whether every block of this partition lies inside one block of ``other``.

        Args:
            other: the coarser candidate.
            sizes: decide for these sizes. Without them the answer is True only if it holds for all sizes, which
                a cut of another length than ``other``'s never does.

        Raises:
            PartitionError: for tied partitions and for several or diagonal factors, which have no such order.
        """
        for one in (self, other):
            if not one.ordered:
                raise PartitionError("only untied partitions with a single dense factor are ordered", one.text)
        if sizes is not None:
            mine, theirs = self.layout(sizes).labels(), other.layout(sizes).labels()
            blocks = torch.stack([mine, theirs], 1).unique(dim=0)[:, 0]
            return blocks.numel() == mine.unique().numel()
        return self._refines_always(other)

    def _refines_always(self, other: Partition) -> bool:
        named = {axis for one in (self, other) for term in one.sentence.terms() for axis in term.axes}
        axes = {axis for axis in named if not axis.endswith("...")}
        axes |= {f"{axis[:-3]}{number}" for axis in named if axis.endswith("...") for number in (1, 2) if axis != "..."}
        everywhere = [any("..." in term.axes for term in one.sentence.terms()) for one in (self, other)]
        axes |= {"o", "i", "k1", "k2"} if all(everywhere) else set()
        try:
            cuts, free = _structure(self, sorted(axes))
            other_cuts, other_free = _structure(other, sorted(axes))
        except PartitionError:
            return False
        return other_free <= free and all(cut in cuts or set(cut[0]) <= free for cut in other_cuts)


def _structure(partition: Partition, axes: Sequence[str]) -> tuple[set[tuple[tuple[str, ...], str]], set[str]]:
    """The cuts of a partition, and the axes that number its blocks, with ellipses expanded over ``axes``."""
    # Sizes of two keep every cut by 1 apart from no cut; only names and roles are read here.
    layout = partition.layout(dict.fromkeys(axes, 2))
    own = {axis.name for region in layout.regions for axis in region.own}
    if all(factor.diagonal for region in layout.regions for factor in region.factors):
        return set(), set(axes)
    terms = [term for factor in partition.sentence.factors for term in factor.terms if term.cut is not None]
    return {(term.axes, str(term.cut)) for term in terms}, own & set(axes)
