"""Trainers: how the methods enter Hugging Face's Trainer and timm; nothing of either is imported before it is asked for.

A plain loop, Lightning and accelerate need nothing from here, but for :func:`decay_groups`, see `docs/trainers.md`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import nn

from .layers import register_layer
from .optimizer import CurvatureOptimizer
from .optimizers.catalogue import methods

__all__ = ["decay_groups", "hf_factory", "register_timm"]

_UNDECAYED = re.compile(r"bias|layernorm|rmsnorm|(^|[._])norm(\.|$)")

Build = Callable[..., CurvatureOptimizer]


def decay_groups(model: nn.Module, weight_decay: Any) -> list[dict[str, Any]]:
    """Two parameter groups: what decays, and biases and norms, which do not.

    They hold what is to be trained, told apart by name and by ``nn.LayerNorm`` as Hugging Face's Trainer does. A bias that
    is joined to its weight is preconditioned with the settings of the weight's group, and steps with ``lr`` and decay of
    its own.

    Args:
        model: whose parameters.
        weight_decay: of the first group.
    """
    norms = [name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)]
    decayed: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            spared = _UNDECAYED.search(name.lower()) or any(name.startswith(f"{norm}.") for norm in norms)
            decayed[not spared].append(parameter)
    return [{"params": decayed[True], "weight_decay": weight_decay}, {"params": decayed[False], "weight_decay": 0.0}]


def hf_factory(method: str | type[CurvatureOptimizer], **settings: Any) -> Callable[[], Build]:
    """A factory for Hugging Face's ``Trainer(optimizer_cls_and_kwargs=(hf_factory("kfac"), {"lr": 0.03}))``.

    The Trainer calls it with the model, so that the optimizer is attached and its parameters are in :func:`decay_groups`.
    What the TrainingArguments say of step size and decay reaches no factory: say it here, or in the Trainer's dictionary,
    which wins. Where several processes train, the Trainer wraps the model later; statistics are means over all of them.

    Args:
        method: a class, or the name of one of :mod:`curvlib.optimizers`, in any case.
        settings: of the method.

    Raises:
        ValueError: for a name that is no method's.
    """
    kind = _method(method)

    def build(model: nn.Module, **further: Any) -> CurvatureOptimizer:
        chosen = {**settings, **further}
        default = inspect.signature(kind).parameters["weight_decay"].default
        groups = decay_groups(model, chosen.pop("weight_decay", default))
        make: Build = kind
        optimizer = make(groups, model=model, **chosen)
        if dist.is_available() and dist.is_initialized():
            optimizer.process_group = dist.group.WORLD
        return optimizer

    return lambda: build


def register_timm() -> list[str]:
    """Register every method with timm, as ``"curvlib-kfac"``, for ``create_optimizer_v2`` and the ``--opt`` of its scripts.

    timm makes the parameter groups and does not pass the model on: pass it once more, ``create_optimizer_v2(model,
    "curvlib-kfac", lr=0.03, model=model)``, or call ``optimizer.attach(model)`` afterwards. A method with momentum gets
    timm's, which is 0.9 unless told otherwise. Those of timm's layers that compute what torch's do are listened to.

    Returns:
        The names.
    """
    from timm import layers
    from timm.optim import OptimInfo
    from timm.optim._optim_factory import default_registry

    for name in ("GroupNorm", "LayerNorm", "Linear"):
        register_layer(getattr(layers, name), getattr(nn, name))
    names = []
    for method, kind in methods().items():
        takes = inspect.signature(kind).parameters
        # timm looks up what follows the last underscore of a name, so there is none.
        names.append(f"curvlib-{method}")
        default_registry.register(
            OptimInfo(
                name=names[-1],
                opt_class=kind,
                description=(kind.__doc__ or "").partition("\n")[0],
                has_eps="eps" in takes,
                has_momentum="momentum" in takes,
                has_betas="betas" in takes,
            )
        )
    return names


def _method(method: str | type[CurvatureOptimizer]) -> type[CurvatureOptimizer]:
    if isinstance(method, type) and issubclass(method, CurvatureOptimizer):
        return method
    known = methods()
    if not isinstance(method, str) or method.lower() not in known:
        raise ValueError(
            f"method must be a subclass of CurvatureOptimizer or one of {', '.join(known)}, got {method!r}"
        )
    return known[method.lower()]
