"""Contractions: second moments generated from a partition and a layer's signals.

Give every axis a letter, and every axis of factor F a primed twin. From the output gradients δ[n t o] and the inputs
a[n t i] of a layer, the moment of F over examples n is::

    δ, a, δ', a' -> own, F, F'        n shared, positions t and t' apart: Σ_n (Σ_t δ a) (Σ_t' δ' a')ᵀ

Other factors' axes are summed, tied axes averaged. Two forms are priced: build the gradients of single examples, X, and
take X Xᵀ; or contract the four operands along the cheapest path. Either is done in slices of examples, so that no
intermediate is larger than :data:`LIMIT`.

KFAC fills each factor from the one signal that carries its axes: :func:`add_independent`.
"""

from __future__ import annotations

import math
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import opt_einsum
import torch
from torch import Tensor

from .grams import add_gram, add_grams
from .layout import Layout, Region
from .signals import Index, Signal

LIMIT = 1 << 24
"""Entries of the largest intermediate."""

_TRAFFIC = 32  # multiplications in the time that an entry of an intermediate takes to be written and read
_EXAMPLE, _HERE, _THERE = "x", "y", "z"  # n, t, t'


@dataclass(frozen=True)
class Letters:
    """The letter of every dimension of a region, by role, and of every cut dimension of each term."""

    own: str
    tied: str
    factors: tuple[str, ...]
    terms: tuple[str, ...]


@lru_cache(maxsize=4096)
def letters(region: Region) -> Letters:
    """Name the dimensions of a region."""
    cut = iter(string.ascii_lowercase)
    terms = tuple("".join(next(cut) for _ in range(1 + split)) for *_, split in region.runs)
    flat = "".join(terms)
    ordered = "".join(flat[position] for position in region.order)
    ends = list(accumulate([len(region.own), len(region.tied), *(len(factor.axes) for factor in region.factors)]))
    parts = [ordered[first:last] for first, last in zip([0, *ends], ends, strict=False)]
    return Letters(parts[0], parts[1], tuple(parts[2:]), terms)


@lru_cache(maxsize=4096)
def carried_terms(layout: Layout, axes: tuple[str, ...]) -> tuple[int, ...] | None:
    """The terms of a layout whose axes a signal carries; ``None`` where it carries a term only in part."""
    held = set(axes)
    shares = [len(held.intersection(term)) for term in layout.terms]
    if any(0 < share < len(term) for share, term in zip(shares, layout.terms, strict=True)):
        return None
    return tuple(number for number, share in enumerate(shares) if share)


def cut(layout: Layout, region: Region, value: Tensor, axes: tuple[str, ...]) -> tuple[Tensor, str]:
    """Cut a signal ``[n, t, *axes]`` like a region; returns it with the letters of its dimensions after n and t."""
    terms = carried_terms(layout, axes)
    assert terms is not None
    order = [axes.index(axis) for term in terms for axis in layout.terms[term]]
    value = value.permute(0, 1, *(2 + dim for dim in order))
    dim, names = 2, ""
    for term in terms:
        width = len(layout.terms[term])
        start, count, size, split = region.runs[term]
        if width > 1:
            value = value.flatten(dim, dim + width - 1)
        if count * size != value.shape[dim]:
            value = value.narrow(dim, start, count * size)
        if split:
            value = value.unflatten(dim, (count, size))
        names += letters(region).terms[term]
        dim += 1 + split
    return value, names


# -- moments of the gradients of single examples -----------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """One factor that is to be filled.

    Attributes:
        region: number of its region.
        number: its number in the region.
        sum: ``[blocks, f, f]``, or ``[blocks, f]`` for a diagonal factor; added to in place.
    """

    region: int
    number: int
    sum: Tensor


def gradients(signals: Sequence[Signal], layout: Layout) -> Tensor:
    """The gradient of every example, ``[n, *layout.shape]``: the sum over positions, and over signals."""
    names = dict(zip((axis.name for axis in layout.sizes), string.ascii_lowercase, strict=False))
    result = "".join(names[axis.name] for axis in layout.sizes)
    total: Tensor | None = None
    for signal in signals:
        operands = [(signal.delta, signal.delta_axes), *_input(signal)]
        inputs = ",".join(_EXAMPLE + _HERE + "".join(names[axis] for axis in axes) for _, axes in operands)
        one = torch.einsum(f"{inputs}->{_EXAMPLE}{result}", *(value for value, _ in operands))
        total = one if total is None else total + one
    assert total is not None
    return total


def _input(signal: Signal) -> list[tuple[Tensor, tuple[str, ...]]]:
    if signal.input is None:
        return []
    given = signal.written().input
    assert given is not None
    return [(given.dense(signal.delta.dtype) if isinstance(given, Index) else given, signal.input_axes)]


def slices(signals: Sequence[Signal], entries: int) -> Iterator[list[Signal]]:
    """The signals of as many examples at a time as keep ``entries`` an example below :data:`LIMIT`."""
    n = signals[0].delta.shape[0]
    size = max(1, LIMIT // max(1, entries))
    if size >= n:
        yield list(signals)
        return
    for first in range(0, n, size):
        yield [signal.part(first, first + size) for signal in signals]


def add_samples(targets: Sequence[Target], layout: Layout, signals: Sequence[Signal]) -> None:
    """Add Σ_n of the second moments of single examples' gradients g_n to every target.

    Args:
        targets: the factors.
        layout: their layout, with the axes of ``signals`` as its sources.
        signals: of the same examples; their gradients add up. All in the dtype of the targets.
    """
    built = []
    plain = len(signals) == 1 and _axes(signals[0]) == layout.sources
    for target in targets:
        plan = _plan(layout, target.region, target.number, *_shape(signals[0])) if plain else None
        if plan is None:
            built.append(target)
        else:
            _contract(target, layout, signals[0], plan)
    if not built:
        return
    gain = signals[0].gain
    for part in slices(signals, 2 * math.prod(layout.shape) + _densest(signals)):
        blocks = layout.block(gradients(part, layout))
        n = part[0].delta.shape[0]
        for target in built:
            region = layout.regions[target.region]
            block = blocks[target.region].unflatten(0, (n, region.blocks)).transpose(0, 1).flatten(1, 2)
            add_grams(target.sum, block.movedim(2 + target.number, 1).flatten(2).mT, gain / region.ties)


def _kept(total: Tensor, keep: float) -> Tensor:
    """What is there, or zero even where it is not finite."""
    return total if keep == 1.0 else total.zero_()


def _axes(signal: Signal) -> tuple[tuple[str, ...], ...]:
    return (signal.delta_axes,) if signal.input is None else (signal.delta_axes, signal.input_axes)


def _shape(signal: Signal) -> tuple[int, int, bool]:
    return signal.delta.shape[0], signal.positions, signal.input is not None


def _densest(signals: Sequence[Signal]) -> int:
    """Entries an example of the largest operand."""
    return max(
        signal.positions * math.prod(value.shape[2:] if isinstance(value, Tensor) else [value.size])
        for signal in signals
        for value in (signal.delta, signal.input)
        if value is not None
    )


@dataclass(frozen=True)
class Plan:
    """A contraction of the operands.

    Attributes:
        steps: which operands are contracted, as they stand then, and by which equation; the result goes to the end.
        result: the letters of the moment.
        entries: an example, of the largest intermediate.
    """

    steps: tuple[tuple[tuple[int, ...], str], ...]
    result: str
    entries: int


@lru_cache(maxsize=4096)
def _plan(layout: Layout, index: int, number: int, n: int, positions: int, product: bool) -> Plan | None:
    """The cheaper form for one factor: a contraction, or ``None`` for building the gradients."""
    region = layout.regions[index]
    sources = layout.sources if product else layout.sources[:1]
    if any(carried_terms(layout, axes) is None for axes in sources):
        return None
    names = letters(region)
    mine = names.factors[number]
    twin = str.maketrans({} if region.factors[number].diagonal else {one: one.upper() for one in mine})
    carried = ["".join(names.terms[term] for term in carried_terms(layout, axes) or ()) for axes in sources]
    here, there = (_HERE, _THERE) if positions > 1 else ("", "")
    first = [_EXAMPLE + here + one for one in carried]
    second = [_EXAMPLE + there + one.translate(twin) for one in carried]
    result = names.own + mine + (mine.translate(twin) if not region.factors[number].diagonal else "")
    equation = f"{','.join(first + second)}->{result}"
    sizes = {_EXAMPLE: n, _HERE: positions, _THERE: positions, **_sizes(region, names)}
    sizes.update({one.upper(): sizes[one] for one in mine})
    shapes = [tuple(sizes[one] for one in operand) for operand in first + second]
    _, info = opt_einsum.contract_path(equation, *shapes, shapes=True, optimize="optimal")
    entries = math.prod(sizes[one] for one in names.own + names.tied + "".join(names.factors))
    wide = 1 if region.factors[number].diagonal else region.factors[number].size
    built = 2 * n * positions * entries + 2 * n * entries * wide + _TRAFFIC * n * entries
    if float(info.opt_cost) + _TRAFFIC * int(info.largest_intermediate) >= built:
        return None
    steps = tuple((tuple(places), step) for places, _, step, *_ in info.contraction_list)
    return Plan(steps, result, int(info.largest_intermediate) // max(1, n) + 1)


def _sizes(region: Region, names: Letters) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for name, (_, count, size, split) in zip(names.terms, region.runs, strict=True):
        sizes.update(zip(name, (count, size) if split else (size,), strict=True))
    return sizes


def _contract(target: Target, layout: Layout, signal: Signal, plan: Plan) -> None:
    region = layout.regions[target.region]
    for (part,) in slices([signal], max(plan.entries, _densest([signal]))):
        operands = []
        for value, axes in [(part.delta, part.delta_axes), *_input(part)]:
            operand, _ = cut(layout, region, value, axes)
            operands.append(operand if part.positions > 1 else operand.squeeze(1))
        moment = _carried_out(plan, [*operands, *operands])
        target.sum.add_(moment.reshape(target.sum.shape), alpha=signal.gain / region.ties)


def _carried_out(plan: Plan, operands: list[Tensor]) -> Tensor:
    letters_of = plan.result
    for places, equation in plan.steps:
        some = [operands.pop(place) for place in places]
        inputs, letters_of = equation.split("->")
        first, *others = inputs.split(",")
        if all(sorted(one) == sorted(first) for one in others) and set(letters_of) < set(first):
            # Nothing but products of entries, which a product of matrices would take one by one.
            moved = [torch.einsum(f"{one}->{first}", value) for one, value in zip(others, some[1:], strict=True)]
            total = math.prod(moved, start=some[0]).sum([first.index(one) for one in first if one not in letters_of])
            kept = "".join(one for one in first if one in letters_of)
            operands.append(torch.einsum(f"{kept}->{letters_of}", total))
        else:
            operands.append(torch.einsum(equation, *some))
    return torch.einsum(f"{letters_of}->{plan.result}", operands[0])


# -- independent factors -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where a factor comes from and is kept.

    Attributes:
        region: number of the first region that has it.
        number: its number there.
        name: what its state is called.
        carried: for every own axis of the region, whether the factor is indexed by it.
        source: the signal that fills it: 0 the output gradient, 1 the input, ``None`` both (the gradient).
    """

    region: int
    number: int
    name: str
    carried: tuple[bool, ...]
    source: int | None = None

    def rows(self, region: Region) -> int:
        """How many of them there are."""
        return math.prod(axis.size for axis, held in zip(region.own, self.carried, strict=True) if held)


def independent_places(layout: Layout) -> list[list[Place]]:
    """The places of every region's factors, where each comes from one signal.

    A factor is indexed only by the own axes that its signal carries, and regions that differ elsewhere share it.

    Raises:
        ValueError: where a factor's axes lie in both signals, or one signal would fill two factors.
    """
    shared: dict[tuple[object, ...], Place] = {}
    places: list[list[Place]] = []
    carried = [carried_terms(layout, axes) for axes in layout.sources]
    for index, region in enumerate(layout.regions):
        mine: list[Place] = []
        first = len(region.own) + len(region.tied)
        for number, factor in enumerate(region.factors):
            terms = set(region.homes[first : first + len(factor.axes)])
            first += len(factor.axes)
            source = next((one for one, held in enumerate(carried) if held is not None and terms <= set(held)), None)
            if source is None or any(place.source == source for place in mine):
                raise ValueError(
                    "of='signals' fills every factor from one signal: one factor over axes of the output "
                    f"({' '.join(layout.sources[0])}), one over axes of the input "
                    f"({' '.join(layout.sources[-1]) if len(layout.sources) > 1 else 'none'})"
                )
            held = set(carried[source] or ())
            key = (number, source, tuple(region.runs[term] for term in sorted(held)))
            own = tuple(home in held for home in region.homes[: len(region.own)])
            mine.append(shared.setdefault(key, Place(index, number, f"{index}_{number}", own, source)))
        places.append(mine)
    return places


def add_independent(
    total: Tensor, place: Place, layout: Layout, signal: Signal, reduce: bool, fresh: bool = False
) -> None:
    """Add Σ of the second moments of one signal to a factor.

    Args:
        total: ``[rows, f, f]``, or ``[rows, f]`` for a diagonal factor.
        place: which factor.
        layout: its layout.
        signal: in the dtype of ``total``.
        reduce: sum δ and average a over positions first (KFAC-reduce), instead of taking positions one by one (expand).
        fresh: what is in ``total`` does not count.
    """
    region = layout.regions[place.region]
    keep = 0.0 if fresh else 1.0
    if place.source == 1 and isinstance(signal.input, Index) and not reduce and total.ndim == 2:
        _add_counts(_kept(total, keep), place, layout, signal)
        return
    for (part,) in slices([signal], _densest([signal])):
        joined = place.source == 1 and part.constant is not None and total.ndim == 3
        if joined and not reduce and _whole(layout, region, part.input_axes):
            _add_joined_gram(total[0], part, keep)
            keep = 1.0
            continue
        value, axes = (part.delta, part.delta_axes) if place.source == 0 else _input(part)[0]
        if reduce and part.positions > 1:
            value = value.sum(1, keepdim=True) if place.source == 0 else _mean(value, part.weight)
        block, names = cut(layout, region, value, axes)
        given = letters(region)
        here = _EXAMPLE + _HERE + names
        own = "".join(name for name, held in zip(given.own, place.carried, strict=True) if held)
        tied = "".join(name for name in given.tied if name in names)
        order = [here.index(name) for name in own + _EXAMPLE + _HERE + tied + given.factors[place.number]]
        rows = block.permute(order).reshape(total.shape[0], -1, total.shape[-1])
        ties = math.prod(block.shape[here.index(name)] for name in tied)
        add_grams(total, rows, (part.gain if place.source == 0 else 1.0) / ties, keep)
        keep = 1.0


def add_first(total: Tensor, place: Place, layout: Layout, signal: Signal) -> None:
    """Add Σ of one signal, over examples and positions, to the mean of a factor.

    Args:
        total: ``[rows, f]``.
        place: which factor.
        layout: its layout.
        signal: in the dtype of ``total``.
    """
    region = layout.regions[place.region]
    for (part,) in slices([signal], _densest([signal])):
        value, axes = (part.delta, part.delta_axes) if place.source == 0 else _input(part)[0]
        block, names = cut(layout, region, value.sum((0, 1), keepdim=True), axes)
        given = letters(region)
        here = _EXAMPLE + _HERE + names
        own = "".join(name for name, held in zip(given.own, place.carried, strict=True) if held)
        tied = "".join(name for name in given.tied if name in names)
        order = [here.index(name) for name in own + _EXAMPLE + _HERE + tied + given.factors[place.number]]
        rows = block.permute(order).reshape(total.shape[0], -1, total.shape[-1])
        total.add_(rows.mean(1), alpha=part.gain if place.source == 0 else 1.0)


def _whole(layout: Layout, region: Region, axes: tuple[str, ...]) -> bool:
    """Whether some axes are one uncut term of a region, by themselves inside one factor."""
    if axes not in layout.terms:
        return False
    _, _, size, split = region.runs[layout.terms.index(axes)]
    full = next(axis.size for axis in layout.sizes if axis.name == axes[-1])
    return not split and size == full and len(axes) == 1


def _add_joined_gram(total: Tensor, signal: Signal, keep: float) -> None:
    """Add the Gram matrix of inputs and their constant entry, without writing that one out."""
    assert isinstance(signal.input, Tensor)
    assert signal.constant is not None
    rows = signal.input.flatten(0, 1)
    add_gram(total[:-1, :-1], rows, 1.0, keep)
    border = rows.mT @ rows.new_full((rows.shape[0],), signal.constant)
    _kept(total[-1], keep)
    _kept(total[:-1, -1], keep)
    total[-1, :-1].add_(border)
    total[:-1, -1].add_(border)
    total[-1, -1].add_(rows.shape[0] * signal.constant**2)


def _mean(value: Tensor, weight: Tensor | None) -> Tensor:
    if weight is None:
        return value.mean(1, keepdim=True)
    count = weight.to(value.dtype).sum(1).clamp_min(1)
    return value.sum(1, keepdim=True) / count.view(-1, *[1] * (value.ndim - 1))


def _add_counts(total: Tensor, place: Place, layout: Layout, signal: Signal) -> None:
    """The second moment of one-hot inputs, a diagonal, is how often each was chosen."""
    assert isinstance(signal.input, Index)
    where = (signal.input.where.flatten() + 1).clamp_min_(0)  # what chooses nothing is counted in the first place
    counts = total.new_zeros(signal.input.size + 1).index_add_(0, where, total.new_ones(1).expand(len(where)))
    block, _ = cut(layout, layout.regions[place.region], counts[None, None, 1:], signal.input_axes)
    total.add_(block.reshape(total.shape))
