"""What an optimizer makes of what it hears: precision and scales, padding, labels from the model."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from curvlib import (
    CurvatureOptimizer,
    Moment,
    NonFiniteGradient,
    Recipe,
    Root,
    Rule,
    Schedule,
    TapError,
)
from tests.listening import F64, Net, assert_same, batch, kronecker, run, statistics

SAMPLES, SIGNALS = "samples", "signals"
BOTH = pytest.mark.parametrize("of", [SAMPLES, SIGNALS])


# -- precision --------------------------------------------------------------------------------------------------------


def test_autocast_leaves_statistics_in_float32():
    model, x = Net().float(), batch()[0].float()
    optimizer = CurvatureOptimizer(model, kronecker(), lr=0.0)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(x)
    F.cross_entropy(logits.float(), batch()[1]).backward()
    optimizer.step()
    assert {value.dtype for value in statistics(optimizer).values()} == {torch.float32}
    reference = run(Net().float(), x=(x, batch()[1]))
    assert_same(optimizer, reference, rtol=3e-2)


def scaled_step(model, optimizer, scaler, clip=False, factor=1.0):
    optimizer.zero_grad()
    x, y = batch()
    scaler.scale(F.cross_entropy(model(x), y) * factor).backward()
    if clip:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()


@BOTH
@pytest.mark.parametrize("clip", [False, True])
def test_the_scale_of_a_scaler_stays_out_of_statistics(of, clip):
    model = Net()
    optimizer = CurvatureOptimizer(model, kronecker(of), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    if clip:
        optimizer.loss_scale = scaler.get_scale
    scaled_step(model, optimizer, scaler, clip)
    assert_same(optimizer, run(Net(), of))


def test_an_unscaled_gradient_without_a_known_scale_is_an_error():
    model = Net()
    optimizer = CurvatureOptimizer(model, kronecker(), lr=0.0)
    with pytest.raises(TapError, match=r"loss_scale = scaler\.get_scale"):
        scaled_step(model, optimizer, torch.amp.GradScaler("cpu"), clip=True)


@pytest.mark.parametrize("clip", [False, True])
def test_an_overflow_changes_nothing(clip):
    model, plain = Net(), Net()
    optimizer = CurvatureOptimizer(model, kronecker(), lr=0.1)
    reference = CurvatureOptimizer(plain, kronecker(), lr=0.1)
    scaler, other = (torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000) for _ in range(2))
    for one, scale in ((optimizer, scaler), (reference, other)):
        one.loss_scale = scale.get_scale if clip else 1.0
    scaled_step(model, optimizer, scaler, clip)
    scaled_step(plain, reference, other, clip)
    before = statistics(optimizer), [parameter.clone() for parameter in model.parameters()]
    scaled_step(model, optimizer, scaler, clip, factor=1e308)
    assert_same(statistics(optimizer), before[0])
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), before[1], strict=True))
    scaled_step(model, optimizer, scaler, clip)
    scaled_step(plain, reference, other, clip)
    assert_same(optimizer, reference)


def test_signals_that_are_not_finite_are_reported_by_name_and_harm_nothing():
    model = Net()
    optimizer = CurvatureOptimizer(model, kronecker(labels="exact"), lr=0.1)
    x, y = batch()

    def backward():
        optimizer.zero_grad()
        logits = model(x)
        optimizer.observe(logits, "gaussian")
        F.cross_entropy(logits, y).backward()

    backward()
    optimizer.step()
    before = statistics(optimizer)
    backward()
    for ear in optimizer._taps.ears.values():
        for value in ear.sums.tensors.values():
            value.fill_(float("nan"))
    with pytest.raises(NonFiniteGradient, match=r"the signals of stages\.0\.0\.weight"):
        optimizer.step()
    assert_same(statistics(optimizer), before)
    backward()
    optimizer.step()
    assert all(value.isfinite().all() for value in statistics(optimizer).values())


# -- padding and thinning ---------------------------------------------------------------------------------------------


class Tokens(nn.Module):
    """A linear model of sequences, position by position."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 5).double(), nn.Linear(5, 3).double()

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


@pytest.mark.parametrize(("of", "sharing"), [(SAMPLES, "expand"), (SIGNALS, "expand"), (SIGNALS, "reduce")])
@pytest.mark.parametrize("labels", ["data", "sampled", "exact"])
def test_padding_never_enters_a_statistic(of, sharing, labels):
    lengths = torch.tensor([4, 2, 0, 3])
    mask = torch.arange(4) < lengths[:, None]
    x = torch.randn(4, 4, 4, dtype=F64, generator=torch.Generator().manual_seed(0))
    y = torch.randint(0, 3, (4, 4), generator=torch.Generator().manual_seed(1)).where(mask, -100)
    held = []
    for garbage in (0.0, 1e3):
        model = Tokens()
        optimizer = CurvatureOptimizer(model, kronecker(of, sharing=sharing, labels=labels), lr=0.0)
        logits = model(x.where(mask[:, :, None], garbage))
        optimizer.observe(logits, "categorical", mask=mask, generator=torch.Generator().manual_seed(3))
        F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-100).backward()
        optimizer.step()
        held.append(statistics(optimizer))
    if labels != "sampled":  # what is drawn at a padded position changes nothing, but how a draw is made may
        assert_same(*held)
    if of == SIGNALS and sharing == "expand":
        rows = torch.cat([x[mask], x.new_ones(int(mask.sum()), 1)], 1)
        torch.testing.assert_close(held[1][0, "factor_0_1"], (rows.T @ rows / len(rows))[None])


def test_a_mask_that_does_not_fit_is_an_error():
    model = Net()
    optimizer = CurvatureOptimizer(model, kronecker(labels="exact"))
    with pytest.raises(ValueError, match=r"mask must be bool with 8 examples first, got torch\.float64"):
        optimizer.observe(model(batch()[0]), "categorical", mask=torch.ones(8, dtype=F64))


def test_what_is_told_of_one_forward_pass_is_not_taken_for_the_next():
    x, y = batch(12)
    model = Net()
    optimizer = CurvatureOptimizer(model, kronecker(SAMPLES), lr=0.0)
    for number, (some, wanted) in enumerate(zip(x.split([4, 8]), y.split([4, 8]), strict=True)):
        logits = model(some)
        if number == 0:
            optimizer.observe(logits)
        (F.cross_entropy(logits, wanted, reduction="sum") / 12).backward()
    optimizer.step()
    assert_same(optimizer, run(Net(), SAMPLES, (x, y)))


@pytest.mark.parametrize("labels", ["sampled", "exact"])
def test_pulled_labels_are_no_examples_of_a_sum(labels):
    models = [Net(), Net()]
    x, y = batch()
    for model, reduction in zip(models, ["mean", "sum"], strict=True):
        optimizer = CurvatureOptimizer(model, kronecker(labels=labels), lr=0.1, reduction=reduction)
        logits = model(x)
        optimizer.observe(logits, "categorical")
        F.cross_entropy(logits, y, reduction=reduction).backward()
        optimizer.step()
    for one, two in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, two)


def test_thinning_takes_every_second_and_scales_up():
    x, y = batch()
    thin = run(Net(), SAMPLES, (x, y), subsample=2)
    half = run(Net(), SAMPLES, (x[::2], y[::2]))
    assert_same(thin, half)
    tokens = torch.randn(3, 6, 4, dtype=F64)
    outputs = []
    for options, some in (({"subsample": 2}, tokens), ({}, tokens[:, ::2])):
        model = Tokens()
        optimizer = CurvatureOptimizer(model, kronecker(SIGNALS, **options), lr=0.0)
        model(some).square().sum((1, 2)).mean().backward()
        optimizer.step()
        outputs.append(statistics(optimizer))
    for (index, name), value in outputs[0].items():
        scale = 2 if name == "factor_0_0" else 1  # there are twice as many positions' gradients
        torch.testing.assert_close(value, scale * outputs[1][index, name])


# -- labels -----------------------------------------------------------------------------------------------------------


def test_a_due_step_without_observing_says_so_and_others_do_not_need_it():
    model = Net()
    table = Recipe("| o, i", Moment(SIGNALS, labels="sampled"), Root(1, 0.1), Rule(), Schedule(2, 2), join_bias=True)
    optimizer = CurvatureOptimizer(model, table, lr=0.1)
    x, y = batch()
    for step in range(4):
        optimizer.zero_grad()
        logits = model(x)
        if step != 2:
            optimizer.observe(logits, "categorical")
        F.cross_entropy(logits, y).backward()
        if step == 2:
            with pytest.raises(TapError, match=r"labels='sampled'.*call optimizer\.observe\(outputs, likelihood"):
                optimizer.step()
            break
        optimizer.step()
    with pytest.raises(ValueError, match=r"labels='sampled' needs a likelihood, one of 'categorical'"):
        optimizer.observe(model(x))
    with pytest.raises(ValueError, match=r"likelihood must be one of .* got 'poisson'"):
        optimizer.observe(model(x), "poisson")


def test_drawn_labels_follow_from_the_seed_and_the_step():
    held = []
    for seed in (0, 0, 1):
        torch.manual_seed(17 + len(held))
        model = Net()
        optimizer = CurvatureOptimizer(model, kronecker(labels="sampled"), lr=0.0)
        optimizer.seed = seed
        logits = model(batch()[0])
        optimizer.observe(logits, "categorical")
        logits.sum().backward()
        optimizer.step()
        held.append(statistics(optimizer))
    assert_same(held[0], held[1])
    assert not torch.allclose(held[0][0, "factor_0_0"], held[2][0, "factor_0_0"])


def test_observing_leaves_gradients_alone():
    model, plain = Net(), Net()
    run(model, labels="exact", observe=True)
    run(plain)
    for one, two in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one.grad, two.grad)
