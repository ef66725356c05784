"""Beliefs of low rank plus a diagonal, and dense ones, against dense algebra."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from curvlib.filtering import DenseCovariance, LowRankPrecision
from tests.filters import assert_near, generator, low_rank, normal

sizes = st.tuples(st.integers(1, 12), st.integers(0, 14), st.booleans(), st.integers(0, 1000))


@given(sizes)
@settings(max_examples=60, deadline=None)
def test_low_rank_precision_is_its_dense_matrix(drawn):
    size, memory, spherical, seed = drawn
    belief = low_rank(size, memory, spherical, seed)
    dense = torch.eye(size, dtype=torch.float64) * belief.diagonal + belief.basis @ belief.basis.T
    condition = torch.linalg.cond(dense).item()
    vectors = normal(size, 3, seed=seed + 2)
    assert_near(belief.dense(), belief.dense().T, 1.0)
    assert_near(belief.dense(), dense, 1.0)
    assert torch.linalg.eigvalsh(belief.dense()).min() > 0
    assert_near(belief.solve(vectors), torch.linalg.solve(dense, vectors), condition)
    assert_near(belief.solve(vectors[:, 0]), torch.linalg.solve(dense, vectors[:, 0]), condition)
    assert_near(belief.variances(), torch.linalg.inv(dense).diagonal(), condition)


@given(sizes, st.floats(0.1, 1.0), st.floats(0, 5))
@settings(max_examples=60, deadline=None)
def test_the_predict_step_loses_nothing_at_any_memory(drawn, gamma, q):
    size, memory, spherical, seed = drawn
    belief = low_rank(size, memory, spherical, seed)
    covariance = gamma**2 * torch.linalg.inv(belief.dense()) + q * torch.eye(size, dtype=torch.float64)
    moved = belief.predicted(gamma, q)
    assert moved.basis.shape == belief.basis.shape
    assert moved.diagonal.shape == belief.diagonal.shape
    condition = torch.linalg.cond(belief.dense()).item() * torch.linalg.cond(covariance).item()
    assert_near(moved.dense(), torch.linalg.inv(covariance), condition)
    dense = DenseCovariance(torch.linalg.inv(belief.dense())).predicted(gamma, q)
    assert_near(dense.dense(), torch.linalg.inv(covariance), condition)


@given(sizes, st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_an_update_steps_exactly_and_keeps_the_best_columns_and_the_diagonal(drawn, count):
    size, memory, spherical, seed = drawn
    belief = low_rank(size, memory, spherical, seed)
    rows, residual = normal(count, size, seed=seed + 3), normal(count, seed=seed + 4)
    after, step = belief.conditioned(rows, residual)
    exact = belief.dense() + rows.T @ rows
    condition = torch.linalg.cond(exact).item()
    assert_near(step, torch.linalg.solve(exact, rows.T @ residual), condition)
    wide = torch.cat([belief.basis, rows.T], 1)
    values = F.pad(torch.linalg.svdvals(wide), (0, memory + count)).square()
    lost = wide @ wide.T - after.basis @ after.basis.T
    kept = F.pad(torch.linalg.svdvals(after.basis).square(), (0, memory + 1))[:memory]
    assert_near(F.pad(kept, (0, 1)), F.pad(values[:memory], (0, 1)), 1.0 + size)
    assert_near(
        torch.linalg.matrix_norm(lost, 2).view(1), values[memory].view(1), size * values[0].item()
    )  # Eckart-Young
    grown = belief.diagonal + (0.0 if spherical else lost.diagonal())
    assert_near(after.diagonal.expand(size), grown.expand(size), size * values[0].item())
    if not spherical:
        assert_near(after.dense().diagonal(), exact.diagonal(), size)
    if memory >= size:
        assert_near(after.dense(), exact, size)


def test_samples_have_the_belief_as_their_covariance():
    for belief in (
        low_rank(4, 2),
        low_rank(4, 2, spherical=True),
        DenseCovariance(torch.linalg.inv(low_rank(4, 2).dense())),
    ):
        draws = belief.sample(200_000, generator(3))
        covariance = torch.linalg.inv(belief.dense())
        error = draws.T @ draws / len(draws) - covariance
        assert (
            error.abs().max() <= 6 * math.sqrt(2 / len(draws)) * covariance.diagonal().max()
        )  # six standard deviations
        assert torch.equal(draws, belief.sample(200_000, generator(3)))


def test_what_float32_would_square_away_is_kept():
    basis = (1e4 * normal(8, 1) + normal(8, 3, seed=1)).float()  # the squares of its singular values: 1e9, 1e1, 1e1
    belief, rows = LowRankPrecision(torch.ones(8), basis), (1e4 * normal(8, 1).T + normal(1, 8, seed=2)).float()
    wide = LowRankPrecision(torch.ones(8, dtype=torch.float64), basis.double())
    vector, near = normal(8, seed=3), 100 * torch.finfo(torch.float32).eps
    assert (belief.solve(vector.float()) - wide.solve(vector)).abs().max() <= near
    (after, step), (expected, exact) = (
        one.conditioned(rows.to(one.basis), torch.ones(1).to(one.basis)) for one in (belief, wide)
    )
    assert (step - exact).abs().max() <= near
    assert (after.solve(vector.float()) - expected.solve(vector)).abs().max() <= near
