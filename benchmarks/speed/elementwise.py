"""Cases of first-order methods, of the first step, and of the import."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal
from unittest import mock

import torch
from torch import nn

import curvlib
from curvlib import roots

from .case import Case, at_most
from .timing import Contest, Setting, timed
from .workloads import Build, Shape, displacement, fill, relative, resnet50, steps

EXACT = 1e-5
"""Rounding of a few elementwise operations in float32, in a displacement of a few steps."""


def versus(
    ours: Build, theirs: Build, shapes: Sequence[Shape], setting: Setting, tolerance: float, turns: int = 1
) -> Contest:
    """Steps of two optimizers, which must move the same parameters alike."""

    def difference() -> float:
        return relative(*(displacement(build, shapes, setting, range(3)) for build in (ours, theirs)))

    return Contest(
        steps(ours, shapes, setting), steps(theirs, shapes, setting), difference, tolerance, turns, warm_up=3
    )


def _large(setting: Setting, name: str) -> Contest:
    side = setting.size(1024, 16)
    return _first_order(setting, name, [(side, side)] * 4, turns=10)


def _many(setting: Setting, side: int) -> Contest:
    return _first_order(setting, "Adam", [(side, side)] * setting.size(200, 6), turns=50)


def _unchecked(setting: Setting) -> Contest:
    side = setting.size(1024, 16)
    return _first_order(setting, "Adam", [(side, side)] * 4, turns=10, on_nonfinite="off")


def _first_order(
    setting: Setting, name: str, shapes: Sequence[Shape], turns: int, on_nonfinite: Literal["auto", "off"] = "auto"
) -> Contest:
    ours, theirs = getattr(curvlib, name), getattr(torch.optim, name)

    def build(these: list[nn.Parameter]) -> torch.optim.Optimizer:
        optimizer: curvlib.CurvatureOptimizer = ours(these, lr=1e-2)
        optimizer.on_nonfinite = on_nonfinite
        return optimizer

    return versus(
        build,
        lambda these: theirs(these, lr=1e-2, fused=True),
        shapes,
        setting,
        EXACT,
        setting.size(turns, 1),
    )


def _first_step(setting: Setting, build: Callable[[nn.Module], torch.optim.Optimizer]) -> Contest:
    """The first step on ResNet-50's layers but for the solves, against one second."""
    solve, spent = roots.solve, [0.0]

    def watched(*arguments: object) -> object:
        solutions: list[object] = []
        spent[0] += timed(lambda: solutions.append(solve(*arguments)), setting.device)  # type: ignore[arg-type]
        return solutions[0]

    def first() -> float:
        model = resnet50(setting)
        fill(list(model.parameters()), 0)
        optimizer = build(model)
        spent[0] = 0.0
        with mock.patch.object(roots, "solve", watched):
            return timed(optimizer.step, setting.device) - spent[0]

    return Contest(first, lambda: 1.0, lambda: 0.0, 0.0, warm_up=0)


def _import(setting: Setting) -> Contest:
    code = "import time, torch; began = time.perf_counter(); import curvlib; print(time.perf_counter() - began)"

    def fresh() -> float:
        return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)

    return Contest(fresh, lambda: 0.3, lambda: 0.0, 0.0, warm_up=0 if setting.quick else 1)


CASES = (
    *(
        Case(
            f"{name.lower()}-large",
            f"{name}, 4 matrices of 1024², 4.2 M parameters",
            f"torch {name}(fused=True)",
            at_most(1.05),
            at_most(1.05),
            partial(_large, name=name),
        )
        for name in ("Adam", "AdamW")
    ),
    Case(
        "adam-large-unchecked",
        'the same Adam with on_nonfinite="off", which reads gradients once',
        "torch Adam(fused=True)",
        at_most(None),
        at_most(None),
        _unchecked,
    ),
    *(
        Case(
            f"adam-200x{side}",
            f"Adam, 200 matrices of {side}²",
            "torch Adam(fused=True)",
            at_most(0.65),
            at_most(0.65),
            partial(_many, side=side),
        )
        for side in (64, 16)
    ),
    *(
        Case(
            f"first-step-{name.lower()}",
            f"{name}, first step on ResNet-50's layers, solves aside",
            "1 s",
            at_most(1.0),
            at_most(1.0),
            partial(_first_step, build=build),
        )
        for name, build in (("Adam", curvlib.Adam), ("MBF", curvlib.MBF), ("Shampoo", curvlib.Shampoo))
    ),
    Case("import", "import of curvlib after torch", "0.3 s", at_most(1.0), at_most(1.0), _import),
)
