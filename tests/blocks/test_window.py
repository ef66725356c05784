"""The window block against the matrices that it stands for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import curvlib
from curvlib import CurvatureOptimizer, Damping, Moment, PartitionError, Recipe, Root, Schedule
from curvlib.blocks import WindowBlock
from curvlib.testing import check_block, check_recipe
from tests.optimizers.oracles import F64


def gradient(t, rows=4, columns=5):
    return torch.randn(rows, columns, dtype=F64, generator=torch.Generator().manual_seed(t))


def train(recipe, steps, lr=0.1):
    """A weight after some steps on random gradients, and its optimizer."""
    model = nn.Linear(5, 4, bias=False).double()
    nn.init.zeros_(model.weight)
    optimizer = CurvatureOptimizer(model, recipe, lr=lr)
    for t in range(steps):
        model.weight.grad = gradient(t)
        optimizer.step()
    return model.weight.detach().clone(), optimizer, model


@settings(deadline=None, max_examples=40)
@given(
    partition=st.sampled_from(["o | i", "i | o", "| ...", "| (...)/3", "| (...)//6"]),
    exponent=st.sampled_from([1.0, 0.5, 0.25]),
    average=st.sampled_from(["ema", "sum"]),
    relative=st.sampled_from([None, "trace", "layer"]),
    statistics=st.integers(1, 3),
    refresh=st.integers(1, 3),
)
def test_a_window_that_forgets_nothing_is_the_standard_block(
    partition, exponent, average, relative, statistics, refresh
):
    """With roots of the standard block refreshed at every statistic, as the window's are."""
    moment = {"average": average, "beta": 0.8, "debias": True}
    root = Root(exponent, Damping(0.1, relative))
    windowed = Recipe(partition, Moment(**moment, window=12), root, schedule=Schedule(statistics, refresh))
    plain = Recipe(partition, Moment(**moment), root, schedule=Schedule(statistics, statistics))
    found, optimizer, model = train(windowed, 12)
    wanted, other, again = train(plain, 12)
    # λ is a tenth of the curvature's size, or of gradients of size 1: condition numbers below 1e4
    torch.testing.assert_close(found, wanted, rtol=0, atol=12 * 1e4 * torch.finfo(F64).eps)
    torch.testing.assert_close(optimizer.curvature(model), other.curvature(again), rtol=1e-12, atol=1e-12)
    assert 0 <= optimizer.health().residual["weight"] < 1e-12


def test_whatever_solves_for_the_small_matrix():
    steps = [train(Recipe("o | i", Moment(window=3), Root(1, 0.1, solver=solver)), 5)[0] for solver in ("auto", "eigh")]
    torch.testing.assert_close(*steps, rtol=0, atol=5 * 1e3 * torch.finfo(F64).eps)


def test_a_first_solve_that_fails_corrects_nothing():
    root = Root(1, 0.1, tolerance=1e-30)
    found, optimizer, _ = train(Recipe("o | i", Moment(window=3), root), 1)
    torch.testing.assert_close(found, -0.1 * gradient(0) / 0.1, rtol=1e-12, atol=0)
    assert optimizer.health().kept == {"weight": 4}


def test_a_checkpoint_of_another_solver_is_refused():
    made = {
        solver: train(Recipe("o | i", Moment(window=3), Root(1, 0.1, solver=solver)), 2) for solver in ("auto", "eigh")
    }
    with pytest.raises(ValueError, match="core_0"):
        made["eigh"][1].load_state_dict(made["auto"][1].state_dict())


@pytest.mark.parametrize("window", [1, 3, 7])
def test_what_is_older_is_forgotten(window):
    beta, steps = 0.8, 10
    _, optimizer, model = train(Recipe("o | i", Moment(beta=beta, window=window), Root(1, 0.1)), steps, lr=0.0)
    wanted = torch.zeros(20, 20, dtype=F64)
    for age in range(window):
        rows = gradient(steps - 1 - age)
        wanted += (1 - beta) * beta**age * torch.block_diag(*[torch.outer(row, row) for row in rows])
    torch.testing.assert_close(optimizer.curvature(model), wanted, rtol=1e-12, atol=1e-14)
    full = train(Recipe("o | i", Moment(beta=beta), Root(1, 0.1)), steps, lr=0.0)
    lost = full[1].curvature(full[2]).trace() - optimizer.curvature(model).trace()
    assert 0 < lost <= beta**window * (1 - beta) * sum(gradient(t).square().sum() for t in range(steps))


def test_a_masked_step_forgets_nothing():
    recipe = Recipe("o | i", Moment(window=2), Root(1, 0.1))
    _, optimizer, model = train(recipe, 3)
    optimizer.on_nonfinite = "mask"
    before, weight = optimizer.curvature(model), model.weight.detach().clone()
    model.weight.grad = torch.full((4, 5), torch.nan, dtype=F64)
    optimizer.step()
    assert torch.equal(optimizer.curvature(model), before)
    assert torch.equal(model.weight.detach(), weight)
    model.weight.grad = gradient(3)
    optimizer.step()
    assert torch.isfinite(model.weight).all()
    rows = [gradient(3), gradient(2)]
    kept = [torch.block_diag(*[torch.outer(row, row) for row in one]) for one in rows]
    torch.testing.assert_close(optimizer.curvature(model), 0.1 * kept[0] + 0.09 * kept[1], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("exponent", [1.0, 0.5])
def test_the_block(exponent):
    recipe = Recipe("o | i", Moment(window=9), Root(exponent, Damping(1.0)))
    check_block(WindowBlock, recipe=recipe, partitions=["| ...", "o | i", "i | o", "| (...)/3"], examples=12)


def windowed(model):
    return curvlib.MBF(model, linear_blocks="output", window=5)


def test_windowed_mbf():
    check_recipe(windowed, examples=2)
    for blocks in ("output", "input"):
        weights = []
        for window in (None, 20):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
            optimizer = curvlib.MBF(model, 0.01, linear_blocks=blocks, window=window, refresh_every=1)
            for _ in range(20):
                optimizer.zero_grad()
                F.cross_entropy(model(torch.randn(8, 6, dtype=F64)), torch.randint(0, 3, (8,))).backward()
                optimizer.step()
            weights.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
        torch.testing.assert_close(*weights, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("window", [4, 60])
def test_windowed_mbf_in_plain_lines(window):
    """A dense matrix for every neuron, of the last gradients alone, over 50 steps."""
    torch.manual_seed(0)
    model = nn.Linear(5, 4).double()
    lr, beta, mu, damping = 0.01, 0.8, 0.7, 0.3
    options = {"beta": beta, "momentum": mu, "damping": damping, "relative_damping": False, "grafting": None}
    optimizer = curvlib.MBF(model, lr, linear_blocks="output", window=window, debias=False, **options)
    weights = torch.cat([model.weight.detach(), model.bias.detach()[:, None]], 1)
    seen, m = [], torch.zeros_like(weights)
    for t in range(50):
        optimizer.zero_grad()
        F.cross_entropy(model(torch.randn(8, 5, dtype=F64)), torch.randint(0, 4, (8,))).backward()
        g = torch.cat([model.weight.grad, model.bias.grad[:, None]], 1)
        optimizer.step()
        seen = [*seen, g][-window:]
        m = mu * m + (1 - mu) * g
        for neuron in range(4):
            f = sum(
                (1 - beta) * beta**age * torch.outer(one[neuron], one[neuron]) for age, one in enumerate(seen[::-1])
            )
            step = torch.linalg.solve(f + damping * torch.eye(6, dtype=F64), m[neuron] / (1 - mu ** (t + 1)))
            weights[neuron] -= lr * step
        found = torch.cat([model.weight.detach(), model.bias.detach()[:, None]], 1)
        torch.testing.assert_close(found, weights, rtol=1e-9, atol=1e-11)


def test_bytes():
    """784 -> 1000: 0.1 GB, where the matrices and their inverses take 4.9."""
    for window, statistics, roots in (
        (32, 4 * 32_000 * (784 + 32), 4 * 32_000 * 32),
        (None, 4e3 * 784**2, 4e3 * 784**2),
    ):
        block = curvlib.blocks.block_for(
            curvlib.Partition("o | i").layout({"o": 1000, "i": 784}), Recipe("o | i", Moment(window=window))
        )
        found = {"statistics": 0, "cores" if window else "roots": 0}
        for spec in block.spec().values():
            if spec.role in found:
                found[spec.role] += 4 * torch.Size(spec.shape).numel()
        assert found["statistics"] == pytest.approx(statistics, rel=1e-3)
        assert found["cores" if window else "roots"] == pytest.approx(roots, rel=5e-2)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Moment(window=0), ValueError, "window must be a whole number from 1, got 0"),
        (lambda: Moment("samples", window=4), ValueError, "window keeps batch gradients"),
        (lambda: Moment(initial=1.0, window=4), ValueError, "initial=0"),
        (lambda: curvlib.MBF(nn.Linear(3, 2), window=4), ValueError, "not tied"),
        (
            lambda: CurvatureOptimizer(nn.Linear(3, 2, bias=False), Recipe("| o, i", Moment(window=4))),
            ValueError,
            "one dense factor",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(make, error, message):
    def build():
        optimizer = make()
        if isinstance(optimizer, CurvatureOptimizer):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = torch.ones_like(parameter)
            optimizer.step()

    with pytest.raises((error, PartitionError), match=message):
        build()
