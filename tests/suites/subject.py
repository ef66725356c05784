"""The method that another project's tests are pointed at: its name stands in the environment, as ``CURVLIB_SUBJECT``."""

from __future__ import annotations

import inspect
import os
import warnings
from typing import Any

import torch

import curvlib
from curvlib import TapWarning
from curvlib.optimizers.catalogue import methods

SETTINGS = {
    # Problems of these suites have gradients of 1e-3 to 1e3, 200 steps, and no noise.
    "default": [{}, {"lr": 1e-3}, {"lr": 1e-3, "weight_decay": 0.1}, {"lr": 1e-3, "maximize": True}],
    "Shampoo": [{"block_size": 3}, {"stagger": True, "refresh_every": 3}],
    "SOAP": [{"block_size": 3}],
    "MBF": [{"linear_blocks": "input"}, {"of": "samples"}],
    "KFAC": [{"labels": "exact"}],
}

CURVED = ("AdaHessian", "LayerwiseAdamW", "LayerwiseSGD", "SophiaH")
"""Methods that differentiate the loss once more; for them every ``backward`` keeps the graph of the gradients."""

FAILS = {
    name: dict.fromkeys(
        (
            "test_deepcopy_copies_all_public_attrs",
            "test_load_nontensor_step",
            "test_non_empty_state",
            "test_step_is_noop_for_zero_grads",
        ),
        "gradients that are set by hand have no graph",
    )
    for name in CURVED
}
"""Tests of PyTorch's suite that a method is expected to fail, and why."""


class TNT(curvlib.TNT):
    """With the gradients at hand: drawn labels would need optimizer.observe(outputs, likelihood) in the loop."""

    def __init__(self, params: Any, lr: Any = 1e-3, **settings: Any) -> None:
        super().__init__(params, lr, **{"labels": "data", **settings})


class SophiaG(curvlib.SophiaG):
    """With the gradients at hand, too."""

    def __init__(self, params: Any, lr: Any = 1e-3, **settings: Any) -> None:
        super().__init__(params, lr, **{"labels": "data", **settings})


_backward = torch.Tensor.backward


def _with_graph(self: torch.Tensor, *arguments: Any, **settings: Any) -> None:
    settings["create_graph"] = True
    _backward(self, *arguments[:2], **settings)


def subject() -> type[curvlib.CurvatureOptimizer]:
    """The class; methods that hear layers use gradients here, since these suites give parameters alone."""
    warnings.simplefilter("ignore", TapWarning)
    name = os.environ["CURVLIB_SUBJECT"]
    if name in CURVED:
        warnings.filterwarnings("ignore", "Using backward.. with create_graph=True")
        torch.Tensor.backward = _with_graph
    return {"TNT": TNT, "SophiaG": SophiaG}.get(name) or methods()[name.lower()]


def settings() -> list[dict[str, Any]]:
    """What it is to be tried with, in new dictionaries.

    Parameters without a gradient signal must not move, which a decay that a method has by default would let them; and a hook
    of one test looks for an lr of 0.003, which may be no default, as it is SOAP's.
    """
    takes = inspect.signature(methods()[os.environ["CURVLIB_SUBJECT"].lower()]).parameters
    still = {"weight_decay": 0.0} if "weight_decay" in takes and takes["weight_decay"].default else {}
    other = {"lr": 2e-3} if takes["lr"].default == 3e-3 else {}
    tried = [*SETTINGS["default"], *SETTINGS.get(subject().__name__, [])]
    return [{**still, **other, **one} for one in tried]
