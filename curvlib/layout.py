"""From a parsed partition and the sizes of the axes to regular batches of blocks.

A *layout* cuts one operand (a gradient with named axes) into *regions*. In a region every block has the same shape,
so that a region is one tensor ``[own..., tied..., factor axes...]`` and its curvature is one small batch per factor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import product

import torch
from torch import Tensor

from .grammar import Cut, Factor, PartitionError, Sentence, Term


@dataclass(frozen=True)
class Axis:
    """A named axis of a region, with its number of entries."""

    name: str
    size: int


@dataclass(frozen=True)
class FactorShape:
    """One Kronecker factor of a region: the axes inside it, in row-major order, and whether it is a diagonal."""

    axes: tuple[Axis, ...]
    diagonal: bool = False

    @property
    def size(self) -> int:
        """Entries of the operand's axes in this factor."""
        return math.prod(axis.size for axis in self.axes)

    @property
    def shape(self) -> tuple[int, ...]:
        """How one such factor is stored."""
        return (self.size,) if self.diagonal else (self.size, self.size)


@dataclass(frozen=True)
class _Run:
    """Consecutive pieces of equal size along one (merged) axis: ``count`` pieces of ``size`` entries from ``start``."""

    start: int
    count: int
    size: int


class _Hashed:
    """Something deep, whose hash is asked for at every step and therefore kept."""

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, one.name) for one in fields(self)))  # type: ignore[arg-type]

    def __hash__(self) -> int:
        return self._hash

    def __getstate__(self) -> dict[str, object]:
        return {
            name: value for name, value in vars(self).items() if name != "_hash"
        }  # another process has other hashes


@dataclass(frozen=True)
class Region(_Hashed):
    """A regular batch of blocks: ``own`` numbers them, ``tied`` is averaged away, ``factors`` are inside."""

    own: tuple[Axis, ...]
    tied: tuple[Axis, ...]
    factors: tuple[FactorShape, ...]
    _runs: tuple[_Run, ...]
    _order: tuple[int, ...]
    _split: tuple[bool, ...]

    __hash__ = _Hashed.__hash__

    @cached_property
    def blocks(self) -> int:
        """Number of blocks that have a curvature of their own."""
        return math.prod(axis.size for axis in self.own)

    @cached_property
    def ties(self) -> int:
        """Number of blocks that share one curvature."""
        return math.prod(axis.size for axis in self.tied)

    @cached_property
    def numel(self) -> int:
        """Stored entries of all factors."""
        return self.blocks * sum(math.prod(factor.shape) for factor in self.factors)

    @cached_property
    def rank(self) -> int:
        """The k of the composition: the number of factors of size above one, at least one."""
        return max(1, sum(factor.size > 1 for factor in self.factors))

    def narrow(self, merged: Tensor) -> Tensor:
        """View this region of a merged operand ``[n, terms...]`` as ``[n, own..., tied..., factor axes...]``."""
        sizes: list[int] = [merged.shape[0]]
        for dim, (run, split) in enumerate(zip(self._runs, self._split, strict=True), start=1):
            merged = merged.narrow(dim, run.start, run.count * run.size)
            sizes += [run.count, run.size] if split else [run.size]
        unflattened = merged.view(sizes) if merged.is_contiguous() else _unflatten(merged, self._runs, self._split)
        return unflattened.permute(0, *(1 + dim for dim in self._order))

    @cached_property
    def runs(self) -> tuple[tuple[int, int, int, bool], ...]:
        """For each term (start, pieces, entries of a piece, whether it is cut into a dimension of pieces)."""
        return tuple(
            (run.start, run.count, run.size, split) for run, split in zip(self._runs, self._split, strict=True)
        )

    @cached_property
    def homes(self) -> tuple[int, ...]:
        """The term of every dimension, in the order own, tied, factors."""
        terms = [term for term, split in enumerate(self._split) for _ in range(1 + split)]
        return tuple(terms[position] for position in self._order)

    @property
    def order(self) -> tuple[int, ...]:
        """Where each dimension, in the order own, tied, factors, lies among the cut terms."""
        return self._order

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """``[blocks, ties, *factor sizes]``: the form in which curvature meets a region."""
        return (self.blocks, self.ties, *(factor.size for factor in self.factors))


def _unflatten(merged: Tensor, runs: Sequence[_Run], split: Sequence[bool]) -> Tensor:
    for dim in reversed(range(len(runs))):
        if split[dim]:
            merged = merged.unflatten(dim + 1, (runs[dim].count, runs[dim].size))
    return merged


@dataclass(frozen=True)
class Layout(_Hashed):
    """A partition made exact for given axis sizes.

    Attributes:
        sizes: axis name -> entries, in the operand's row-major order; joined axes stand as one, last.
        regions: the regular batches of blocks; together they hold every entry exactly once.
        sources: the axes that each of a layer's signals carries, the output gradient's first; empty where unknown.
    """

    sizes: tuple[Axis, ...]
    regions: tuple[Region, ...]
    _terms: tuple[tuple[int, ...], ...]
    sources: tuple[tuple[str, ...], ...] = ()

    __hash__ = _Hashed.__hash__

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Shape of the operand."""
        return tuple(axis.size for axis in self.sizes)

    @cached_property
    def numel(self) -> int:
        """Stored entries of one second moment under this partition."""
        return sum(region.numel for region in self.regions)

    @property
    def nbytes(self) -> int:
        """Bytes of one second moment in float32."""
        return 4 * self.numel

    @cached_property
    def elementwise(self) -> bool:
        """Whether every entry is a block of its own, all in one region."""
        simple = all(len(region.factors) == 1 and region.blocks == region.ties == 1 for region in self.regions)
        return simple and len(self.regions) <= 1 and all(region.factors[0].diagonal for region in self.regions)

    @cached_property
    def terms(self) -> tuple[tuple[str, ...], ...]:
        """The axes of each (merged) term, in the order in which regions cut them."""
        return tuple(tuple(self.sizes[dim].name for dim in term) for term in self._terms)

    @cached_property
    def _permutation(self) -> tuple[int, ...]:
        return tuple(dim for term in self._terms for dim in term)

    @cached_property
    def _merged(self) -> tuple[int, ...]:
        return tuple(math.prod(self.shape[dim] for dim in term) for term in self._terms)

    def block(self, operand: Tensor) -> list[Tensor]:
        """Cut a batch of operands into blocks.

        Args:
            operand: ``[n, *shape]``.

        Returns:
            One tensor a region, ``[n * blocks, ties, *factor sizes]``; a view where strides allow.
        """
        order = self._permutation
        merged = operand.permute(0, *(1 + dim for dim in order)).reshape(operand.shape[0], *self._merged)
        return [region.narrow(merged).reshape(-1, *region.shape[1:]) for region in self.regions]

    def unblock(self, blocks: Sequence[Tensor], like: Tensor) -> Tensor:
        """Put blocks back together: the inverse of :meth:`block`, ``[n, *shape]`` with the dtype of ``like``."""
        n, order = like.shape[0], self._permutation
        if len(self.regions) == 1:
            return self._whole(blocks[0].to(like.dtype), n)
        merged = like.new_empty((n, *self._merged))
        for region, block in zip(self.regions, blocks, strict=True):
            window = region.narrow(merged)
            window.copy_(block.reshape(window.shape))
        permuted = merged.view(n, *(self.shape[dim] for dim in order))
        inverse = sorted(range(len(order)), key=order.__getitem__)
        return permuted.permute(0, *(1 + dim for dim in inverse))

    def _whole(self, block: Tensor, n: int) -> Tensor:
        """The only region as a view of the operand."""
        region = self.regions[0]
        axes = [*region.own, *region.tied, *(axis for factor in region.factors for axis in factor.axes)]
        apart = block.reshape(n, *(axis.size for axis in axes))
        cut = sorted(range(len(axes)), key=region.order.__getitem__)
        merged = apart.permute(0, *(1 + dim for dim in cut)).reshape(n, *self._merged)
        dims = merged.reshape(n, *(self.shape[dim] for dim in self._permutation))
        inverse = sorted(range(len(self._permutation)), key=self._permutation.__getitem__)
        return dims.permute(0, *(1 + dim for dim in inverse))

    def index(self) -> list[Tensor]:
        """For each region the positions of its entries in the flat operand, ``[blocks, ties, *factor sizes]``."""
        return self.block(torch.arange(math.prod(self.shape)).reshape(1, *self.shape))

    def labels(self) -> Tensor:
        """The number of the curvature block that each entry belongs to, ``[numel of the operand]``."""
        labels = torch.zeros(math.prod(self.shape), dtype=torch.int64)
        first = 0
        for region, index in zip(self.regions, self.index(), strict=True):
            diagonal = len(region.factors) == 1 and region.factors[0].diagonal
            if diagonal:
                labels[index.flatten()] = torch.arange(first, first + index.numel())
                first += index.numel()
            else:
                labels[index.flatten(1)] = torch.arange(first, first + region.blocks)[:, None]
                first += region.blocks
        return labels


def compile_layout(
    sentence: Sentence,
    text: str,
    sizes: Mapping[str, int],
    joined: Sequence[str] = (),
    sources: Sequence[Sequence[str]] = (),
) -> Layout:
    """Make a parsed partition exact.

    Args:
        sentence: the parsed text.
        text: the text as written, for messages.
        sizes: axis name -> entries, in the operand's row-major order.
        joined: input axes (the last ones, in order) that are merged into one with one more entry for a bias.
        sources: the axes that each of a layer's signals carries.

    Raises:
        PartitionError: an unknown axis, an axis not named, or joined axes that the partition separates.
    """
    axes = list(sizes)
    own, factors = _expand(sentence, text, axes)
    terms: list[tuple[Term, str, int]] = [(term, "tied" if term.tied else "own", -1) for term in own]
    terms += [(term, "factor", number) for number, factor in enumerate(factors) for term in factor.terms]
    if joined:
        terms = _join(terms, text, tuple(joined), axes)
    operand = _operand(sizes, tuple(joined))
    place = {axis.name: dim for dim, axis in enumerate(operand)}
    positions = tuple(tuple(place[name] for name in term.axes) for term, _, _ in terms)
    lengths = [math.prod(operand[dim].size for dim in dims) for dims in positions]
    cuts = [_runs(term, length, text, sizes) for (term, _, _), length in zip(terms, lengths, strict=True)]
    diagonal = [factor.diagonal for factor in factors]
    regions = [] if 0 in lengths else [_region(terms, runs, diagonal) for runs in product(*cuts)]
    carried = tuple(joined_axes(source, joined) for source in sources)
    return Layout(operand, tuple(regions), positions, carried)


def joined_axes(axes: Sequence[str], joined: Sequence[str]) -> tuple[str, ...]:
    """The axes of a signal after a bias is joined to its input axes."""
    if not joined or not set(joined) <= set(axes):
        return tuple(axes)
    return (*(axis for axis in axes if axis not in joined), "·".join(joined))


def _expand(sentence: Sentence, text: str, axes: list[str]) -> tuple[list[Term], list[Factor]]:
    """Replace every ellipsis by the axes it stands for, spread factors, and let empty factors vanish."""
    named = {axis for term in sentence.terms() for axis in term.axes if not axis.endswith("...")}
    prefixes = [axis[:-3] for term in sentence.terms() for axis in term.axes if axis.endswith("...") and axis != "..."]

    def numbered(prefix: str) -> list[str]:
        return [
            axis for axis in axes if axis not in named and axis.startswith(prefix) and axis[len(prefix) :].isdigit()
        ]

    taken = named.union(*(numbered(prefix) for prefix in prefixes)) if prefixes else set(named)
    rest = [axis for axis in axes if axis not in taken]
    dots = any("..." in term.axes for term in sentence.terms())
    for term in sentence.terms():
        for axis in term.axes:
            if not axis.endswith("...") and axis not in axes:
                raise PartitionError(f"unknown axis {axis!r}", text, term.at, axes)

    def expand(term: Term) -> list[Term]:
        expanded: list[str] = []
        for axis in term.axes:
            expanded += rest if axis == "..." else numbered(axis[:-3]) if axis.endswith("...") else [axis]
        if len(term.axes) == 1 and not term.merged:
            return [Term((axis,), term.cut, term.tied, term.at) for axis in expanded]
        return [Term(tuple(expanded), term.cut, term.tied, term.at)] if expanded else []

    own = [part for term in sentence.own for part in expand(term)]
    factors: list[Factor] = []
    for factor in sentence.factors:
        parts = [part for term in factor.terms for part in expand(term)]
        groups = [[part] for part in parts] if factor.spread else [parts] if parts else []
        factors += [Factor(tuple(group), factor.diagonal) for group in groups]
    if not dots and rest == ["g"]:
        own.insert(0, Term(("g",)))
    elif not dots and rest:
        raise PartitionError(f"axis {rest[0]!r} is not named; '...' stands for all axes not named", text, None, axes)
    return own, factors


def _operand(sizes: Mapping[str, int], joined: tuple[str, ...]) -> tuple[Axis, ...]:
    plain = [Axis(name, size) for name, size in sizes.items() if name not in joined]
    if not joined:
        return tuple(plain)
    return (*plain, Axis("·".join(joined), math.prod(sizes[name] for name in joined) + 1))


def _join(
    terms: list[tuple[Term, str, int]], text: str, joined: tuple[str, ...], axes: list[str]
) -> list[tuple[Term, str, int]]:
    """Let the joined axes stand as one axis; they must lie together in one factor, or be one axis."""
    name = "·".join(joined)
    flat: list[tuple[Term, str, int]] = []
    for term, role, number in terms:
        if term.cut is None:
            flat += [(Term((axis,), None, term.tied, term.at), role, number) for axis in term.axes]
        else:
            flat.append((term, role, number))
    for first, (term, role, number) in enumerate(flat):
        group = flat[first : first + len(joined)]
        plain = [one.axes for one, _, _ in group] == [(axis,) for axis in joined]
        together = len({(other, factor) for _, other, factor in group}) == 1
        if plain and together and (len(joined) == 1 or all(one.cut is None for one, _, _ in group)):
            return [
                *flat[:first],
                (Term((name,), term.cut, term.tied, term.at), role, number),
                *flat[first + len(group) :],
            ]
        start = _find(term.axes, joined)
        if start is not None:
            merged = (*term.axes[:start], name, *term.axes[start + len(joined) :])
            return [
                *flat[:first],
                (Term(merged, term.cut, term.tied, term.at), role, number),
                *flat[first + 1 :],
            ]
    raise PartitionError(
        f"a bias can be joined only where the input axes {' '.join(joined)} stand together; use join_bias=False",
        text,
        None,
        axes,
    )


def _find(axes: tuple[str, ...], wanted: tuple[str, ...]) -> int | None:
    starts = range(len(axes) - len(wanted) + 1)
    return next((start for start in starts if axes[start : start + len(wanted)] == wanted), None)


def _runs(term: Term, length: int, text: str, sizes: Mapping[str, int]) -> list[_Run]:
    """The runs of equal pieces along a term."""
    cut = term.cut
    if cut is None:
        return [_Run(0, 1, length)]
    limit = _limit(cut, term, text, sizes)
    if limit >= length:
        return [_Run(0, 1, length)]
    if cut.remainder or cut.tied:
        count, left = divmod(length, limit)
        return [_Run(0, count, limit), *([_Run(count * limit, 1, left)] if left else [])]
    pieces = -(-length // limit)
    small, longer = divmod(length, pieces)
    long = [_Run(0, longer, small + 1)] if longer else []
    return [*long, _Run(longer * (small + 1), pieces - longer, small)]


def _limit(cut: Cut, term: Term, text: str, sizes: Mapping[str, int]) -> int:
    if isinstance(cut.limit, int):
        return cut.limit
    if cut.limit not in sizes:
        raise PartitionError(f"a cut by the size of an unknown axis {cut.limit!r}", text, term.at, sizes)
    return max(1, sizes[cut.limit])


def _region(terms: list[tuple[Term, str, int]], runs: Sequence[_Run], diagonal: list[bool]) -> Region:
    """One choice of runs: sort the dimensions of the narrowed operand into own, tied and factors."""
    own: list[tuple[int, Axis]] = []
    pieces: list[tuple[int, Axis]] = []
    tied: list[tuple[int, Axis]] = []
    inside: list[list[tuple[int, Axis]]] = [[] for _ in diagonal]
    dim, split = 0, []
    for (term, role, number), run in zip(terms, runs, strict=True):
        name = " ".join(term.axes)
        name = name if len(term.axes) == 1 else f"({name})"
        split.append(term.cut is not None)
        if term.cut is not None:
            piece = (dim, Axis(f"{name}{term.cut}", run.count))
            (tied if term.cut.tied else pieces).append(piece)
            dim += 1
        home = inside[number] if role == "factor" else tied if role == "tied" else own
        home.append((dim, Axis(name, run.size)))
        dim += 1
    own += pieces
    if not inside:  # 1×1 blocks are the diagonal
        inside, diagonal, own = [own], [True], []
    order = [*own, *tied, *(entry for factor in inside for entry in factor)]
    return Region(
        tuple(axis for _, axis in own),
        tuple(axis for _, axis in tied),
        tuple(
            FactorShape(tuple(axis for _, axis in factor), kind) for factor, kind in zip(inside, diagonal, strict=True)
        ),
        tuple(runs),
        tuple(position for position, _ in order),
        tuple(split),
    )
