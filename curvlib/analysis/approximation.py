"""An approximation at work: a routing table given the data of an objective, and what its blocks then hold."""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import roots
from ..blocks import Block, EigenBlock, State
from ..ears import Ear, TapWarning
from ..inspection import Held
from ..layers import survey
from ..optimizer import CurvatureOptimizer
from ..partition import Partition, PartitionError
from ..recipe import Labels, Moment, Recipe, Root, Rule, Schedule
from ..routing import Fits, Route, Table, as_table
from .family import family
from .objective import Objective, Of

Build = Callable[[nn.Module], CurvatureOptimizer]
Structure = str | Partition | Recipe | Route | Sequence[Route] | type[Block] | Build
"""What can be looked at: the text of a partition, a partition, a recipe, a routing table, a block class, or what makes an
optimizer from a model, such as ``curvlib.KFAC``."""

_WORK = 2**26  # bytes that vectors at once may take


def table_of(structure: Structure, model: nn.Module, labels: Labels) -> Table:
    """The routing table of a structure, its statistics made a plain mean over the data.

    A partition, or a block class, gets moments of single examples, composed by the trace where there are several factors,
    their product damped as a whole; a partition joins biases where it can, and leaves to the diagonal what it does not fit.
    Momentum, grafting and clipping are left out: only the curvature is looked at.

    Raises:
        TypeError: for anything else.
        ValueError: for an optimizer with several groups, or a partition that fits no trainable parameter.
    """
    table: Table
    if isinstance(structure, (str, Partition)):
        table = _of_partition(structure if isinstance(structure, Partition) else Partition(structure), model)
    elif isinstance(structure, type) and issubclass(structure, Block):
        table = as_table(Recipe("| ...", Moment("samples"), Root(1), block=structure))
    elif isinstance(structure, (Recipe, Route, list, tuple)):
        table = as_table(structure)
    elif callable(structure):
        with _quietly():
            optimizer: Any = cast(Build, structure)(copy.deepcopy(model))
        if not isinstance(optimizer, CurvatureOptimizer):
            raise TypeError(f"{structure!r} must make a CurvatureOptimizer, got {type(optimizer).__name__}")
        if len(optimizer.param_groups) != 1:
            raise ValueError(f"an optimizer with one group can be looked at, got {len(optimizer.param_groups)}")
        (table,) = optimizer._tables()
        optimizer.detach()
    else:
        raise TypeError(f"expected a partition, recipe, route, block class or optimizer class, got {structure!r}")
    return tuple(replace(route, recipe=_plain(route.recipe, labels)) for route in table)


@contextmanager
def _quietly() -> Iterator[None]:
    """Without a word on layers that can't be heard: only routes are read here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TapWarning)
        yield


def _of_partition(partition: Partition, model: nn.Module) -> Table:
    """A partition wherever it fits, with the bias joined where it can be; the diagonal elsewhere.

    Raises:
        PartitionError: where it fits no trainable parameter.
    """
    refused: list[PartitionError] = []
    slots = [slot for parameter, slot in survey(model)[0].items() if parameter.requires_grad]
    for slot in slots:
        try:
            partition.layout(slot.sizes)
        except PartitionError as error:
            refused.append(error.about(slot.name))
    if refused and len(refused) == len(slots):
        raise refused[0] from None
    kronecker = len(partition.sentence.factors) > 1 or any(factor.spread for factor in partition.sentence.factors)
    recipe = Recipe(
        partition,
        Moment("samples", composition="trace"),
        Root(1),
        join_bias=not partition.diagonal,
        block=EigenBlock if kronecker else None,
    )

    return (
        Route(recipe, where=Fits(partition, joined=True)),
        Route(replace(recipe, join_bias=False), where=Fits(partition)),
        Route(Recipe("... |", recipe.moment, recipe.root)),
    )


def _plain(recipe: Recipe, labels: Labels) -> Recipe:
    if recipe.root.tracking is not None or recipe.moment.of == "hessian":
        what = "roots that are tracked from step to step" if recipe.root.tracking else "moments of the Hessian"
        raise ValueError(f"{what} are no approximation that data alone decide; {recipe.partition} cannot be compared")
    moment = replace(recipe.moment, average="mean", initial=0.0, debias=False)
    seen = {"labels": labels, "average": "ema", "beta": 0.0}  # a second look at the same data replaces the first
    moment = replace(moment, **seen) if moment.listens else replace(moment, of="gradient")  # type: ignore[arg-type]
    fallback = None if recipe.fallback is None else _plain(recipe.fallback, labels)
    return replace(recipe, moment=moment, rule=Rule(), schedule=Schedule(), fallback=fallback)


@dataclass
class Times:
    """Seconds of one unit's work, each the least of some repetitions.

    Attributes:
        statistics: taking in the data once.
        refresh: solving the roots.
        apply: one direction.
    """

    statistics: float = 0.0
    refresh: float = 0.0
    apply: float = 0.0


class Approximation:
    """A structure that has seen the data of an objective once.

    Args:
        structure: see :data:`Structure`.
        objective: model, loss and data; the model is copied.
        labels: of the moments that listen.
        of: a module, a parameter, the name of either, or several; ``None`` for the whole network.
        batch: examples behind one gradient, for moments of the batch gradient, which are averaged over batches. A last
            batch that is not full is left out.
        repeats: how often each time is measured.
        seed: of drawn labels.

    Attributes:
        family: of the structure, see :mod:`curvlib.analysis.family`.
        held: the units, with what each holds.
    """

    def __init__(
        self,
        structure: Structure,
        objective: Objective,
        labels: Labels = "exact",
        of: Of | Sequence[Of] | None = None,
        *,
        batch: int = 32,
        repeats: int = 3,
        seed: int = 0,
    ) -> None:
        names = objective.names(of)
        model = copy.deepcopy(objective.model)
        model.to(objective.precision)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in names)
        self.objective, self.repeats = replace(objective, model=model), repeats
        self._known = objective.known(f"labels={labels!r}") if labels != "data" else (None, 1.0)
        table = table_of(structure, model, labels)
        self.family = family(table)
        chosen = {name: parameter for name, parameter in model.named_parameters() if name in names}
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in chosen.items()}
        self._times: dict[Tensor, float] = defaultdict(float)
        listening: dict[bool, list[tuple[str, Tensor]]] = {True: [], False: []}
        with _quietly():
            scout = CurvatureOptimizer(chosen.items(), table, lr=0.0, model=model)
        for unit, recipe in scout._recipes().items():
            mine = [(self._names[parameter], parameter) for parameter in unit.operand.parameters]
            listening[recipe.moment.listens] += mine
        scout.detach()
        self.held: list[Held] = []
        for listens, parameters in listening.items():
            if parameters:
                optimizer = CurvatureOptimizer(parameters, table, lr=0.0, model=model)
                optimizer.seed = seed
                self._listen(optimizer) if listens else self._average(optimizer, min(batch, len(objective)))
                self.held += optimizer.held()
                optimizer.detach()

    def names_of(self, held: Held) -> list[str]:
        """The names of a unit's parameters, in its order."""
        return [self._names[parameter] for parameter in held.unit.operand.parameters]

    # -- statistics -------------------------------------------------------------------------------------------------

    def _listen(self, optimizer: CurvatureOptimizer) -> None:
        """Take the statistics of single examples from all data at once."""
        for _ in range(self.repeats):
            optimizer.zero_grad()
            seconds = {lead: _Timed(ear) for lead, ear in optimizer._taps.ears.items()}
            for inputs, targets in self.objective.chunks(512):
                self._backward(optimizer, inputs, targets, len(inputs) / len(self.objective))
            for lead, one in seconds.items():
                self._times[lead] = min(one.stop(), self._times.get(lead, math.inf))
        optimizer.step()
        for _ in range(max(ear.block.looks for ear in optimizer._taps.ears.values()) - 1):
            optimizer.zero_grad()
            for inputs, targets in self.objective.chunks(512):
                self._backward(optimizer, inputs, targets, len(inputs) / len(self.objective))
            optimizer.step()

    def _average(self, optimizer: CurvatureOptimizer, batch: int) -> None:
        """Average the statistics of gradients over batches."""
        for inputs, targets in self.objective.chunks(batch):
            if len(inputs) == batch:
                optimizer.zero_grad()
                self._backward(optimizer, inputs, targets, 1.0)
                optimizer.step()

    def _backward(self, optimizer: CurvatureOptimizer, inputs: Tensor, targets: Tensor, weight: float) -> None:
        outputs = self.objective.model(inputs.to(self.objective.precision) if inputs.is_floating_point() else inputs)
        likelihood, scale = self._known
        optimizer.observe(outputs, likelihood, scale=scale)
        losses = torch.vmap(self.objective.example_loss)(outputs, targets)
        (losses.mean() * weight).backward()

    # -- what it does -----------------------------------------------------------------------------------------------

    def inverse(self, held: Held, damping: float) -> Tensor:
        """What exponent 1 applies to a unit's gradient, as a matrix in the order of its parameters, ``[numel, numel]``.

        Raises:
            ValueError: where the damped blocks are singular.
        """
        recipe, state = self._solved(held, 1.0, damping)
        shape = held.unit.layout.shape
        numel = math.prod(shape)
        if held.block.elementwise:
            ones = [torch.ones(shape, dtype=self.objective.precision)]
            dense = held.block.apply(state, ones, recipe, 1.0, held.scale)[0].flatten().diag()
        else:
            units = torch.eye(numel, dtype=self.objective.precision).view(numel, *shape)

            def direction(unit: Tensor) -> Tensor:
                return held.block.apply(state, unit[None], recipe, 1.0, held.scale)[0]

            dense = torch.vmap(direction, chunk_size=max(1, _WORK // (8 * numel)))(units).reshape(numel, numel).mT
        order = held.order()
        return dense[order][:, order]

    def direction(self, held: Held, damping: float, gradient: Tensor) -> Tensor:
        """What the recipe's own exponent makes of a gradient, ``[numel]`` in the order of the unit's parameters."""
        exponent = float(held.recipe.root.exponent)
        recipe, state = self._solved(held, exponent, damping)
        operand = torch.empty_like(gradient)
        operand[held.order()] = gradient
        batch = operand.view(1, *held.unit.layout.shape)
        applied: Any
        if held.block.elementwise:
            applied = held.block.apply(state, [batch[0]], recipe, exponent, held.scale)[0]
        else:
            applied = held.block.apply(state, batch, recipe, exponent, held.scale)
        direction: Tensor = applied.flatten()[held.order()]
        return direction

    def _solved(self, held: Held, exponent: float, damping: float) -> tuple[Recipe, State]:
        """A recipe with an absolute damping, and state whose roots are of it."""
        absolute = replace(held.recipe.damping, value=damping, relative_to=None, floor=0.0, outside=False)
        recipe = replace(held.recipe, root=Root(exponent, absolute))
        state = {
            name: [one.clone() for one in value] if isinstance(value, list) else value.clone()
            for name, value in held.state.items()
        }
        roots.refresh(list(held.block.roots(state, recipe, held.scale)))
        kept = sum(int(torch.as_tensor(state[name]).sum()) for name in state if name.startswith("kept"))
        if kept or any(not bool(torch.isfinite(one).all()) for one in _tensors(state)):
            raise ValueError(
                f"damping={damping:g}: {kept or 'some'} blocks of {held.unit.name} under {held.recipe.partition} are "
                "singular; take a larger damping"
            )
        return recipe, state

    # -- what it costs ----------------------------------------------------------------------------------------------

    def bytes(self, held: Held, role: str) -> int:
        """Bytes of a unit's state of one role: ``"statistics"`` or ``"roots"``."""
        roles = held.block.spec()
        mine = {name: value for name, value in held.state.items() if roles[name].role == role}
        return sum(one.numel() * one.element_size() for one in _tensors(mine))

    def times(self, held: Held, damping: float) -> Times:
        """Seconds of one unit's work, alone and unbatched."""
        recipe, state = self._solved(held, float(held.recipe.root.exponent), damping)
        gradient = torch.randn(1, *held.unit.layout.shape, dtype=self.objective.precision)
        operand: Any = [gradient[0]] if held.block.elementwise else gradient
        exponent = float(recipe.root.exponent)
        return Times(
            self._times[held.unit.lead]
            if recipe.moment.listens
            else self._least(lambda: held.block.update(state, operand, 1.0, 0.0)),
            self._least(lambda: roots.refresh(list(held.block.roots(state, recipe, held.scale)))),
            self._least(lambda: held.block.apply(state, operand, recipe, exponent, held.scale)),
        )

    def _least(self, work: Callable[[], Any]) -> float:
        return min(_seconds(work) for _ in range(self.repeats + 1))


class _Timed:
    """Counts the seconds that an ear spends with its block."""

    def __init__(self, ear: Ear) -> None:
        self._ear, self._block, self._seconds = ear, ear.block, 0.0
        ear.block = self  # type: ignore[assignment]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._block, name)

    def collect(self, *arguments: Any) -> None:
        """What a block collects, timed."""
        self._seconds += _seconds(lambda: self._block.collect(*arguments))

    def stop(self) -> float:
        """Give the ear its block back; returns the seconds."""
        self._ear.block = self._block
        return self._seconds


def _seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _tensors(state: State) -> list[Tensor]:
    return [one for value in state.values() for one in (value if isinstance(value, list) else [value])]
