"""Hooks: how a layer's call is caught, without a trace in copies of the model."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

FORWARD = -1  # the graph task of what runs outside any backward pass


class Listener(Protocol):
    """Whoever wants to know of a layer's calls."""

    def called(self, module: nn.Module, value: Tensor, output: Tensor) -> None:
        """A layer was called under grad."""


class _Saved(torch.autograd.Function):
    """Keeps a tensor as autograd keeps it: under checkpointing it is computed again when it is asked for."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(value)
        return anchor.new_empty(0)


def save(value: Tensor) -> Tensor:
    """What holds a tensor: the result of a node, which some versions of torch empty when nothing refers to its result."""
    anchor = torch.zeros((), requires_grad=True)
    result: Tensor = _Saved.apply(anchor, value)
    return result


def saved(result: Tensor) -> Tensor:
    """The tensor that is held."""
    node: Any = result.grad_fn
    held: Tensor = node.saved_tensors[0]
    return held


def graph_task() -> int:
    """The number of the backward pass that runs now, or :data:`FORWARD`."""
    return torch._C._current_graph_task_id()


def _silent(*_: Any) -> None:
    """What a copied or unpickled hook does."""


def _muted() -> Callable[..., None]:
    return _silent


class Hook:
    """The forward hook of one layer; a copy of the model has a silent one, so that nothing is copied or heard with it."""

    def __init__(self, taps: Listener) -> None:
        self._taps = weakref.ref(taps)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Pass the call on, if it is under grad."""
        taps = self._taps()
        if taps is None or torch._C._are_functorch_transforms_active():
            return
        if torch.is_grad_enabled() and isinstance(output, Tensor) and output.requires_grad:
            taps.called(module, args[0] if args else next(iter(kwargs.values())), output)

    def __deepcopy__(self, memo: Any) -> Callable[..., None]:
        return _silent

    def __reduce__(self) -> Any:
        return _muted, ()
