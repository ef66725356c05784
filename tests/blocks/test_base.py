"""What a structure gets that defines no more than it must."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from curvlib import CurvatureOptimizer, Moment, Recipe, Root, Rule
from curvlib.blocks import Block, StandardBlock
from tests.listening import F64


class Plain(StandardBlock):
    """A structure that knows gradients only."""

    collect = Block.collect


def test_without_a_collect_of_its_own_a_block_hears_example_by_example():
    held = []
    for block in (Plain, None):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(27, 4)).double()
        recipe = Recipe("o | i k...", Moment("samples"), Root(1, 0.1), Rule(), join_bias=True, block=block)
        optimizer = CurvatureOptimizer(model, recipe, lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(torch.randn(6, 2, 4, 4, dtype=F64)), torch.arange(6) % 4).backward()
            optimizer.step()
        held.append(list(model.parameters()))
    for one, two in zip(*held, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)
