"""Families of structures, so that each has one name and one colour wherever it is drawn."""

from __future__ import annotations

from collections.abc import Sequence

from ..partition import Partition
from ..recipe import Recipe
from ..routing import Route

FAMILIES = (
    "diagonal",
    "kernels",
    "chunks",
    "tiles",
    "per output",
    "per input",
    "per head",
    "averaged",
    "Kronecker",
    "full layer",
    "own block",
)
"""In the order in which legends name them."""


def family(structure: Partition | Recipe | Route | Sequence[Route]) -> str:
    """The family of a structure; of a routing table, of its first route.

    ``"averaged"`` are tied blocks, ``"chunks"`` blocks cut along one axis or along merged ones, ``"tiles"`` along several,
    ``"per head"`` blocks numbered by an axis that is neither an output nor an input, ``"own block"`` block classes.
    """
    if isinstance(structure, (list, tuple)):
        structure = structure[0]
    if isinstance(structure, Route):
        structure = structure.recipe
    if isinstance(structure, Recipe):
        if structure.block is not None and structure.block.__module__.partition(".")[0] != "curvlib":
            return "own block"
        structure = structure.cut
    assert isinstance(structure, Partition)
    return _of(structure)


def _of(partition: Partition) -> str:
    terms = list(partition.sentence.terms())
    cuts = [term for term in terms if term.cut is not None]
    own = {axis for term in partition.sentence.own for axis in term.axes}
    if partition.diagonal:
        return "diagonal"
    if any(term.tied or (term.cut is not None and term.cut.tied) for term in terms):
        return "averaged"
    if len(partition.sentence.factors) > 1 or any(factor.spread for factor in partition.sentence.factors):
        return "Kronecker"
    if cuts:
        return "chunks" if len(cuts) == 1 else "tiles"
    if not own:
        return "full layer"
    if {"o", "i"} <= own:
        return "kernels"
    return "per output" if own == {"o"} else "per input" if "i" in own else "per head"
