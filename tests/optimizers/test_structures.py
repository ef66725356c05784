"""A new block structure is a string: it trains, without a line of code beyond the call."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import curvlib
from curvlib import CurvatureOptimizer, Damping, Grafting, Moment, Momentum, Recipe, Root, Route, Rule, Schedule
from tests.optimizers.oracles import symmetric_power


class Attention(nn.Module):
    """Self-attention with one fused projection; a head's queries, keys and values lie together."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x):
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).view(batch, length, self.heads, 3, -1).permute(3, 0, 2, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape))


class Transformer(nn.Module):
    """One block and a readout."""

    def __init__(self, tokens=8, width=16, heads=4):
        super().__init__()
        self.embed, self.position = nn.Embedding(tokens, width), nn.Parameter(torch.randn(12, width) / 10)
        self.first, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.second = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.read = nn.Linear(width, tokens)

    def forward(self, tokens):
        x = self.embed(tokens) + self.position[: tokens.shape[1]]
        x = x + self.attention(self.first(x))
        return self.read(x + self.mlp(self.second(x)))


RULE = Rule(Momentum(0.9, "ema", debias=True), Grafting("adam"))
ADAM = Recipe(
    "... |",
    Moment(beta=0.999, debias=True),
    Root(0.5, Damping(1e-8, outside=True)),
    Rule(Momentum(0.9, "ema", debias=True)),
)


def copy_task(seed, count=32):
    """Sequences that repeat themselves: the second half can be read off the first."""
    half = torch.randint(0, 8, (count, 6), generator=torch.Generator().manual_seed(seed))
    return torch.cat([half, half], 1)


def train(model, optimizer, steps=150, listen=None):
    """The losses on the copy task."""
    losses = []
    for step in range(steps):
        tokens = copy_task(step)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(tokens)[:, 5:-1].flatten(0, 1), tokens[:, 6:].flatten())
        loss.backward()
        if listen is not None:
            listen()
        optimizer.step()
        losses.append(loss.item())
    return losses


def heads_recipe(composition, exponent, damping):
    return Recipe(
        partition="head | d, i",
        moment=Moment(beta=0.95, debias=True, composition=composition),
        root=Root(exponent, Damping(damping, "trace", floor=1e-30)),
        rule=RULE,
        schedule=Schedule(refresh=5),
        axes="(head d) i",
        sizes={"head": 4},
    )


@pytest.mark.parametrize(
    ("composition", "exponent", "damping"), [("power-mean", 0.5, 1e-4), ("trace", 0.5, 1e-2), ("trace", 1.0, 1e-1)]
)
def test_per_head_blocks_of_a_fused_projection_train_a_transformer(composition, exponent, damping):
    torch.manual_seed(0)
    model = Transformer()
    weight = model.attention.qkv.weight
    routes = [Route(heads_recipe(composition, exponent, damping), name="*qkv.weight"), Route(ADAM)]
    optimizer = CurvatureOptimizer(model, routes, lr=1e-2)
    gradients = []
    losses = train(model, optimizer, listen=lambda: gradients.append(weight.grad.double()))
    assert losses[0] > 0.9 * math.log(8)
    assert sum(losses[-10:]) / 10 < 0.05  # 1.3 where the projection stays as it was
    assert optimizer.health().ok
    assert optimizer.routing()["attention.qkv.weight"].startswith("head | d, i")
    assert optimizer.routing()["mlp.0.weight"].startswith("... |")
    # what it holds, from the recorded gradients, one head after another
    dense = torch.zeros(weight.numel(), weight.numel(), dtype=torch.float64)
    for head in range(4):
        left, right = torch.zeros(12, 12).double(), torch.zeros(16, 16).double()
        for gradient in gradients:
            part = gradient[12 * head : 12 * head + 12]
            left, right = 0.95 * left + 0.05 * part @ part.T, 0.95 * right + 0.05 * part.T @ part
        left, right = left / (1 - 0.95**150), right / (1 - 0.95**150)
        if composition == "power-mean":
            kron = torch.kron(symmetric_power(left, 0.5), symmetric_power(right, 0.5))
        else:
            kron = torch.kron(left, right) / left.trace()
        rows = slice(12 * head * 16, (12 * head + 12) * 16)
        dense[rows, rows] = kron
    held = optimizer.curvature(weight).double()
    # float32 sums; a square root keeps only half the digits of a small eigenvalue
    accuracy = 1e-3 if composition == "power-mean" else 1e-5
    assert (held - dense).norm() < accuracy * dense.norm()
    assert not held[: 12 * 16, 12 * 16 :].any()


def test_the_wrong_heads_are_another_curvature():
    """The brute force above tells groupings apart: the same weight by three projections of four heads."""
    weight = nn.Parameter(torch.randn(12, 3, dtype=torch.float64))
    dense = []
    for axes in ("(head d) i", "(d head) i"):
        made = Recipe("head | d, i", Moment(beta=0.5), axes=axes, sizes={"head": 4})
        optimizer = CurvatureOptimizer([weight], made, lr=0.0)
        weight.grad = torch.arange(36, dtype=torch.float64).view(12, 3)
        optimizer.step()
        dense.append(optimizer.curvature(weight))
    order = torch.arange(36).view(3, 4, 3).transpose(0, 1).flatten()  # (d head) i -> head d i
    assert not torch.allclose(dense[0], dense[1])
    permuted = dense[1][order][:, order]
    grid = weight.grad.view(3, 4, 3).transpose(0, 1)
    blocks = [torch.kron(0.5 * part @ part.T, 0.5 * part.T @ part) for part in grid]
    torch.testing.assert_close(permuted, torch.block_diag(*blocks))


def test_per_head_curvature_is_the_brute_force_one():
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(6, 5, dtype=torch.float64))
    recipe = Recipe("head | d, i", Moment(beta=0.5), axes="(head d) i", sizes={"head": 2})
    optimizer = CurvatureOptimizer([weight], recipe, lr=0.1)
    left, right = torch.zeros(2, 3, 3, dtype=torch.float64), torch.zeros(2, 5, 5, dtype=torch.float64)
    for _ in range(4):
        weight.grad = torch.randn(6, 5, dtype=torch.float64)
        for head in range(2):
            part = weight.grad[3 * head : 3 * head + 3]
            left[head] = 0.5 * left[head] + 0.5 * part @ part.T
            right[head] = 0.5 * right[head] + 0.5 * part.T @ part
        optimizer.step()
    dense = torch.block_diag(*(torch.kron(one, other) for one, other in zip(left, right, strict=True)))
    torch.testing.assert_close(optimizer.curvature(weight), dense)


STRUCTURES = [
    ("| o/32 i/32", "independent", 1.0),
    ("| o/8 i/8", "independent", 1.0),
    ("| (o i)~/o", "independent", 1.0),
    ("| (o i)/16", "independent", 1.0),
    ("| (o i)~/32", "independent", 1.0),
    ("| [o], [i]", "trace", 0.5),
    ("| [o], [i]", "independent", 0.5),
    ("| [o], i", "trace", 1.0),
    ("| o/8, i/8", "power-mean", 0.5),
    ("~o/8 | i", "independent", 1.0),
    ("~o | i/4", "independent", 0.5),
    ("o | i", "independent", 1.0),
    ("| ...", "independent", 1.0),
]


@pytest.mark.parametrize(("text", "composition", "exponent"), STRUCTURES)
def test_structures_that_nobody_ships_train(text, composition, exponent):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 40), nn.Tanh(), nn.Linear(40, 4))
    inputs = torch.randn(256, 10)
    targets = (inputs @ torch.randn(10, 4)).argmax(1)
    moment = Moment(beta=0.9, debias=True, composition=composition)
    matrices = Recipe(text, moment, Root(exponent, Damping(0.1, "layer", floor=1e-30)), RULE, Schedule(refresh=5))
    routes = [Route(matrices, where=lambda slot: slot.ndim == 2), Route(ADAM)]
    optimizer = CurvatureOptimizer(model, routes, lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.35
    assert optimizer.health().ok


def test_a_structure_that_is_no_partition_needs_three_methods():
    class LayerScale(curvlib.blocks.Block):
        """One number a layer: the mean square of its gradient."""

        def spec(self):
            return {"mean": curvlib.blocks.Spec(())}

        def update(self, state, operand, keep, gain):
            state["mean"].mul_(keep).add_(operand.flatten(1).pow(2).mean(1), alpha=gain)

        def apply(self, state, operand, recipe, exponent, scale):
            damped = state["mean"] * scale + float(recipe.damping.value)
            return operand * (damped**-exponent).view(-1, *[1] * (operand.ndim - 1))

        def dense(self, state, recipe, scale):
            return torch.stack(
                [torch.eye(self.layout.shape[0] * self.layout.shape[1]) * one for one in state["mean"] * scale]
            )

    ours, theirs = ([nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(3, 2))] for _ in range(2))
    root = Root(1, 0.1)
    custom = CurvatureOptimizer(ours, Recipe("| ...", root=root, block=LayerScale), lr=0.1)
    tied = CurvatureOptimizer(theirs, Recipe("~o ~i |", root=root), lr=0.1)
    for _ in range(5):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(3, 2)
            other.grad = one.grad.clone()
        custom.step()
        tied.step()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.detach(), other.detach())
        torch.testing.assert_close(custom.curvature(one), tied.curvature(other))
    custom.load_state_dict(custom.state_dict())
    with pytest.raises(TypeError, match=r"Block must define update\(\)"):
        curvlib.blocks.Block(None, None).update({}, None, 0.0, 1.0)
