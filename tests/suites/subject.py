"""The method that another project's tests are pointed at: its name stands in the environment, as ``CURVLIB_SUBJECT``."""

from __future__ import annotations

import inspect
import os
import warnings
from typing import Any

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

LEFT_OUT = dict.fromkeys(
    ("AdaHessian", "LayerwiseAdamW", "LayerwiseSGD", "SophiaH"),
    "differentiates the loss once more, which a loop must show it: optimizer.observe(loss=loss)",
)


class TNT(curvlib.TNT):
    """With the gradients at hand: drawn labels would need optimizer.observe(outputs, likelihood) in the loop."""

    def __init__(self, params: Any, lr: Any = 1e-3, **settings: Any) -> None:
        super().__init__(params, lr, **{"labels": "data", **settings})


class SophiaG(curvlib.SophiaG):
    """With the gradients at hand, too."""

    def __init__(self, params: Any, lr: Any = 1e-3, **settings: Any) -> None:
        super().__init__(params, lr, **{"labels": "data", **settings})


def subject() -> type[curvlib.CurvatureOptimizer]:
    """The class; methods that hear layers use gradients here, since these suites give parameters alone."""
    warnings.simplefilter("ignore", TapWarning)
    name = os.environ["CURVLIB_SUBJECT"]
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
