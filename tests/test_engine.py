"""The engine: schedules, staggering, cohorts, masks, precision."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import curvlib
from curvlib import (
    Clip,
    CurvatureOptimizer,
    Damping,
    Grafting,
    Moment,
    Momentum,
    Recipe,
    Root,
    Route,
    Rule,
    Schedule,
    roots,
)


def watched(monkeypatch):
    """Record the factors of every refresh, step by step."""
    seen, real = [], roots.refresh

    def refresh(jobs):
        jobs = list(jobs)
        seen.append([(job.root.data_ptr() + 0, len(job.root), job.root[0].numel()) for job in jobs])
        real(jobs)

    monkeypatch.setattr(roots, "refresh", refresh)
    return seen


def steps(optimizer, parameters, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        optimizer.step()


@given(st.integers(1, 4), st.integers(1, 6), st.booleans())
@settings(max_examples=40, deadline=None)
def test_schedules_say_when(statistics, refresh, dense):
    schedule = Schedule(statistics, refresh, dense_start=dense)
    for step in range(20):
        assert schedule.takes_statistics(step) == (step % statistics == 0)
        early = dense and step <= refresh and step % statistics == 0
        assert schedule.refreshes(step) == (early or step % refresh == 0)


def test_all_at_once_refreshes_everything_every_period(monkeypatch):
    seen = watched(monkeypatch)
    parameters = [nn.Parameter(torch.randn(4, 3)) for _ in range(5)]
    steps(curvlib.Shampoo(parameters, refresh_every=4), parameters, 9)
    assert [sum(rows for _, rows, _ in step) for step in seen] == [10, 0, 0, 0, 10, 0, 0, 0, 10]


@given(st.integers(2, 7), st.lists(st.tuples(st.integers(2, 6), st.integers(2, 6)), min_size=1, max_size=6))
@settings(max_examples=40, deadline=None)
def test_staggering_refreshes_every_matrix_once_a_period(period, shapes):
    with pytest.MonkeyPatch.context() as patch:
        seen = watched(patch)
        parameters = [nn.Parameter(torch.randn(shape)) for shape in shapes]
        optimizer = curvlib.Shampoo(parameters, refresh_every=period, stagger=True)
        steps(optimizer, parameters, 2 * period + 1)
    matrices = 2 * len(shapes)
    assert sum(rows for _, rows, _ in seen[0]) == matrices
    for first in (1, 1 + period):
        window = seen[first : first + period]
        done = [(start + 4 * row * numel) for step in window for start, rows, numel in step for row in range(rows)]
        assert len(done) == len(set(done)) == matrices


def test_staggered_work_is_even():
    with pytest.MonkeyPatch.context() as patch:
        seen = watched(patch)
        parameters = [nn.Parameter(torch.randn(4, 4)) for _ in range(40)]
        steps(curvlib.Shampoo(parameters, refresh_every=8, stagger=True), parameters, 17)
    assert {sum(rows for _, rows, _ in step) for step in seen[1:]} == {10}


def test_all_at_once_and_staggered_share_the_first_step():
    parameters = [[nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(3, 5))] for _ in range(2)]
    for stagger, mine in zip((False, True), parameters, strict=True):
        steps(curvlib.Shampoo(mine, refresh_every=5, stagger=stagger), mine, 1)
    for one, other in zip(*parameters, strict=True):
        assert torch.equal(one, other)


def test_statistics_every_other_step():
    weight = nn.Parameter(torch.zeros(2, 3))
    recipe = Recipe("| o i", Moment(beta=0.5), schedule=Schedule(statistics=2))
    optimizer = CurvatureOptimizer([weight], recipe, lr=0.1)
    gradients = torch.randn(5, 2, 3)
    for gradient in gradients:
        weight.grad = gradient
        optimizer.step()
    expected = torch.zeros(6, 6)
    for gradient in gradients[::2]:
        expected = 0.5 * expected + 0.5 * torch.outer(gradient.flatten(), gradient.flatten())
    torch.testing.assert_close(optimizer.curvature(weight), expected)
    assert (int(optimizer.state[weight]["step"]), int(optimizer.state[weight]["updates"])) == (5, 3)


def test_averages_are_what_they_say():
    gradients = torch.randn(4, 2, 3, dtype=torch.float64)
    outers = torch.stack([torch.outer(one.flatten(), one.flatten()) for one in gradients])
    ema = torch.zeros(6, 6, dtype=torch.float64)
    for one in outers:
        ema = 0.9 * ema + (1 - 0.9) * one
    start = 0.3 * torch.eye(6, dtype=torch.float64)
    expectations = {
        Moment(average="sum"): outers.sum(0),
        Moment(average="mean"): outers.mean(0),
        Moment(beta=0.9): ema,
        Moment(beta=0.9, debias=True): ema / (1 - 0.9**4),
        Moment(average="sum", initial=0.3): start + outers.sum(0),
    }
    for moment, expected in expectations.items():
        weight = nn.Parameter(torch.zeros(2, 3, dtype=torch.float64))
        optimizer = CurvatureOptimizer([weight], Recipe("| o i", moment), lr=0.0)
        for gradient in gradients:
            weight.grad = gradient
            optimizer.step()
        torch.testing.assert_close(optimizer.curvature(weight), expected, msg=str(moment))


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("name", ["SGD", "Adam", "RMSprop", "Adagrad", "MomentumAdam", "Shampoo", "MBF"])
def test_a_masked_step_changes_no_parameter_and_no_statistic(name, known, monkeypatch):
    """As on an accelerator, too, where the engine does not know that it is masked."""
    monkeypatch.setattr(curvlib.optimizer, "_known", lambda gate: known)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    optimizer = getattr(curvlib, name)(model, lr=0.1, weight_decay=0.1)
    optimizer.on_nonfinite = "mask"
    parameters = list(model.parameters())
    steps(optimizer, parameters, 3)
    before = copy.deepcopy([parameter.detach() for parameter in parameters])
    held = {key: value.clone() for key, value in flattened(optimizer).items()}
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    parameters[0].grad[0, 0] = torch.inf
    optimizer.step()
    assert all(torch.equal(old, new) for old, new in zip(before, parameters, strict=True))
    for key, value in flattened(optimizer).items():
        if known or (not key.endswith(("step", "updates")) and "root" not in key and "residual" not in key):
            assert torch.equal(value, held[key]), key
    assert optimizer.health().masked == {"0.weight": 1}
    steps(optimizer, parameters, 1)
    assert all(parameter.isfinite().all() for parameter in parameters)


def flattened(optimizer):
    names = {id(parameter): str(number) for number, parameter in enumerate(optimizer.param_groups[0]["params"])}
    return {
        f"{names[id(parameter)]}.{name}": value
        for parameter, record in optimizer.state.items()
        for name, value in record.items()
    }


def test_an_open_mask_is_no_mask():
    parameters = [[nn.Parameter(torch.ones(4, 3, dtype=torch.float64))] for _ in range(2)]
    for mode, mine in zip(("mask", "raise"), parameters, strict=True):
        optimizer = curvlib.MBF(mine, lr=0.1, weight_decay=0.1)
        optimizer.on_nonfinite = mode
        steps(optimizer, mine, 5)
    torch.testing.assert_close(parameters[0][0], parameters[1][0], rtol=1e-13, atol=1e-13)


def test_a_failed_root_keeps_the_last_one_and_is_counted(monkeypatch):
    weight = nn.Parameter(torch.randn(3, 3))
    optimizer = curvlib.Shampoo([weight], refresh_every=1)
    steps(optimizer, [weight], 2)
    kept = optimizer.state[weight]["root_0_0"].clone()

    def fails(matrix):
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    steps(optimizer, [weight], 1, seed=1)
    assert torch.equal(optimizer.state[weight]["root_0_0"], kept)
    health = optimizer.health()
    assert health.kept == {"parameter 0 of group 0": 2}
    assert not health.ok
    assert "previous root kept 2 times" in str(health)
    assert weight.isfinite().all()


def test_clips_bound_the_whole_step():
    for clip, limit in ((Clip("norm", 0.01), None), (Clip("kl", 1e-4), 1e-4)):
        parameters = [
            nn.Parameter(torch.zeros(4, 3, dtype=torch.float64)),
            nn.Parameter(torch.zeros(5, dtype=torch.float64)),
        ]
        matrices = Recipe("| ,...", root=Root(1, 0.1), rule=Rule(clip=clip))
        vectors = Recipe("... |", root=Root(1, 0.1), rule=Rule(clip=clip))
        table = (Route(matrices, kind="linear"), Route(vectors))
        optimizer = CurvatureOptimizer(parameters, table, lr=0.5)
        steps(optimizer, parameters, 1)
        if limit is None:
            norm = sum(parameter.pow(2).sum() for parameter in parameters).sqrt() / 0.5
            torch.testing.assert_close(norm, torch.tensor(0.01, dtype=torch.float64))
        else:
            # the step is ν lr d with ν = √(κ / Σ lr² gᵀd), so that lr gᵀ(step) = ν Σ lr² gᵀd = √(κ Σ lr² gᵀd)
            free = [nn.Parameter(torch.zeros_like(parameter)) for parameter in parameters]
            unclipped = (
                Route(Recipe("| ,...", root=Root(1, 0.1)), kind="linear"),
                Route(Recipe("... |", root=Root(1, 0.1))),
            )
            steps(CurvatureOptimizer(free, unclipped, lr=0.5), free, 1)
            size = sum((0.5 * -parameter * parameter.grad).sum() for parameter in free)
            shrink = (limit / size).sqrt()
            for one, other in zip(parameters, free, strict=True):
                torch.testing.assert_close(one.detach(), shrink * other.detach())


def test_a_wide_clip_clips_nothing():
    parameters = [[nn.Parameter(torch.zeros(4, 3))] for _ in range(2)]
    for rule, mine in zip((Rule(clip=Clip("norm", 1e9)), Rule()), parameters, strict=True):
        steps(CurvatureOptimizer(mine, Recipe("| ,...", rule=rule), lr=0.1), mine, 3)
    torch.testing.assert_close(parameters[0][0], parameters[1][0])


@pytest.mark.parametrize("kind", ["sgd", "adagrad", "rmsprop", "adam"])
def test_grafting_gives_the_norm_of_the_diagonal_method(kind):
    torch.manual_seed(0)
    weight, other = (nn.Parameter(torch.zeros(4, 3, dtype=torch.float64)) for _ in range(2))
    recipe = Recipe("| ,...", root=Root(0.5, 0.1), rule=Rule(Momentum(0.9, "ema", debias=True), Grafting(kind, 0.999)))
    optimizer = CurvatureOptimizer([weight], recipe, lr=1.0)
    average = Moment(average="sum") if kind == "adagrad" else Moment(beta=0.999, debias=kind == "adam")
    exponent = 0 if kind == "sgd" else 0.5
    diagonal = Recipe(
        "... |", average, Root(exponent, Damping(1e-8, outside=True)), Rule(Momentum(0.9, "ema", debias=True))
    )
    reference = CurvatureOptimizer([other], diagonal, lr=1.0)
    for _ in range(4):
        before = [parameter.detach().clone() for parameter in (weight, other)]
        weight.grad = other.grad = torch.randn(4, 3, dtype=torch.float64)
        optimizer.step()
        reference.step()
        norms = [(new - old).norm() for old, new in zip(before, (weight.detach(), other.detach()), strict=True)]
        torch.testing.assert_close(norms[0], norms[1])


def test_statistics_ignore_autocast_and_the_global_matmul_precision():
    weights = [nn.Parameter(torch.randn(32, 32, generator=torch.Generator().manual_seed(0))) for _ in range(2)]
    steps(curvlib.Shampoo([weights[0]]), [weights[0]], 3)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            steps(curvlib.Shampoo([weights[1]]), [weights[1]], 3)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(weights[0], weights[1])


@pytest.mark.parametrize("make", [curvlib.MBF, curvlib.Shampoo])
def test_averages_that_fade_become_zero_and_never_subnormal(make):
    weight = nn.Parameter(torch.ones(4, 3))
    optimizer = make([weight], lr=0.0, beta=0.8, momentum=0.8, refresh_every=50)
    tiny = torch.finfo(torch.float32).tiny
    for step in range(600):
        weight.grad = torch.zeros(4, 3)
        weight.grad[0] = 1.0
        if step == 0:
            weight.grad[1:] = 1.0
        optimizer.step()
        for name, value in optimizer.state[weight].items():
            if name.startswith(("factor", "root", "momentum")):
                assert not ((value != 0) & (value.abs() < tiny)).any(), (step, name)
    assert not optimizer.state[weight]["momentum"][1:].any()
    assert optimizer.state[weight]["momentum"][0].all()


def test_settings_that_change_a_structure_in_mid_training_are_refused():
    weight = nn.Parameter(torch.randn(4, 3))
    optimizer = curvlib.Shampoo([weight])
    steps(optimizer, [weight], 1)
    optimizer.param_groups[0]["block_size"] = 2
    with pytest.raises(ValueError, match=r"the state held belongs to another recipe.*parameter 0 of group 0"):
        steps(optimizer, [weight], 1)


def test_large_gradients_are_packed_one_by_one(monkeypatch):
    """With subnormal numbers set to zero on the way, as for many small ones together."""

    def trained(least):
        monkeypatch.setattr("curvlib.cohort._LARGE", least)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 4))
        optimizer = curvlib.Shampoo(model.parameters(), lr=0.1)
        for seed in range(3):
            torch.manual_seed(seed)
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
                parameter.grad.flatten()[0] = 1e-40
            optimizer.step()
        (packed,) = {
            float(one.workspace.flatten()[0]) for one in optimizer._storage.buckets if one.workspace is not None
        }
        assert packed == 0
        return [one.detach() for one in model.parameters()]

    for one, other in zip(trained(1), trained(1 << 14), strict=True):
        assert torch.equal(one, other)
