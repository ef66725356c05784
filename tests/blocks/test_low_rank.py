"""The low-rank block against the matrices that it stands for, and against the filter that has the same precision."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from curvlib import Damping, Moment, Recipe, Root, Schedule
from curvlib.beliefs import LowRankPrecision
from curvlib.blocks import LowRankBlock
from curvlib.low_rank import truncated, whitened
from curvlib.testing import check_block, check_recipe
from tests.blocks.test_window import gradient, train
from tests.optimizers.oracles import F64

partitions = st.sampled_from(["o | i", "~o | i", "i | o", "| ...", "| (...)/3", "| (...)//6"])


def recipe(partition, columns, **options):
    schedule = options.pop("schedule", Schedule())
    root = options.pop("root", Root(1.0, Damping(0.1)))
    return Recipe(partition, Moment(window=columns, **options), root, schedule=schedule, block=LowRankBlock)


@settings(deadline=None, max_examples=40)
@given(
    partitions, st.sampled_from(["ema", "sum", "mean"]), st.sampled_from([None, "trace", "layer"]), st.integers(1, 3)
)
def test_with_room_for_everything_it_is_the_standard_block(partition, average, relative, refresh):
    moment = {"average": average, "beta": 0.8, "debias": True}
    root, schedule = Root(1.0, Damping(0.1, relative)), Schedule(refresh=refresh)
    found, optimizer, model = train(recipe(partition, 20, root=root, schedule=schedule, **moment), 8)
    wanted, other, again = train(Recipe(partition, Moment(**moment), root, schedule=schedule), 8)
    # λ is a tenth of the curvature's size, or of gradients of size 1: condition numbers below 1e4
    torch.testing.assert_close(found, wanted, rtol=0, atol=8 * 1e4 * torch.finfo(F64).eps)
    torch.testing.assert_close(optimizer.curvature(model), other.curvature(again), rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=30)
@given(partitions, st.integers(1, 4), st.sampled_from(["ema", "sum"]))
def test_the_diagonal_is_that_of_the_average_whatever_is_cut_off(partition, columns, average):
    _, optimizer, model = train(recipe(partition, columns, average=average), 9)
    _, other, again = train(Recipe(partition, Moment(average=average), Root(1.0, 0.1)), 9)
    found, wanted = optimizer.curvature(model), other.curvature(again)
    torch.testing.assert_close(found.diagonal(), wanted.diagonal(), rtol=1e-12, atol=1e-14)
    if columns < 4 and partition in ("o | i", "| ..."):
        assert (found - wanted).norm() > 1e-3 * wanted.norm()


def test_it_is_the_precision_of_the_filter():
    """With one sum and no prediction the block's update is LO-FI's, whose observations are the gradients."""
    _, optimizer, model = train(recipe("| ...", 3, average="sum"), 6)
    belief = LowRankPrecision(torch.full((20,), 1e-30, dtype=F64), torch.zeros(20, 3, dtype=F64))
    for t in range(6):
        belief, _ = belief.conditioned(gradient(t).reshape(1, 20), torch.zeros(1, dtype=F64))
    torch.testing.assert_close(optimizer.curvature(model), belief.dense(), rtol=1e-10, atol=1e-12)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 5), st.integers(0, 99))
def test_truncation_and_woodbury(f, k, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(2, f, k, dtype=F64, generator=generator)
    basis, rest = truncated(wide, columns)
    u, s, _ = torch.linalg.svd(wide, full_matrices=False)
    s[:, columns:] = 0
    best = (u * s.square()[:, None]) @ u.mT
    torch.testing.assert_close(basis @ basis.mT, best, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(rest, (wide.square().sum(2) - best.diagonal(dim1=1, dim2=2)), rtol=1e-9, atol=1e-9)
    diagonal = torch.rand(2, f, dtype=F64, generator=generator) + 0.1
    white = whitened(diagonal, basis)
    dense = torch.linalg.inv(diagonal.diag_embed() + basis @ basis.mT)
    torch.testing.assert_close(diagonal.reciprocal().diag_embed() - white.mT @ white, dense, rtol=1e-9, atol=1e-9)


def test_the_kit():
    check_block(LowRankBlock, recipe=recipe("o | i", 9), partitions=["o | i", "~o | i", "| (...)/3"], examples=12)
    check_recipe(recipe("o | i", 2, schedule=Schedule(2, 3)), examples=3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Recipe("o | i", Moment(), block=LowRankBlock), "window=L"),
        (lambda: Recipe("o | i", Moment("samples"), block=LowRankBlock), "window=L"),
        (lambda: recipe("| o, i", 3), "one dense factor"),
        (lambda: recipe("o | [i]", 3), "one dense factor"),
        (lambda: recipe("o | i", 3, root=Root(0.5)), "exponent=0.5"),
        (lambda: recipe("o | i", 3, root=Root(1, Damping(1.0, "largest"))), "absolute or relative to 'trace'"),
    ],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        train(make(), 1)
