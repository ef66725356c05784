"""Taps: what hooks hear of a model's layers, under accumulation, checkpointing, autocast, masks and repeated calls.

One forward hook on a layer saves its input, as autograd would, and registers one hook on its output; that one fires in
the backward pass, once, with the output's gradient. Together they are a :class:`~curvlib.signals.Signal`, which is summed
into the statistics of the layer's parameters at once, or when all calls of the layer have been heard.

What is heard is dropped like gradients: what comes after ``zero_grad`` replaces what came before it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from .blocks import State, Sums, block_for
from .ears import Ear, TapError
from .hooks import FORWARD, Hook, graph_task, save, saved
from .layers import Reading
from .phases import phase
from .precision import full_precision
from .recipe import Recipe
from .signals import Index, Signal
from .units import Unit


@dataclass(frozen=True)
class Declared:
    """What was told of a forward pass: its examples, and a mask ``[examples, ...]`` of what is no padding."""

    examples: int
    mask: Tensor | None


class Taps:
    """The hooks of one optimizer on one model."""

    def __init__(self) -> None:
        self.ears: dict[Tensor, Ear] = {}
        self._layers: dict[nn.Module, list[tuple[Ear, Reading]]] = {}
        self._handles: dict[nn.Module, Any] = {}
        self._edges: list[GradientEdge] = []
        self._batches: dict[int, tuple[int, str]] = {}
        self._declared: dict[int, Declared] = {}
        self._forward = 0  # how many forward passes were observed
        self._seed: int | None = None  # the number of the seed that is pulled back now
        self._labels = "data"  # whose gradients are coming
        self._paused = False
        self.repeating = False  # whether this is the second pass of a step
        self._stale = False  # whether gradients were dropped since training's backward passes were heard
        self._outdated = False  # the same of what was observed
        self._doubted = False  # whether a closure may have dropped gradients behind our back
        self.awaited = False  # whether the backward pass of what was observed last is still to come
        self._suspended = False  # whether gradients were dropped while it was
        self.observed = 0  # how often since the last step
        self.shared: dict[Tensor, str] = {}  # leads whose layers see no single examples, and why
        self.count_always = False
        self.examples: float | Tensor = 0.0

    # -- who listens --------------------------------------------------------------------------------------------------

    def listen(self, units: Iterable[tuple[Unit, Recipe]], readings: Mapping[Tensor, Sequence[Reading]]) -> None:
        """Put hooks on the layers of these units, and take them off all others."""
        ears: dict[Tensor, Ear] = {}
        self._layers = {}
        for unit, recipe in units:
            block = block_for(unit.layout, recipe, bool(unit.operand.joined))
            if block is None:
                continue
            old = self.ears.get(unit.lead)
            ear = Ear(unit, recipe, block, readings[unit.lead])
            if old is not None and old.unit.layout == unit.layout:
                ear.sums, ear.ever, ear.calls, ear.due, ear.scale = old.sums, old.ever, old.calls, old.due, old.scale
            ears[unit.lead] = ear
            for reading in ear.readings:
                self._layers.setdefault(reading.module, []).append((ear, reading))
        self.ears = ears
        for module in [module for module in self._handles if module not in self._layers]:
            self._handles.pop(module).remove()
        for module in self._layers:
            if module not in self._handles:
                self._handles[module] = module.register_forward_hook(Hook(self), with_kwargs=True)

    def close(self) -> None:
        """Take all hooks off."""
        for handle in self._handles.values():
            handle.remove()
        self._handles, self._layers, self.ears = {}, {}, {}

    @property
    def pausing(self) -> bool:
        """Whether nothing is heard now."""
        return self._paused

    @property
    def silent(self) -> bool:
        """Whether nothing was heard or observed since the last step."""
        return not self.observed and all(ear.sums is None and not ear.waiting for ear in self.ears.values())

    def nbytes(self) -> int:
        """Bytes in which signals are summed up."""
        kept = [sums for ear in self.ears.values() for sums in (ear.sums, ear.spare) if sums is not None]
        return sum(value.numel() * value.element_size() for sums in kept for value in sums.tensors.values())

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Hear nothing for a while."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    @contextmanager
    def again(self) -> Iterator[None]:
        """Hear the same batch once more, for those who asked for it."""
        self.settle()
        self.repeating = True
        for ear in self.ears.values():
            ear.again = True
        try:
            yield
        finally:
            self.settle()
            self.repeating = False
            for ear in self.ears.values():
                ear.again = False

    def _hears(self, ear: Ear) -> bool:
        return ear.due and (ear.block.again or not self.repeating)

    def expect(self, due: Mapping[Tensor, tuple[int, bool, State]]) -> None:
        """Say how many steps each lead parameter has taken, whether its statistics are due at the next, and what it holds."""
        for lead, ear in self.ears.items():
            ear.step, ear.due, ear.held = due.get(lead, (0, True, {}))

    # -- what is heard ------------------------------------------------------------------------------------------------

    def called(self, module: nn.Module, value: Tensor, output: Tensor) -> None:
        """A layer was called: hear the gradient of its output."""
        ears = [ear for ear, _ in self._layers.get(module, ()) if self._hears(ear) and ear.trains()]
        if self._paused or not (ears or self.count_always):
            return
        born = graph_task()
        if born == FORWARD:
            for ear in ears:
                ear.calls += 1
            if any(ear.recipe.moment.labels != "data" for ear in ears):
                self._edges.append(get_gradient_edge(output))
        # What is computed again in a backward pass belongs to the forward pass that was observed before it.
        forward = self._forward if born == FORWARD else self._forward - 1
        holder, taps = save(value), weakref.ref(self)

        def hear(delta: Tensor) -> None:
            mine = taps()
            if mine is not None and not mine._paused:
                with phase("statistics"):
                    mine._hear(module, holder, born, delta, mine._declared.get(forward))

        output.register_hook(hear)

    @torch.no_grad()
    def _hear(self, module: nn.Module, holder: Tensor, born: int, delta: Tensor, told: Declared | None) -> None:
        seeded = self._seed is not None
        number = graph_task() if born == FORWARD else born
        self._begin(number)
        for ear, reading in self._layers.get(module, ()):
            if not self._hears(ear) or ear.recipe.moment.labels != self._labels:
                continue
            with full_precision():
                signal = self._signal(ear, reading, saved(holder), delta, number, told)
                if signal is None:
                    continue
                ear.waiting.setdefault(number, []).append(signal)
                heard = len(ear.waiting[number])
                if born == FORWARD and heard >= ear.calls:
                    ear.take(bool(self._seed))
                    ear.calls = ear.calls if seeded else 0
        if self.count_always and not seeded:
            self._count(number, delta.shape[0] if told is None else told.examples, "")

    def _begin(self, number: int) -> None:
        """A backward pass begins."""
        self.renew()
        # A unit whose earlier pass is over will hear no more of it.
        for ear in self.ears.values():
            if ear.waiting and number not in ear.waiting:
                ear.take(bool(self._seed))

    def _count(self, number: int, examples: int, name: str) -> None:
        if number not in self._batches:
            self._batches[number] = (examples, name)
            self.examples = self.examples + (examples if self._seed is None else 0)

    def _signal(
        self, ear: Ear, reading: Reading, value: Tensor, delta: Tensor, number: int, told: Declared | None
    ) -> Signal | None:
        """The signal of one call, in the axes of its unit; none of what all examples share."""
        operand, tap = ear.unit.operand, reading.tap
        sources = operand.named(reading.sources)
        try:
            out = tap.read_output(reading.module, delta)
            given = tap.read_input(reading.module, value) if len(sources) > 1 else None
            out = out.reshape(*out.shape[:2], *(operand.sizes[axis] for axis in sources[0]))
            where = given.where if isinstance(given, Index) else given
            if where is not None and where.shape[:2] != out.shape[:2]:
                raise ValueError(
                    f"has inputs of {list(where.shape[:2])} examples and positions, outputs of {list(out.shape[:2])}"
                )
        except (ValueError, RuntimeError) as error:
            raise TapError(f"layer {reading.name} ({type(reading.module).__name__}) {error}") from error
        chosen = isinstance(given, Index) and value.ndim <= 1
        examples = self._batch(reading.name, out.shape[0], number, told, chosen)
        if examples is None:
            first, _ = self._batches[number]
            self.shared[ear.unit.lead] = f"{reading.name} is called with a batch of {out.shape[0]} for {first} examples"
            return None
        constant: float | None = None
        if isinstance(given, Tensor):
            given = given.reshape(*given.shape[:2], *(operand.sizes[axis] for axis in sources[1]))
            if operand.joined:
                constant = 1.0 if reading.bias is ear.unit.parameters[1] else 0.0
                given = given.flatten(given.ndim - len(operand.joined))
        axes = ear.unit.layout_axes(sources)
        signal = Signal(out, axes[0], given, axes[1] if len(axes) > 1 else (), constant=constant)
        if examples != out.shape[0]:
            signal = signal._map(lambda one: one.unflatten(0, (examples, -1)).flatten(1, 2))
        return signal if told is None else replace(signal, weight=_weight(reading.name, signal, told.mask))

    def _batch(self, name: str, n: int, number: int, told: Declared | None, chosen: bool) -> int | None:
        """The examples behind a call, of which a layer may hold several rows each.

        ``None`` where the layer sees what all examples share, such as the positions of a sequence.

        Args:
            name: the layer's.
            n: its batch.
            number: of the backward pass.
            told: what was observed.
            chosen: whether it sees a list of indices without another dimension, which are rows of no example.

        Raises:
            TapError: where it can't be told.
        """
        self._count(number, n if told is None else told.examples, name)
        first, other = self._batches[number]
        if n == first:
            return n
        if chosen or (n % max(1, first) and first % max(1, n)):
            return None
        if told is None or n < first:
            whose = f"layer {other} one" if told is None else "the outputs one"
            raise TapError(
                f"layer {name} has a batch of {n}, {whose} of {first}: call optimizer.observe(outputs) before backward, "
                "whose first dimension tells the examples; a layer may then hold several rows of each, but not one row of "
                "several"
            )
        return first

    # -- observing ----------------------------------------------------------------------------------------------------

    def declare(self, outputs: Tensor, mask: Tensor | None) -> None:
        """Tell the examples of the last forward pass, and which of their positions count."""
        self._declared[self._forward] = Declared(outputs.shape[0], mask)
        self._forward += 1

    def asks(self, labels: str) -> bool:
        """Whether statistics of such labels are due."""
        return any(ear.due and ear.recipe.moment.labels == labels for ear in self.ears.values())

    def pull(self, outputs: Tensor, seeds: Iterator[Tensor], labels: str) -> None:
        """Pull seeds back through the network and hear what they say; no gradient is changed.

        Raises:
            TapError: where the layers are not in the graph of the outputs.
        """
        self.renew()
        ears = [ear for ear in self.ears.values() if ear.due and ear.recipe.moment.labels == labels]
        edges = self._edges
        if not edges or not outputs.requires_grad:
            raise TapError(_unheard([ear.unit.name for ear in ears]))
        self._labels = labels
        try:
            for self._seed, seed in enumerate(seeds):
                torch.autograd.grad(outputs, edges, seed.to(outputs.dtype), retain_graph=True, allow_unused=True)
                for ear in ears:
                    ear.take(bool(self._seed))
        except RuntimeError as error:
            if "use_reentrant" in str(error):
                raise TapError(
                    "labels='sampled' and 'exact' pull back through the network, which checkpointing with "
                    "use_reentrant=True forbids; use use_reentrant=False, or labels='data'"
                ) from error
            raise
        finally:
            self._seed, self._labels = None, "data"
            for ear in ears:
                ear.calls, ear.waiting = 0, {}
            if not any(ear.calls for ear in self.ears.values() if ear.recipe.moment.labels != "data"):
                self._edges = []
        self.observed += 1

    def wait(self, value: Tensor) -> None:
        """Something was observed that counts with the gradient of this tensor, which is to come."""
        self.awaited, self._suspended, taps = True, False, weakref.ref(self)

        def arrived(_: Tensor) -> None:
            mine = taps()
            if mine is not None and not mine._paused:
                mine.awaited = False

        if value.requires_grad:
            value.register_hook(arrived)

    def wake(self) -> None:
        """Hear again, where an interrupt kept a pause or a second pass from ending."""
        self._paused = self.repeating = False
        self._seed, self._labels = None, "data"
        for ear in self.ears.values():
            ear.again = False

    def zeroed(self) -> None:
        """Gradients were dropped: what was heard goes when something new comes, but for what waits for its gradient."""
        self._stale = self._stale or not self._paused
        self._outdated = self._outdated or not (self._paused or self.awaited)
        self._suspended = self._suspended or (self.awaited and not self._paused)

    @property
    def abandoned(self) -> bool:
        """Whether what was observed last before gradients were dropped still waits for its own."""
        return self._suspended and self.awaited

    def abandon(self) -> None:
        """Wait no longer."""
        self.awaited, self._outdated = False, True

    def doubt(self) -> None:
        """A closure is about to be evaluated, which may drop gradients without saying so."""
        self._doubted = any(ear.sums is not None or ear.waiting for ear in self.ears.values())

    def renew(self) -> None:
        """What comes after gradients were dropped replaces what came before."""
        if self._doubted and not any(ear.graded() for ear in self.ears.values()):
            self.zeroed()
        self._doubted = False
        if self._stale or self._outdated:
            self.forget()

    def forget(self) -> None:
        """Drop what belongs to dropped gradients; calls whose backward pass is to come are still heard."""
        for ear in self.ears.values():
            if self._stale if ear.recipe.moment.labels == "data" else self._outdated:
                ear.drop()
        if self._stale:
            self._batches, self.examples = {}, 0.0
        if self._outdated:
            self.observed = 0
        self._stale = self._outdated = False

    def settle(self) -> None:
        """A step is over: drop everything."""
        self._stale = self._outdated = True
        self.forget()
        self.awaited = self._doubted = False
        self._edges, self._declared = [], {}
        for ear in self.ears.values():
            ear.calls = 0

    def heard(
        self, active: Iterable[Unit], totals: Callable[[Sequence[float | Tensor]], Sequence[float]] | None = None
    ) -> dict[Unit, Sums]:
        """What each unit heard since the last step.

        Args:
            active: the units that have a gradient.
            totals: from the numbers of examples heard here to those heard on all ranks, where layers may be called on some
                ranks only; what others heard is empty here.

        Raises:
            TapError: where statistics are due and a layer was never heard, or all are silent.
        """
        mine = [self.ears[unit.lead] for unit in active if unit.lead in self.ears]
        mine = [ear for ear in mine if ear.due]
        asks = [ear for ear in mine if ear.recipe.moment.labels != "data"]
        if asks and not self.observed:
            raise TapError(
                f"labels={asks[0].recipe.moment.labels!r}: statistics are due at this step and nothing was observed; call "
                "optimizer.observe(outputs, likelihood=...) between the forward pass and loss.backward()"
            )
        for ear in mine:
            ear.take(False)
        if totals is not None and mine:
            everywhere = totals([0.0 if ear.sums is None else ear.sums.examples for ear in mine])
            for ear, total in zip(mine, everywhere, strict=True):
                ear.ever = ear.ever or total > 0
                if ear.sums is None and total > 0:
                    ear.sums = ear.empty()
                    ear.sums.zeroed_()
        missing = [ear.unit.name for ear in mine if ear.sums is None]
        if missing and (len(missing) == len(mine) or any(not ear.ever for ear in mine if ear.sums is None)):
            raise TapError(_unheard(missing))
        return {ear.unit: ear.sums for ear in mine if ear.sums is not None}


def _weight(name: str, signal: Signal, mask: Tensor | None) -> Tensor | None:
    """Which positions of a signal count."""
    if mask is None:
        return None
    n, t = signal.delta.shape[:2]
    if mask.ndim == 1:
        return mask[:, None].expand(n, t)
    mask = mask.flatten(1)
    if mask.shape[1] == t:
        return mask
    if t == 1:
        return mask.any(1, keepdim=True)
    raise TapError(f"the mask has {mask.shape[1]} positions, layer {name} has {t}; route it to a gradient's moment")


def _unheard(names: Sequence[str]) -> str:
    return (
        f"nothing was heard of {', '.join(names[:8])}{' …' if len(names) > 8 else ''}, although statistics are due. Its "
        "layer must be called as a module, under grad, after the optimizer was attached: attach before the first call of a "
        "compiled model (and without fullgraph=True), do not pass weights to functional calls or torch.func, and use "
        "checkpointing with use_reentrant=False if you call observe. Otherwise route it to a recipe with of='gradient'"
    )
