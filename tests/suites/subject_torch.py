"""A pytest plugin that points PyTorch's own suite of optimizers at the subject, before it is collected."""

from __future__ import annotations

import unittest

import torch
from subject import FAILS, settings, subject
from torch.testing._internal import common_optimizers
from torch.testing._internal.common_methods_invocations import DecorateInfo
from torch.testing._internal.common_optimizers import OptimizerInfo, OptimizerInput


def inputs(device: object, dtype: object = None) -> list[OptimizerInput]:
    """Every setting, and a step size that is a tensor."""
    tried = [*settings(), {**settings()[0], "lr": torch.tensor(1e-3)}]
    return [OptimizerInput(params=None, kwargs=dict(one), desc=str(one)) for one in tried]


common_optimizers.optim_db[:] = [
    OptimizerInfo(
        subject(),
        optim_inputs_func=inputs,
        supported_impls=("foreach",),
        not_og_supported_flags=("foreach", "maximize"),
        supports_complex=False,
        decorators=tuple(
            DecorateInfo(unittest.expectedFailure, "TestOptimRenewed", test)
            for test in FAILS.get(subject().__name__, ())
        ),
    )
]
