"""What is heard of layers under every circumstance of training, against the plain eager loop."""

from __future__ import annotations

import copy
import gc
import io
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import curvlib
from curvlib import (
    CurvatureOptimizer,
    Moment,
    Recipe,
    Root,
    Route,
    Rule,
    Schedule,
    TapError,
    TapWarning,
)
from curvlib.hooks import save
from tests.listening import F64, Net, assert_same, batch, kronecker, recipe_of, run

SAMPLES, SIGNALS = "samples", "signals"
BOTH = pytest.mark.parametrize("of", [SAMPLES, SIGNALS])


# -- checkpointing, compilation, activations --------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("mode", ["non-reentrant", "reentrant"])
def test_checkpointing_changes_nothing(of, mode):
    data = batch()
    data[0].requires_grad_(mode == "reentrant")
    assert_same(run(Net(mode), of, data), run(Net(), of))


@pytest.mark.parametrize("labels", ["sampled", "exact"])
def test_checkpointing_without_reentry_can_be_observed(labels):
    assert_same(run(Net("non-reentrant"), labels=labels, observe=True), run(Net(), labels=labels, observe=True))


def test_checkpointing_still_frees_inputs():
    model = Net("non-reentrant")
    held = []
    model.stages[0][2].register_forward_pre_hook(lambda _, args: held.append(weakref.ref(args[0])))
    CurvatureOptimizer(model, kronecker())
    loss = model(batch()[0]).sum()
    gc.collect()
    assert held[0]() is None
    loss.backward()


def test_what_reentrant_checkpointing_forbids_is_refused_by_name():
    data = batch()
    data[0].requires_grad_()
    with pytest.raises(TapError, match="use_reentrant=False"):
        run(Net("reentrant"), x=data, labels="exact", observe=True)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("of", [SAMPLES, SIGNALS])
def test_a_compiled_model_is_heard_if_it_was_attached_before(of, backend):
    torch._dynamo.reset()
    model = Net()
    assert_same(run(model, of, call=torch.compile(model, backend=backend), steps=2), run(Net(), of, steps=2))
    torch._dynamo.reset()
    model = Net()
    model.compile(backend=backend)
    assert_same(run(model, of, steps=2), run(Net(), of, steps=2))


def test_hooks_after_compilation_are_an_error_by_name():
    torch._dynamo.reset()
    model = Net()
    compiled = torch.compile(model, backend="eager")
    compiled(batch()[0])
    with pytest.raises(
        TapError, match=r"nothing was heard of stages\.0\.0\.weight.*before the first call of a compiled"
    ):
        run(model, call=compiled)


@BOTH
def test_activations_in_place_change_nothing(of):
    assert_same(run(Net(inplace=True), of), run(Net(), of))


def test_inputs_by_keyword_are_heard():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(4, 3).double()

        def forward(self, x):
            return self.layer(input=x)

    model = Keyword()
    assert_same(run(model), run(copy.deepcopy(model).layer))


# -- what happens between steps ---------------------------------------------------------------------------------------


@BOTH
def test_evaluation_and_passes_without_grad_or_backward_change_nothing(of):
    def before(_, model):
        other = batch(5, seed=9)[0]
        with torch.no_grad():
            model(other)
        model.eval()
        model(other)
        model.train()
        torch.func.vmap(torch.func.grad(lambda x: model(x[None]).sum()))(other)

    assert_same(run(Net(), of, before=before), run(Net(), of))


@BOTH
def test_of_closures_that_are_evaluated_twice_the_last_one_counts(of):
    model = Net()
    optimizer = CurvatureOptimizer(model, kronecker(of), lr=0.0)
    x, y = batch()

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    closure()
    optimizer.step(closure)
    assert_same(optimizer, run(Net(), of))


@BOTH
@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_closure_may_drop_gradients_by_the_model(of, set_to_none):
    model = Net()
    optimizer = CurvatureOptimizer(model, kronecker(of), lr=0.0)
    x, y = batch()

    def closure():
        model.zero_grad(set_to_none)
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    closure()
    optimizer.step(closure)
    assert_same(optimizer, run(Net(), of))


@BOTH
@pytest.mark.parametrize("labels", ["data", "exact"])
def test_a_closure_that_keeps_gradients_keeps_what_was_heard(of, labels):
    model = Net()
    optimizer = CurvatureOptimizer(model, kronecker(of, labels=labels), lr=0.0)
    x, y = batch(12)

    def closure(place):
        logits = model(x[place])
        optimizer.observe(logits, "categorical")
        loss = F.cross_entropy(logits, y[place]) / 3
        loss.backward()
        return loss

    closure(slice(0, 4))
    closure(slice(4, 8))
    optimizer.step(lambda: closure(slice(8, 12)))
    assert_same(optimizer, run(Net(), of, (x, y), observe=True, labels=labels))


@BOTH
@pytest.mark.parametrize("labels", ["data", "sampled", "exact"])
def test_gradients_may_be_dropped_between_observing_and_backward(of, labels):
    def drop(optimizer, _):
        optimizer.zero_grad()

    held = [run(Net(), of, observe=True, labels=labels, steps=2, before=one) for one in (drop, None)]
    assert_same(*held)


@BOTH
def test_what_was_observed_goes_with_its_gradients(of):
    model = Net()
    optimizer = CurvatureOptimizer(model, kronecker(of, labels="exact"), lr=0.0)
    for seed in (5, 1):
        x, y = batch(seed=seed)
        optimizer.zero_grad()
        logits = model(x)
        optimizer.observe(logits, "categorical")
        F.cross_entropy(logits, y).backward()
    optimizer.step()
    assert_same(optimizer, run(Net(), of, observe=True, labels="exact"))


@pytest.mark.parametrize("kind", [curvlib.AdaHessian, curvlib.TNT, curvlib.LayerwiseAdamW])
def test_gradients_may_be_dropped_between_further_passes_and_backward(kind):
    models = [Net(), Net()]
    for model, late in zip(models, (True, False), strict=True):
        optimizer = kind(model)
        for _ in range(2):
            x, y = batch()
            if not late:
                optimizer.zero_grad()
            logits = model(x)
            loss = F.cross_entropy(logits, y)
            optimizer.observe(logits, "categorical", loss=loss)
            if late:
                optimizer.zero_grad()
            loss.backward(retain_graph=optimizer.needs_graph)
            optimizer.step()
    assert all(torch.equal(one, two) for one, two in zip(models[0].parameters(), models[1].parameters(), strict=True))


@BOTH
def test_gradients_dropped_between_forward_and_backward_do_not_matter(of):
    assert_same(run(Net(), of, before=lambda optimizer, _: optimizer.zero_grad()), run(Net(), of))


@BOTH
@pytest.mark.parametrize("how", ["mean", "added means", "sum"])
def test_equal_micro_batches_are_the_big_batch(of, how):
    x, y = batch(12)
    reduction = {"mean": "mean", "added means": 3.0, "sum": "sum"}[how]
    model = Net()
    optimizer = CurvatureOptimizer(model, kronecker(of), lr=0.1, reduction=reduction)
    for some, wanted in zip(x.chunk(3), y.chunk(3), strict=True):
        loss = F.cross_entropy(model(some), wanted, reduction="sum" if how == "sum" else "mean")
        (loss / 3 if how == "mean" else loss).backward()
    optimizer.step()
    whole = Net()
    reference = CurvatureOptimizer(whole, kronecker(of), lr=0.1)
    F.cross_entropy(whole(x), y).backward()
    reference.step()
    assert_same(optimizer, reference)
    for one, two in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(one, two)


def test_sum_losses_know_their_examples_also_between_statistics():
    models = [Net(), Net()]
    x, y = batch()
    for model, reduction in zip(models, ["mean", "sum"], strict=True):
        table = Recipe("| o, i", Moment(SIGNALS), Root(1, 0.1), Rule(), Schedule(3, 3), join_bias=True)
        optimizer = CurvatureOptimizer(model, table, lr=0.1, reduction=reduction)
        for n in (8, 6, 4, 8):
            optimizer.zero_grad()
            F.cross_entropy(model(x[:n]), y[:n], reduction=reduction).backward()
            optimizer.step()
    for one, two in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, two)


# -- shared layers ----------------------------------------------------------------------------------------------------


class Twice(nn.Module):
    """One layer called two times."""

    def __init__(self, second=slice(None)):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.head, self.second = nn.Linear(4, 4).double(), nn.Linear(4, 3).double(), second

    def forward(self, x):
        first = self.layer(x)
        again = self.layer(torch.tanh(first)[self.second])
        return self.head(first + (again if self.second == slice(None) else again.mean(0)))


def example_gradients(optimizer, model, x, y, parameters):
    """Of every example's own loss, ``[n, numel]``."""
    with optimizer.paused():
        return loop_gradients(model, x, y, parameters)


def loop_gradients(model, x, y, parameters):
    rows = []
    for one, wanted in zip(x, y, strict=True):
        loss = F.cross_entropy(model(one[None]), wanted[None])
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
    return torch.stack(rows)


def full(model, x, y, **options):
    optimizer = CurvatureOptimizer(model, recipe_of("| ...", **options), lr=0.0)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    return optimizer


def test_several_calls_of_a_layer_add_up_before_the_outer_product():
    model, (x, y) = Twice(), batch()
    optimizer = full(model, x, y, join_bias=True)
    rows = example_gradients(optimizer, model, x, y, [model.layer.weight, model.layer.bias])
    torch.testing.assert_close(optimizer.curvature(model.layer), rows.T @ rows / 8, rtol=1e-10, atol=1e-12)


def test_calls_with_different_batches_have_the_moment_of_gradients():
    with pytest.warns(TapWarning, match=r"layer\.weight: layer is called with a batch of 3 for 8 examples"):
        optimizer = full(Twice(slice(0, 3)), *batch(), join_bias=True)
    assert "on the batch gradient" in optimizer.routing()["layer.weight"]


class Tied(nn.Module):
    """Two layers with one weight: two projections, or an embedding and the head."""

    def __init__(self, embedding):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Embedding(6, 6) if embedding else nn.Linear(6, 6, bias=False)
        self.second = nn.Linear(6, 6, bias=False)
        self.second.weight = self.first.weight
        self.double()

    def forward(self, x):
        x = torch.tanh(self.first(x))
        return self.second(x if x.ndim == 2 else x.sum(1))


@pytest.mark.parametrize("embedding", [False, True])
def test_a_weight_of_two_layers_hears_both(embedding):
    model, (x, y) = Tied(embedding), batch(width=6)
    x = torch.randint(0, 6, (8, 3)) if embedding else x
    optimizer = full(model, x, y)
    rows = example_gradients(optimizer, model, x, y, [model.first.weight])
    torch.testing.assert_close(optimizer.curvature(model.first), rows.T @ rows / 8, rtol=1e-10, atol=1e-12)


def test_a_weight_tied_along_different_axes_has_no_independent_factors():
    with pytest.warns(TapWarning, match=r"second\.weight and first\.weight are tied along different axes"):
        CurvatureOptimizer(Tied(embedding=True), recipe_of("| v, d", SIGNALS))


class Folded(nn.Module):
    """Rows of an example are examples of the inner layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = nn.Linear(2, 5).double(), nn.Linear(10, 3).double()

    def forward(self, x):
        return self.outer(torch.tanh(self.inner(x.reshape(-1, 2))).reshape(len(x), 10))


def test_rows_folded_into_the_batch_are_told_by_observing():
    (x, y) = batch()
    with pytest.raises(TapError, match=r"layer inner has a batch of 16, layer outer one of 8: call optimizer\.observe"):
        full(Folded(), x, y, join_bias=True)
    model = Folded()
    optimizer = CurvatureOptimizer(model, recipe_of("| ...", join_bias=True), lr=0.0)
    logits = model(x)
    optimizer.observe(logits)
    F.cross_entropy(logits, y).backward()
    optimizer.step()
    rows = example_gradients(optimizer, model, x, y, [model.inner.weight, model.inner.bias])
    torch.testing.assert_close(optimizer.curvature(model.inner), rows.T @ rows / 8, rtol=1e-10, atol=1e-12)


class Positions(nn.Module):
    """Tokens and positions; these are the same for all examples."""

    def __init__(self, length=6):
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.positions = nn.Embedding(5, 4).double(), nn.Embedding(length, 4).double()
        self.head = nn.Linear(4, 3).double()

    def forward(self, x):
        return self.head(torch.tanh(self.tokens(x) + self.positions(torch.arange(x.shape[1])))).mean(1)


def three_steps(model, optimizer, x, y, observe):
    for _ in range(3):
        optimizer.zero_grad()
        logits = model(x)
        if observe:
            optimizer.observe(logits)
        F.cross_entropy(logits, y).backward()
        optimizer.step()


@pytest.mark.parametrize("n", [4, 3, 12])
@pytest.mark.parametrize("observe", [False, True])
def test_what_all_examples_share_has_the_moment_of_gradients(n, observe):
    model = Positions()
    optimizer = curvlib.KFAC(model, 0.1)
    x, y = torch.randint(0, 5, (n, 6)), torch.randint(0, 3, (n,))
    with pytest.warns(
        TapWarning, match=rf"positions\.weight: positions is called with a batch of 6 for {n} examples"
    ) as caught:
        three_steps(model, optimizer, x, y, observe)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert "on the batch gradient" in optimizer.routing()["positions.weight"]
    assert "on the batch gradient" not in optimizer.routing()["tokens.weight"]
    model.positions.weight.grad = None
    again = copy.deepcopy(optimizer)
    assert "on the batch gradient" in again.routing()["positions.weight"]


# -- what can't be heard ----------------------------------------------------------------------------------------------


def test_attention_is_routed_to_gradients_and_said_once():
    attention = nn.MultiheadAttention(4, 2).double()
    with pytest.warns(TapWarning, match=r"in_proj_weight: no tap.*out_proj\.weight: attention applies") as caught:
        optimizer = CurvatureOptimizer(attention, [Route(kronecker(), name="*weight"), Route(Recipe("... |"))])
    assert len(caught) == 1
    x = torch.randn(3, 2, 4, dtype=F64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            attention(x, x, x)[0].sum().backward()
            optimizer.step()
    assert "on the batch gradient: attention" in optimizer.routing()["out_proj.weight"]


def test_batch_normalisation_is_heard_in_evaluation_only():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double()
    table = [Route(recipe_of("... |"))]
    with pytest.warns(TapWarning, match="batch normalisation in training mode mixes examples"):
        CurvatureOptimizer(model, table)
    model.eval()
    optimizer = CurvatureOptimizer(model, table, lr=0.0)
    model.train()
    with pytest.raises(TapError, match=r"layer 1 \(BatchNorm1d\) was read in evaluation mode"):
        model(batch()[0]).sum().backward()
    optimizer.detach()


def test_frozen_layers_cost_nothing(monkeypatch):
    model = Net()
    for parameter in model.stages[0].parameters():
        parameter.requires_grad_(False)
    saved = []
    monkeypatch.setattr("curvlib.taps.save", lambda value: saved.append(value) or save(value))
    optimizer = run(model)
    assert len(saved) == 1
    assert len(optimizer.state) == 2


# -- traces -----------------------------------------------------------------------------------------------------------


def hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_hooks_with_kwargs) for module in model.modules())


def test_detaching_leaves_no_trace():
    model = Net()
    optimizer = run(model)
    assert hooks(model)
    optimizer.detach()
    assert hooks(model) == 0
    assert hooks(Net()) == 0


def test_copies_and_pickles_of_the_model_are_silent():
    model = Net()
    optimizer = CurvatureOptimizer(model, kronecker(), lr=0.0)
    twin = copy.deepcopy(model)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    loaded = torch.load(stream, weights_only=False)
    for other in (twin, loaded):
        other(batch()[0]).sum().backward()
    x, y = batch()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert_same(optimizer, run(Net()))
    assert not any(isinstance(value, CurvatureOptimizer) for value in gc.get_referents(twin))


def test_a_model_outlives_its_optimizer():
    model = Net()
    reference = weakref.ref(run(model))
    gc.collect()
    assert reference() is None
    model(batch()[0]).sum().backward()


def test_a_new_optimizer_does_not_disturb_an_older_one():
    model = Net()
    first, second = (CurvatureOptimizer(model, kronecker(), lr=0.0) for _ in range(2))
    x, y = batch()
    F.cross_entropy(model(x), y).backward()
    first.step()
    second.step()
    assert_same(first, second)
    assert curvlib.__version__
