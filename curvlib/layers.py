"""What a layer's parameters are called: the axes of every parameter, and how a weight and its bias form one operand.

Axes have names because layers name them: ``o i`` for a linear weight, ``o i k1 k2`` for a convolution's. A parameter
without a known module gets the same names by its rank, so that a recipe means the same with and without its model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

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
    """

    name: str
    axes: Mapping[str, str]
    sizes: Callable[[Any], Sizes] = field(default=lambda module: {})
    inputs: tuple[str, ...] = ("i", "k...")


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


def split_axes(axes: str, shape: Iterable[int], known: Mapping[str, int] | None = None) -> Sizes:
    """Name the axes of a shape: ``("(head d) i", (12, 5), {"head": 3})`` gives ``{"head": 3, "d": 4, "i": 5}``.

    Raises:
        ValueError: when names and dimensions do not fit, with both.
    """
    shape, known = tuple(shape), dict(known or {})
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


_KINDS: dict[type, Callable[[Any], LayerKind]] = {}


def register_layer(module: type[nn.Module], kind: LayerKind | Callable[[Any], LayerKind]) -> None:
    """Teach the library a layer kind; subclasses inherit it, and a later registration wins.

    Args:
        module: the module class.
        kind: its kind, or a function of the module where axes depend on the instance.
    """
    _KINDS[module] = kind if callable(kind) else lambda _: kind


def kind_of(module: nn.Module) -> LayerKind | None:
    """The registered kind of a module, by its class or the nearest base class."""
    for base in type(module).__mro__:
        if base in _KINDS:
            return _KINDS[base](module)
    return None


def _conv(module: Any) -> LayerKind:
    if module.groups == 1:
        first, bias = ("i o", "o") if module.transposed else ("o i", "o")
    else:
        first, bias = ("(g i) o", "(g o)") if module.transposed else ("(g o) i", "(g o)")
    return LayerKind("conv", {"weight": f"{first} k...", "bias": bias}, lambda layer: {"g": layer.groups})


_NORM = LayerKind("norm", {"weight": "c k...", "bias": "c k..."}, inputs=())
for _module, _kind in {
    nn.Linear: LayerKind("linear", {"weight": "o i", "bias": "o"}),
    nn.Embedding: LayerKind("embedding", {"weight": "v d"}, inputs=()),
    nn.EmbeddingBag: LayerKind("embedding", {"weight": "v d"}, inputs=()),
    nn.LayerNorm: _NORM,
    nn.RMSNorm: _NORM,
    nn.GroupNorm: _NORM,
    nn.modules.batchnorm._NormBase: _NORM,
}.items():
    register_layer(_module, _kind)
register_layer(nn.modules.conv._ConvNd, _conv)


def bare_slot(parameter: Tensor, name: str) -> Slot:
    """The slot of a parameter whose module is unknown: names by rank."""
    kind, axes = _BARE.get(parameter.ndim, ("conv", "o i k..."))
    return Slot(name, kind, "parameter", split_axes(axes, parameter.shape), parameter.ndim)


def describe(model: nn.Module) -> dict[Tensor, Slot]:
    """Every parameter of a model with its slot; a parameter that several modules share keeps its first name."""
    slots: dict[Tensor, Slot] = {}
    for module_name, module in model.named_modules():
        kind = kind_of(module)
        own = dict(module.named_parameters(recurse=False))
        for role, parameter in own.items():
            if parameter in slots:
                continue
            name = f"{module_name}.{role}" if module_name else role
            axes = kind.axes.get(role) if kind else None
            if kind is None or axes is None:
                bare = bare_slot(parameter, name)
                place = (type(module), module_name)
                slots[parameter] = Slot(name, bare.kind, "parameter", bare.sizes, parameter.ndim, (), *place)
                continue
            sizes = split_axes(axes, parameter.shape, _relevant(kind.sizes(module), axes))
            inputs = tuple(axis for axis in sizes if _named(axis, kind.inputs))
            bias = own.get("bias") if role == "weight" else None
            slots[parameter] = Slot(
                name, kind.name, role, sizes, parameter.ndim, inputs, type(module), module_name, bias
            )
    return slots


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
    """

    parameters: tuple[Tensor, ...]
    sizes: Sizes
    joined: tuple[str, ...] = ()

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
