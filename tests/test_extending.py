"""What the guide to extensions defines keeps the whole contract: state, schedules, masks, and its own mathematics."""

from __future__ import annotations

import copy
import pickle
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import curvlib
from curvlib import CurvatureOptimizer, Damping, Moment, Momentum, Recipe, Root, Rule, Schedule
from curvlib.storage import structural
from tests.listening import F64
from tests.test_optimizer import network, same, through_a_file, train

GUIDE = Path(__file__).parents[1] / "docs" / "extending.md"

# A module, so that its classes can be pickled.
guide = sys.modules["extending"] = ModuleType("extending")
exec(
    compile("".join(re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)), str(GUIDE), "exec"), vars(guide)
)

EMA = Moment(beta=0.9, debias=True)
LOW_RANK = Recipe("| ...", EMA, Root(1, Damping(0.1)), join_bias=True, block=guide.LowRank)
RECIPES = {
    "block": LOW_RANK,
    "block of samples": replace(LOW_RANK, moment=Moment("samples", debias=True)),
    "moment": Recipe("| (...)/20", guide.Polynomial(power=0.6), Root(1, Damping(0.1)), join_bias=True),
    "solver": Recipe(
        "| ,...", EMA, Root(1, Damping(0.1), solver="newton-schulz"), schedule=Schedule(refresh=3, stagger=True)
    ),
    "finish": Recipe(
        "| (...)/20",
        EMA,
        Root(0.5, Damping(0.1)),
        Rule(Momentum(0.9, after=True), finish=(guide.Decay(0.1), guide.TrustRatio())),
        join_bias=True,
    ),
    "sign": Recipe("... |", root=Root(0), rule=Rule(Momentum(0.9, "ema"), finish=(guide.Sign(),))),
}
EACH = pytest.mark.parametrize("name", sorted(RECIPES))


def trained(name, steps, dtype=torch.float32, seed=0):
    model = network(dtype, seed)
    optimizer = CurvatureOptimizer(model, RECIPES[name], lr=0.01)
    train(model, optimizer, range(steps), dtype)
    return model, optimizer


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumed_is_bitwise_uninterrupted(name, dtype):
    model, optimizer = trained(name, 5, dtype)
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    train(model, optimizer, range(5, 9), dtype)
    again, resumed = trained(name, 0, dtype, seed=1)
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    train(again, resumed, range(5, 9), dtype)
    assert same(model, again)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@EACH
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_or_a_pickle_goes_on(name, copied):
    model, optimizer = trained(name, 4)
    twin, other = copied((model, optimizer))
    other.attach(twin)
    train(model, optimizer, range(4, 7))
    train(twin, other, range(4, 7))
    assert same(model, twin)


@pytest.mark.parametrize("name", sorted(set(RECIPES) - {"block of samples"}))
def test_a_masked_step_changes_nothing_but_for_rounding(name, monkeypatch):
    # On an accelerator a masked step is counted, and debiasing goes by the count.
    monkeypatch.setattr(curvlib.optimizer, "_known", lambda gate: False)
    monkeypatch.setitem(RECIPES, name, replace(RECIPES[name], moment=replace(RECIPES[name].moment, debias=False)))
    model, optimizer = trained(name, 3)
    optimizer.on_nonfinite = "mask"
    before = copy.deepcopy(model)
    held = [optimizer.curvature(model[5]).clone()] if name != "sign" else []
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, torch.inf)
    optimizer.step()
    assert same(model, before)
    for value in held:
        torch.testing.assert_close(optimizer.curvature(model[5]), value)
    train(model, optimizer, range(3, 5))
    assert all(parameter.isfinite().all() for parameter in model.parameters())


# -- a moment with a number of its own --------------------------------------------------------------------------------


def test_a_number_of_a_subclass_is_a_setting_like_others():
    fixed = Recipe("| c", guide.Polynomial(power=0.5))
    scheduled = Recipe("| c", guide.Polynomial(power=lambda step: 0.5 + step))
    assert scheduled.at(0) == fixed
    assert hash(scheduled.at(0)) == hash(fixed)
    assert scheduled.at(1) != fixed
    assert scheduled.at(1).moment.weights(1) == (1 - 2**-1.5, 2**-1.5)
    assert structural(scheduled) == structural(fixed) == structural(scheduled.at(3))
    assert structural(fixed) != structural(Recipe("| c"))


def test_a_scheduled_number_keeps_the_state_where_it_is():
    weight = nn.Parameter(torch.zeros(3))
    optimizer = CurvatureOptimizer([weight], Recipe("| c", guide.Polynomial(power=lambda step: 1 / (1 + step))))
    storages = []
    for _ in range(3):
        weight.grad = torch.randn(3)
        optimizer.step()
        storages.append(optimizer.state[weight]["factor_0_0"].data_ptr())
    assert len(set(storages)) == 1


def test_polynomial_averages_by_their_formula():
    torch.manual_seed(0)
    weight, expected = nn.Parameter(torch.zeros(3, dtype=F64)), torch.zeros(3, 3, dtype=F64)
    optimizer = CurvatureOptimizer([weight], Recipe("| c", guide.Polynomial(power=0.7)), lr=0.0)
    for n in range(1, 6):
        weight.grad = torch.randn(3, dtype=F64)
        expected = (1 - n**-0.7) * expected + n**-0.7 * weight.grad.outer(weight.grad)
        optimizer.step()
    torch.testing.assert_close(optimizer.curvature(weight), expected)


# -- a block ----------------------------------------------------------------------------------------------------------


def low_rank(shape, steps, n=2, damping=0.1, keep=0.8):
    """(block, recipe, state, gradients) after some updates of a batch of n operands."""
    recipe = replace(LOW_RANK, root=Root(1, damping))
    weights = [nn.Parameter(torch.zeros(shape, dtype=F64)) for _ in range(n)]
    optimizer = CurvatureOptimizer(weights, replace(recipe, moment=Moment(beta=keep)), lr=0.0)
    gradients = torch.randn(max(steps, 1), n, *shape, dtype=F64)
    for step in gradients:
        for weight, gradient in zip(weights, step, strict=True):
            weight.grad = gradient
        optimizer.step()
    (bucket,) = optimizer._storage.buckets
    return bucket.block, recipe, bucket.state, gradients


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 8), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_low_rank_plus_diagonal_is_what_its_dense_form_says(rows, columns, steps, seed):
    torch.manual_seed(seed)
    block, recipe, state, gradients = low_rank((rows, columns), steps)
    dense, size, g = block.dense(state, recipe, 1.0), rows * columns, torch.randn(2, rows, columns, dtype=F64)
    exact = torch.zeros_like(dense)
    for step in gradients.flatten(2):
        exact = 0.8 * exact + 0.2 * step[:, :, None] * step[:, None]
    torch.testing.assert_close(dense.diagonal(dim1=1, dim2=2), exact.diagonal(dim1=1, dim2=2))
    if steps <= 4:  # nothing has been cut off yet
        torch.testing.assert_close(dense, exact)
    flat = g.view(2, size, 1)
    expected = torch.linalg.solve(2 * dense + 0.1 * torch.eye(size, dtype=F64), flat)
    torch.testing.assert_close(block.apply(state, g, recipe, 1.0, 2.0).view(2, size, 1), expected)
    torch.testing.assert_close(block.apply(state, g, recipe, -1.0, 2.0).view(2, size, 1), 2 * dense @ flat)


def test_low_rank_without_damping_or_signal_divides_by_no_zero():
    block, recipe, state, _ = low_rank((2, 2), 1, damping=0.0)
    assert block.apply(state, torch.ones(2, 2, 2, dtype=F64), recipe, 1.0, 1.0).isfinite().all()
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer = CurvatureOptimizer([weight], recipe)
    weight.grad = torch.zeros(2, 2)
    optimizer.step()
    assert torch.equal(weight, torch.ones(2, 2))


@pytest.mark.parametrize("root", [Root(0.5, 0.1), Root(1, Damping(0.1, "trace")), Root(1, Damping(0.1, outside=True))])
def test_low_rank_refuses_what_it_can_not(root):
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer = CurvatureOptimizer([weight], replace(LOW_RANK, root=root))
    weight.grad = torch.ones(2, 2)
    with pytest.raises(ValueError, match="LowRank needs exponent 1 and an absolute damping"):
        optimizer.step()


def test_a_block_that_hears_examples_is_the_sum_of_their_updates():
    torch.manual_seed(0)
    model, x = nn.Linear(3, 2, bias=False, dtype=F64), torch.randn(4, 3, dtype=F64)
    y = torch.tensor([0, 1, 1, 0])
    recipe = replace(LOW_RANK, moment=Moment("samples", average="mean"))
    optimizer = CurvatureOptimizer(model, recipe, lr=0.0)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    with optimizer.paused():
        losses = F.cross_entropy(model(x), y, reduction="none")
        rows = [torch.autograd.grad(loss, model.weight, retain_graph=True)[0].flatten() for loss in losses]
    expected = sum(row.outer(row) for row in rows) / 4
    torch.testing.assert_close(optimizer.curvature(model).diag(), expected.diag())
