"""What a layer's parameters are called: the axes of every parameter, and how a weight and its bias form one operand.

Axes have names because layers name them: ``o i`` for a linear weight, ``o i k1 k2`` for a convolution's. A parameter
without a known module gets the same names by its rank, so that a recipe means the same with and without its model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from .signals import EMBEDDING_TAP, LINEAR_TAP, NORM_TAPS, Tap, conv_tap

Sizes = dict[str, int]

_SPEC = re.compile(r"\(([^()]*)\)|([A-Za-z_]\w*(?:\.\.\.)?)")
_BARE = {0: ("vector", ""), 1: ("vector", "c"), 2: ("linear", "o i")}


@dataclass(frozen=True)
class LayerKind:
    """What the parameters of a module are called.

    Args:
        name: the kind, by which routes choose: ``linear``, ``conv``, ``embedding``, ``norm``, or one of your own.
        axes: parameter name -> its axes in row-major order, e.g. ``{"weight": "o i", "bias": "o"}``. Brackets split a
            dimension, ``(g o) i``; ``k...`` takes all dimensions left.
        sizes: sizes of split axes that the shape does not tell, from the module, e.g. ``{"g": module.groups}``.
        inputs: the input axes, to which a bias may be joined as one more column.
        tap: how its inputs and output gradients are read; without one its moments are those of the batch gradient.
    """

    name: str
    axes: Mapping[str, str]
    sizes: Callable[[Any], Sizes] = field(default=lambda module: {})
    inputs: tuple[str, ...] = ("i", "k...")
    tap: Tap | None = None


@dataclass(frozen=True, eq=False)
class Slot:
    """One parameter's place: what routes, views and messages know of it.

    Attributes:
        name: dotted name in the model, or ``parameter N`` where nobody named it.
        kind: layer kind; by rank where the module is unknown.
        role: the name that the layer gives it (``weight``, ``bias``), or ``parameter``.
        sizes: axis -> entries, in row-major order.
        inputs: axes to which a bias may be joined.
        module: type of the module that holds it, if known.
        module_name: dotted name of that module.
        ndim: dimensions of the parameter as it is, before axes are split.
        bias: the bias that belongs to this weight, if any.
        silent: why its layer's signals can't be heard; empty where they can.
        sources: the axes that δ carries, and those that the input carries (none for a bias); see :mod:`curvlib.signals`.
        crossed: whether, in words, another layer's signals carry other axes of it.
    """

    name: str
    kind: str
    role: str
    sizes: Sizes
    ndim: int
    inputs: tuple[str, ...] = ()
    module: type | None = None
    module_name: str | None = None
    bias: Tensor | None = None
    silent: str = "its layer is unknown"
    sources: tuple[tuple[str, ...], ...] = ()
    crossed: str = ""


@dataclass(frozen=True, eq=False)
class Reading:
    """One layer that speaks of a parameter.

    Attributes:
        module: the layer.
        name: its dotted name.
        tap: how it is read.
        sources: its axes of δ and of the input, in the names of the parameter's slot.
        bias: its own, if any.
    """

    module: nn.Module
    name: str
    tap: Tap
    sources: tuple[tuple[str, ...], ...]
    bias: Tensor | None = None


def split_axes(axes: str, shape: Iterable[int], known: Mapping[str, int] | None = None) -> Sizes:
    """Name the axes of a shape: ``("(head d) i", (12, 5), {"head": 3})`` gives ``{"head": 3, "d": 4, "i": 5}``.

    Raises:
        ValueError: when names and dimensions do not fit, with both.
    """
    shape, known = tuple(shape), dict(known or {})
    expanded = group_axes(axes, shape)
    sizes: Sizes = {}
    for names, size in zip(expanded, shape, strict=True):
        free = [name for name in names if name not in known]
        given = math.prod(known[name] for name in names if name in known)
        if len(free) > 1 or (given and size % given) or (not free and given != size):
            raise ValueError(
                f"axes ({' '.join(names)}) do not split a dimension of {size}; known sizes: {known or 'none'}"
            )
        for name in names:
            if name in sizes:
                raise ValueError(f"axis {name!r} stands twice in axes {axes!r}")
            sizes[name] = known[name] if name in known else size // given
    return sizes


def group_axes(axes: str, shape: Sequence[int]) -> list[list[str]]:
    """The names of each dimension: ``"(head d) i"`` gives ``[["head", "d"], ["i"]]``.

    Raises:
        ValueError: when their number does not fit.
    """
    groups = [match[1].split() if match[1] is not None else [match[2]] for match in _SPEC.finditer(axes)]
    rest = len(shape) - len(groups) + 1
    expanded: list[list[str]] = []
    for names in groups:
        if len(names) == 1 and names[0].endswith("..."):
            expanded += [[f"{names[0][:-3]}{number}"] for number in range(1, rest + 1)]
        else:
            expanded.append(names)
    if len(expanded) != len(shape):
        raise ValueError(f"axes {axes!r} name {len(expanded)} dimensions, the shape {list(shape)} has {len(shape)}")
    return expanded


_KINDS: dict[type, Callable[[Any], LayerKind]] = {}


def register_layer(module: type[nn.Module], kind: LayerKind | type[nn.Module] | Callable[[Any], LayerKind]) -> None:
    """Teach the library a layer kind; subclasses inherit it, and a later registration wins.

    A subclass with a forward of its own inherits its axes, but is not listened to: it may compute something else.

    Args:
        module: the module class.
        kind: its kind, a known class that computes the same, or a function of the module where axes depend on the instance.

    Raises:
        ValueError: for a class that is not known.
    """
    if isinstance(kind, type):
        known = _registered(kind)
        if known is None:
            raise ValueError(f"kind must be a registered class, got {kind.__name__}")
        _KINDS[module] = _KINDS[known]
    else:
        _KINDS[module] = kind if callable(kind) else lambda _: kind


def kind_of(module: nn.Module) -> LayerKind | None:
    """The registered kind of a module, by its class or the nearest base class."""
    known = _registered(type(module))
    return None if known is None else _KINDS[known](module)


def _registered(kind: type) -> type | None:
    return next((base for base in kind.__mro__ if base in _KINDS), None)


def _computes_as_registered(kind: type) -> bool:
    """Whether the forward of a class is that of the class by which it is known, or torch's."""
    owner = next(base for base in kind.__mro__ if "forward" in vars(base))
    known = _registered(kind)
    return owner.__module__.startswith("torch.nn.") or (known is not None and issubclass(known, owner))


def _conv(module: Any) -> LayerKind:
    if module.groups == 1:
        first, bias = ("i o", "o") if module.transposed else ("o i", "o")
    else:
        first, bias = ("(g i) o", "(g o)") if module.transposed else ("(g o) i", "(g o)")
    return LayerKind(
        "conv", {"weight": f"{first} k...", "bias": bias}, lambda layer: {"g": layer.groups}, tap=conv_tap(module)
    )


for _module, _kind in {
    nn.Linear: LayerKind("linear", {"weight": "o i", "bias": "o"}, tap=LINEAR_TAP),
    nn.Embedding: LayerKind("embedding", {"weight": "v d"}, inputs=(), tap=EMBEDDING_TAP),
    nn.EmbeddingBag: LayerKind("embedding", {"weight": "v d"}, inputs=()),
    **{
        norm: LayerKind("norm", {"weight": "c k...", "bias": "c k..."}, inputs=(), tap=tap)
        for norm, tap in NORM_TAPS.items()
    },
}.items():
    register_layer(_module, _kind)
register_layer(nn.modules.conv._ConvNd, _conv)


def bare_slot(parameter: Tensor, name: str) -> Slot:
    """The slot of a parameter whose module is unknown: names by rank."""
    kind, axes = _BARE.get(parameter.ndim, ("conv", "o i k..."))
    return Slot(name, kind, "parameter", split_axes(axes, parameter.shape), parameter.ndim)


def describe(model: nn.Module) -> dict[Tensor, Slot]:
    """Every parameter of a model with its slot; a parameter that several modules share keeps its first name."""
    return survey(model)[0]


def survey(model: nn.Module) -> tuple[dict[Tensor, Slot], dict[Tensor, list[Reading]]]:
    """Every parameter of a model with its slot, and the layers that speak of it."""
    slots: dict[Tensor, Slot] = {}
    readings: dict[Tensor, list[Reading]] = {}
    unhooked = {child.out_proj for child in model.modules() if isinstance(child, nn.MultiheadAttention)}
    for module_name, module in model.named_modules():
        kind = kind_of(module)
        own = dict(module.named_parameters(recurse=False))
        for role, parameter in own.items():
            name = f"{module_name}.{role}" if module_name else role
            silent, sizes, sources = _heard(module, kind, role, parameter, module in unhooked)
            if parameter not in slots:
                slots[parameter] = _slot(module, module_name, kind, role, parameter, own, name, sizes, silent, sources)
            first = slots[parameter]
            if not silent and list(first.sizes.values()) != list(sizes.values()):
                silent = f"{name} and {first.name} are one parameter whose axes differ"
            if silent or first.silent:
                slots[parameter] = replace(first, silent=first.silent or silent)
                continue
            names = dict(zip(sizes, first.sizes, strict=True))
            mine = tuple(tuple(names[axis] for axis in axes) for axes in sources)
            assert kind is not None
            assert kind.tap is not None
            if mine != first.sources:
                slots[parameter] = replace(first, crossed=f"{name} and {first.name} are tied along different axes")
            readings.setdefault(parameter, []).append(Reading(module, module_name, kind.tap, mine, own.get("bias")))
    return slots, readings


def _heard(
    module: nn.Module, kind: LayerKind | None, role: str, parameter: Tensor, unhooked: bool
) -> tuple[str, Sizes, tuple[tuple[str, ...], ...]]:
    """(why a parameter's signals can't be heard, its axes in this layer, the axes of δ and of the input)."""
    axes = kind.axes.get(role) if kind else None
    if kind is None or axes is None:
        return f"no tap is registered for {type(module).__name__}", {}, ()
    sizes = split_axes(axes, parameter.shape, _relevant(kind.sizes(module), axes))
    if unhooked:
        return "attention applies this projection without calling its layer", sizes, ()
    if kind.tap is None:
        return f"no tap is registered for {type(module).__name__}", sizes, ()
    if not _computes_as_registered(type(module)):
        return f"{type(module).__name__} has a forward of its own; say with register_layer what it computes", sizes, ()
    reason = kind.tap.available(module)
    if reason:
        return reason, sizes, ()
    output = _expanded(kind.tap.output, sizes)
    if role == kind.tap.weight:
        return "", sizes, (output, _expanded(kind.tap.input, sizes))
    if set(output) != set(sizes):
        return f"{role} is not a bias of {type(module).__name__}", sizes, ()
    return "", sizes, (output,)


def _expanded(axes: str, sizes: Sizes) -> tuple[str, ...]:
    return tuple(name for axis in axes.split() for name in sizes if _named(name, [axis]))


def _slot(
    module: nn.Module,
    module_name: str,
    kind: LayerKind | None,
    role: str,
    parameter: Tensor,
    own: Mapping[str, Tensor],
    name: str,
    sizes: Sizes,
    silent: str,
    sources: tuple[tuple[str, ...], ...],
) -> Slot:
    place = (type(module), module_name)
    if kind is None or role not in kind.axes:
        bare = bare_slot(parameter, name)
        return replace(bare, module=place[0], module_name=place[1], silent=silent)
    inputs = tuple(axis for axis in sizes if _named(axis, kind.inputs))
    bias = own.get("bias") if role == "weight" else None
    return Slot(name, kind.name, role, sizes, parameter.ndim, inputs, *place, bias, silent, sources)


def _relevant(sizes: Sizes, axes: str) -> Sizes:
    return {name: size for name, size in sizes.items() if name in re.findall(r"\w+", axes)}


def _named(axis: str, patterns: Iterable[str]) -> bool:
    return any(
        axis == pattern or (pattern.endswith("...") and axis.startswith(pattern[:-3]) and axis[-1].isdigit())
        for pattern in patterns
    )


@dataclass(frozen=True, eq=False)
class Operand:
    """What one block structure acts on: a parameter with named axes, or a weight with its bias as one more column.

    Attributes:
        parameters: the weight (or any parameter) first, then a joined bias.
        sizes: the weight's axes, in its row-major order.
        joined: the input axes that a joined bias merges; empty without one.
        renamed: a layer's axis -> what a recipe calls it, or what it splits it into.
    """

    parameters: tuple[Tensor, ...]
    sizes: Sizes
    joined: tuple[str, ...] = ()
    renamed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def named(self, sources: Iterable[Iterable[str]]) -> tuple[tuple[str, ...], ...]:
        """The axes of signals in the names of this operand."""
        return tuple(tuple(new for axis in axes for new in self.renamed.get(axis, (axis,))) for axes in sources)

    @property
    def lead(self) -> Tensor:
        """The first of them."""
        return self.parameters[0]

    @property
    def outputs(self) -> tuple[str, ...]:
        """The axes that a joined bias shares with its weight."""
        return tuple(axis for axis in self.sizes if axis not in self.joined)

    def views(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """Parameters or gradients, each with its named axes as dimensions."""
        shapes = [list(self.sizes.values()), [self.sizes[axis] for axis in self.outputs]]
        return [tensor.view(shape) for tensor, shape in zip(tensors, shapes, strict=False)]

    def windows(self, packed: Tensor) -> list[Tensor]:
        """The places of the parameters in one packed operand ``[*shape]``, with the same dimensions as :meth:`views`."""
        if not self.joined:
            return [packed]
        weight = packed[..., :-1].unflatten(-1, [self.sizes[axis] for axis in self.joined])
        here = (*self.outputs, *self.joined)
        return [weight.permute([here.index(axis) for axis in self.sizes]), packed[..., -1]]
