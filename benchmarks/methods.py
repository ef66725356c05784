"""Methods by their names: of the roster, of other people's modules, or one of these under a label."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

import curvlib

from .naming import UnknownName, imported, nearest
from .roster import METHODS, Method, MethodError

__all__ = [
    "METHODS",
    "Method",
    "MethodError",
    "check_titles",
    "label",
    "memory",
    "method",
    "module_of",
    "named",
    "origin",
    "title_of",
]


def label(name: str) -> str:
    """What a method is called in a study: what stands before ``=`` in its name, or all of it."""
    return name.partition("=")[0]


def title_of(name: str) -> str:
    """What a method is called in tables and figures, also where it is not installed here."""
    return METHODS[name].title if name in METHODS else label(name)


def method(name: str) -> Method:
    """A method by its name.

    Args:
        name: one of :data:`METHODS`; ``module:Name`` of a torch optimizer, of a function from a model and settings to one, or
            of a :class:`Method`; or ``Label=`` and one of these, to have it several times under several settings.

    Raises:
        UnknownName, MethodError: where there is none.
    """
    if name in METHODS:
        return METHODS[name]
    if "=" in name:
        known, _, other = name.partition("=")
        if not known.strip() or not other:
            raise MethodError(f"method {name!r} is no Label=METHOD; give {known.strip() or 'Label'}={other or 'adam'}")
        return replace(method(other), name=name, title=known, settings={})
    if ":" not in name:
        raise UnknownName(
            f"unknown method {name!r}{nearest(name, METHODS)} there are {', '.join(METHODS)}; others are given as "
            "module:Class, such as torch.optim:AdamW"
        )
    found = imported(name)
    if isinstance(found, Method):
        return replace(found, name=name)
    if inspect.isclass(found) and not issubclass(found, curvlib.CurvatureOptimizer):
        if not issubclass(found, torch.optim.Optimizer):
            raise MethodError(f"{name} is a class, but no torch.optim.Optimizer")
        takes_parameters: Callable[..., torch.optim.Optimizer] = found

        def build(model: nn.Module, **settings: Any) -> torch.optim.Optimizer:
            """Other packages' optimizers take parameters."""
            return takes_parameters(model.parameters(), **settings)
    elif callable(found):
        build = found
    else:
        raise MethodError(f"{name} is no optimizer, function or Method, but {type(found).__name__}")
    return Method(name, name, build)


def named(name: str) -> Method | None:
    """What of the roster a name stands for, also under a label; none for what lies elsewhere."""
    return METHODS.get(name.rpartition("=")[2])


def origin(name: str) -> Callable[..., Any] | None:
    """The class or function that makes a method, whatever its label is; none where it cannot be imported here."""
    if (known := named(name)) is not None:
        return known.build
    try:
        found = imported(name.rpartition("=")[2])
    except UnknownName:
        return None
    return found.build if isinstance(found, Method) else found


def check_titles(names: Sequence[str]) -> None:
    """Refuse methods that tables could not tell apart, and a label that is what another method is called.

    Raises:
        MethodError: naming the label.
    """
    titles: dict[str, str] = {}
    for name in names:
        title = title_of(name)
        if title in titles:
            raise MethodError(f"{titles[title]} and {name} are both called {title!r}; give one of them another label")
        titles[title] = name
        other = next((one for one in METHODS.values() if title in (one.name, one.title)), None)
        if other is not None and _kind(origin(name)) != _kind(other.build):
            raise MethodError(f"{title!r} is what {other.name} is called, not {name}; give it another label")


def _kind(made: Callable[..., Any] | None) -> str:
    """What tells methods apart for their labels: torch's Adam may be called Adam, too."""
    return getattr(made, "__name__", "")


def module_of(name: str) -> str:
    """The module that a method comes from, or nothing for the named ones."""
    outside = name.partition("=")[2] or name
    return outside.partition(":")[0] if ":" in outside else ""


def memory(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of an optimizer's state: what it says, or the tensors of ``state``."""
    if isinstance(optimizer, curvlib.CurvatureOptimizer):
        return sum(optimizer.memory().values())
    tensors = (value for record in optimizer.state.values() for value in record.values())
    return sum(value.numel() * value.element_size() for value in tensors if isinstance(value, torch.Tensor))
