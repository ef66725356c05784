"""Checks of settings, and settings that are callables of the step (0, 1, 2, …)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from fractions import Fraction
from typing import Any, TypedDict, TypeVar

from torch import Tensor

Number = float | Callable[[int], float]
T = TypeVar("T")


class Flags(TypedDict, total=False):
    """Torch's flags, which every method takes, see :class:`~curvlib.optimizer.CurvatureOptimizer`."""

    foreach: bool | None
    fused: bool | None
    capturable: bool
    differentiable: bool


_REFUSED = {
    "fused": "there is no fused kernel; the step is batched over parameters as it is",
    "capturable": "a step decides on the host what is due, which a CUDA graph would not do again",
    "differentiable": "a step is taken under no_grad",
}


def check_number(name: str, value: Any, *, low: float = 0.0, high: float = math.inf, strict: bool = False) -> None:
    """Refuse what is no number of ``[low, high)``, or of ``(low, high)`` if ``strict``; callables pass.

    Raises:
        ValueError: naming the parameter, the value and what is allowed.
    """
    if callable(value):
        return
    allowed = f"a number {'above' if strict else 'from'} {low:g}" + (f" and below {high:g}" if high < math.inf else "")
    number = isinstance(value, (int, float, Fraction)) and not isinstance(value, bool)
    if not number or not (low < value if strict else low <= value) or not value < high:
        raise ValueError(f"{name} must be {allowed}, got {value!r}")


def check_choice(name: str, value: Any, allowed: Sequence[Any]) -> None:
    """Refuse what is not among the allowed values.

    Raises:
        ValueError: naming the parameter, the value and what is allowed.
    """
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def check_period(name: str, value: Any) -> None:
    """Refuse what is no whole number of steps from 1.

    Raises:
        ValueError: naming the parameter, the value and what is allowed.
    """
    if not callable(value) and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise ValueError(f"{name} must be a whole number of steps from 1, got {value!r}")


def check_count(name: str, value: Any) -> None:
    """Refuse what is no whole number from 1.

    Raises:
        ValueError: naming the parameter, the value and what is allowed.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number from 1, got {value!r}")


def check_group(group: Mapping[str, Any]) -> None:
    """Refuse a parameter group that no method can take.

    Raises:
        ValueError: naming the parameter or the setting, and what is allowed.
    """
    for name, parameter in zip(group.get("param_names", group["params"]), group["params"], strict=True):
        label = name if isinstance(name, str) else f"of shape {list(parameter.shape)}"
        if parameter.is_complex():
            raise ValueError(f"parameter {label} is complex; optimize torch.view_as_real of it instead")
    for flag in Flags.__annotations__:
        check_choice(flag, group[flag], (None, False, True))
        if group[flag] and flag in _REFUSED:
            raise ValueError(f"{flag}=True is not supported: {_REFUSED[flag]}; leave it out")
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr must be a number or a tensor of one, got a tensor of shape {list(lr.shape)}")
    check_number("lr", lr.item() if isinstance(lr, Tensor) else lr)
    check_number("weight_decay", group["weight_decay"])
    for place, beta in enumerate(group.get("betas", ())):
        check_number(f"betas[{place}]", beta, high=1.0)
    if not isinstance(group["reduction"], str):
        check_number("reduction", group["reduction"], strict=True)
    else:
        check_choice("reduction", group["reduction"], ("mean", "sum"))


def number(value: Number | Fraction) -> float:
    """A setting that has been resolved, as a float."""
    return float(value)  # type: ignore[arg-type]


def period(value: int | Callable[[int], int]) -> int:
    """A period that has been resolved."""
    assert isinstance(value, int)
    return value


def resolve(thing: T, step: int) -> T:
    """A dataclass with every callable number replaced by its value at a step, and checked again.

    Dataclasses in it, and in tuples of it, are resolved too. Predicates of routes and block classes are no numbers and stay.
    """
    changes: dict[str, Any] = {}
    for entry in fields(thing):  # type: ignore[arg-type]
        value = getattr(thing, entry.name)
        if is_dataclass(value) and not isinstance(value, type):
            resolved = resolve(value, step)
            if resolved is not value:
                changes[entry.name] = resolved
        elif isinstance(value, tuple):
            parts = tuple(resolve(one, step) if is_dataclass(one) else one for one in value)
            if any(part is not one for part, one in zip(parts, value, strict=True)):
                changes[entry.name] = parts
        elif callable(value) and not isinstance(value, type) and entry.name != "where":
            changes[entry.name] = value(step)
    return replace(thing, **changes) if changes else thing  # type: ignore[type-var]
