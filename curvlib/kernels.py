"""Kernels: whole steps of diagonal methods in one pass, where the framework has a fused kernel for them.

A kernel takes the place of statistic, root, momentum and step of a cohort whose recipe is exactly what it computes. Without
one the engine composes the same step from multi-tensor operations, each a pass over memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from .checks import number
from .cohort import Cohort, Group
from .members import picked
from .recipe import Damping, Moment, Momentum, Recipe, Rule, Schedule

Kernel = Callable[[Cohort, Sequence[Group], Tensor | None], None]


def kernel_for(cohort: Cohort, groups: Sequence[Group]) -> Kernel | None:
    """The kernel that computes a cohort's step, or none."""
    structure = cohort.bucket.structure
    if cohort.bucket.packed or structure.dtype != structure.param_dtype or cohort.heard is not None or cohort.warm:
        return None
    if any(groups[group]["reduction_factor"] != 1.0 for group in cohort.members.used):
        return None
    if _is_adam(cohort.recipe) and cohort.updates == cohort.step and _dense(cohort):
        return adam
    return None


def _dense(cohort: Cohort) -> bool:
    """Whether parameters lie in memory as their state does, without gaps: kernels look at nothing but addresses."""
    parameters = cohort.members.parameters
    if all(map(Tensor.is_contiguous, parameters)):
        return True
    pairs = zip(parameters, cohort.state["momentum"], strict=True)
    return all(parameter.stride() == state.stride() for parameter, state in pairs)


@lru_cache(maxsize=64)
def _is_adam(recipe: Recipe) -> bool:
    """Whether a recipe is Adam with any of its numbers, decays and maxima."""
    moment, root, momentum = recipe.moment, recipe.root, recipe.rule.momentum
    return (
        momentum is not None
        and recipe.block is None
        and recipe.schedule == Schedule(refresh=recipe.schedule.refresh)
        and moment == Moment(beta=moment.beta, debias=True, maximum=moment.maximum, dtype=moment.dtype)
        and (root.exponent, root.damping) == (0.5, Damping(recipe.damping.value, outside=True))
        and momentum == Momentum(momentum.beta, "ema", debias=True)
        and recipe.rule == Rule(momentum, decay=recipe.rule.decay)
    )


def adam(cohort: Cohort, groups: Sequence[Group], gate: Tensor | None) -> None:
    """One step of Adam or AdamW, by ``torch._fused_adam_``, for the parameters of each group."""
    recipe = cohort.recipe
    assert recipe.rule.momentum is not None
    call = torch._fused_adamw_ if recipe.rule.decay == "decoupled" else torch._fused_adam_
    steps = torch.tensor(float(cohort.step + 1), device=cohort.bucket.structure.device)
    shut = None if gate is None else (~gate).to(steps)
    members, raw = cohort.members, cohort.members.gradients()
    cohort.updates += 1
    for group, places in members.by_group(raw).items():
        settings = groups[group]
        call(
            picked(members.parameters, places),
            _laid_alike(picked(raw, places), picked(members.parameters, places)),
            picked(cohort.state["momentum"], places),
            picked(cohort.state["moment"], places),
            picked(cohort.state["peak"], places) if recipe.moment.maximum else [],
            [steps] * len(places),
            lr=settings["lr"],
            beta1=number(recipe.rule.momentum.beta),
            beta2=number(recipe.moment.beta),
            weight_decay=settings["weight_decay"],
            eps=number(recipe.damping.value),
            amsgrad=recipe.moment.maximum,
            maximize=settings["maximize"],
            found_inf=shut,
        )


def _laid_alike(gradients: list[Tensor | None], parameters: list[Tensor]) -> list[Tensor]:
    """Gradients in the memory layout of their parameters, which the kernels take for granted."""
    there = [one for one in gradients if one is not None]
    if all(map(Tensor.is_contiguous, there)) and all(map(Tensor.is_contiguous, parameters)):
        return there
    return [
        gradient if gradient.stride() == parameter.stride() else torch.empty_like(parameter).copy_(gradient)
        for gradient, parameter in zip(there, parameters, strict=True)
    ]
