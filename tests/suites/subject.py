"""The method that another project's tests are pointed at: its name stands in the environment, as ``CURVLIB_SUBJECT``."""

from __future__ import annotations

import os
import warnings

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


def subject() -> type[curvlib.CurvatureOptimizer]:
    """The class; methods that hear layers use gradients here, since these suites give parameters alone."""
    warnings.simplefilter("ignore", TapWarning)
    return methods()[os.environ["CURVLIB_SUBJECT"].lower()]


def settings() -> list[dict[str, object]]:
    """What it is to be tried with."""
    return [*SETTINGS["default"], *SETTINGS.get(subject().__name__, [])]
