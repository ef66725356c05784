"""MBF's blocks of single neurons against ASDL's unit-wise Fisher, the one peer that has them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from curvlib import CurvatureOptimizer
from tests.listening import F64, recipe_of

asdl = pytest.importorskip("asdl.fisher", reason="asdfghjkl, which imports as asdl, is not installed")


@pytest.mark.parametrize("labels", ["data", "exact"])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_blocks_of_neurons_are_the_same(labels, kind):
    torch.manual_seed(0)
    if kind == "linear":
        model, x = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), torch.randn(6, 5, dtype=F64)
    else:
        model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(100, 3))
        x = torch.randn(6, 2, 5, 5, dtype=F64)
    model, y = model.double(), torch.randint(0, 3, (6,))
    optimizer = CurvatureOptimizer(model, recipe_of("o | i k...", labels=labels, join_bias=True), lr=0.0)
    outputs = model(x)
    optimizer.observe(outputs, "categorical")
    F.cross_entropy(outputs, y).backward()
    optimizer.step()
    ours = {module: optimizer.state[module.weight]["factor_0_0"] for module in (model[0], model[-1])}
    optimizer.detach()
    config = asdl.FisherConfig(
        fisher_type=asdl.FISHER_EMP if labels == "data" else asdl.FISHER_EXACT,
        fisher_shapes=[asdl.SHAPE_UNIT_WISE],
        data_size=6,
        loss_type=asdl.LOSS_CROSS_ENTROPY,
    )
    maker = asdl.get_fisher_maker(model, config)
    dummy = maker.setup_model_call(model, x)
    maker.setup_loss_call(F.cross_entropy, dummy, y)
    maker.forward_and_backward()
    for module, block in ours.items():
        torch.testing.assert_close(block, module.fisher.unit.data, rtol=1e-10, atol=1e-13)
