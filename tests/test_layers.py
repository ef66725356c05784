"""Layers: what their parameters are called, how a bias joins, and kinds that users register."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import curvlib
from curvlib.layers import LayerKind, Operand, bare_slot, describe, register_layer, split_axes


@pytest.mark.parametrize(
    ("layer", "kind", "weight", "bias"),
    [
        (nn.Linear(3, 4), "linear", {"o": 4, "i": 3}, {"o": 4}),
        (nn.Conv1d(2, 4, 3), "conv", {"o": 4, "i": 2, "k1": 3}, {"o": 4}),
        (nn.Conv2d(4, 6, (3, 2), groups=2), "conv", {"g": 2, "o": 3, "i": 2, "k1": 3, "k2": 2}, {"g": 2, "o": 3}),
        (nn.Conv3d(1, 2, 2), "conv", {"o": 2, "i": 1, "k1": 2, "k2": 2, "k3": 2}, {"o": 2}),
        (nn.ConvTranspose1d(3, 2, 4), "conv", {"i": 3, "o": 2, "k1": 4}, {"o": 2}),
        (nn.ConvTranspose2d(4, 6, 2, groups=2), "conv", {"g": 2, "i": 2, "o": 3, "k1": 2, "k2": 2}, {"g": 2, "o": 3}),
        (nn.Embedding(5, 3), "embedding", {"v": 5, "d": 3}, None),
        (nn.LayerNorm(4), "norm", {"c": 4}, {"c": 4}),
        (nn.LayerNorm((4, 2)), "norm", {"c": 4, "k1": 2}, {"c": 4, "k1": 2}),
        (nn.BatchNorm2d(4), "norm", {"c": 4}, {"c": 4}),
        (nn.GroupNorm(2, 4), "norm", {"c": 4}, {"c": 4}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_parameters_have_their_layers_axes(layer, kind, weight, bias):
    slots = {slot.role: slot for slot in describe(layer).values()}
    assert slots["weight"].kind == kind
    assert list(slots["weight"].sizes.items()) == list(weight.items())
    if bias is not None:
        assert list(slots["bias"].sizes.items()) == list(bias.items())
        assert slots["weight"].bias is layer.bias


def test_bare_parameters_are_named_by_rank():
    shapes = {(): {}, (3,): {"c": 3}, (3, 2): {"o": 3, "i": 2}, (3, 2, 4): {"o": 3, "i": 2, "k1": 4}}
    for shape, sizes in shapes.items():
        assert bare_slot(torch.empty(shape), "w").sizes == sizes


def test_unknown_modules_and_shared_parameters():
    attention = nn.MultiheadAttention(4, 2)
    slots = {slot.name: slot for slot in describe(attention).values()}
    assert slots["in_proj_weight"].sizes == {"o": 12, "i": 4}
    assert slots["out_proj.weight"].kind == "linear"
    tied = nn.ModuleDict({"embed": nn.Embedding(5, 3), "read": nn.Linear(3, 5, bias=False)})
    tied["read"].weight = tied["embed"].weight
    assert [slot.name for slot in describe(tied).values()] == ["embed.weight"]


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_windows_put_parameters_where_the_layout_expects_them(data):
    groups = data.draw(st.sampled_from([1, 2]))
    kind = data.draw(st.sampled_from([nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d]))
    inputs, outputs = groups * data.draw(st.integers(1, 3)), groups * data.draw(st.integers(1, 3))
    layer = nn.Linear(inputs, outputs) if kind is nn.Linear else kind(inputs, outputs, 2, groups=groups)
    slot = describe(layer)[layer.weight]
    operand = Operand((layer.weight, layer.bias), slot.sizes, slot.inputs)
    shape = [slot.sizes[axis] for axis in operand.outputs] + [
        torch.Size(slot.sizes[axis] for axis in slot.inputs).numel() + 1
    ]
    packed = torch.zeros(shape)
    for window, view in zip(operand.windows(packed), operand.views([layer.weight, layer.bias]), strict=True):
        window.copy_(view.detach())
    # a row of the operand is all weights into one output, then its bias, so that (weights, bias)·(patch, 1) is the output
    patches = torch.randn(shape[-1] - 1)
    rows = packed.reshape(-1, shape[-1])
    weight = layer.weight.detach().view(list(slot.sizes.values()))
    order = [list(slot.sizes).index(axis) for axis in (*operand.outputs, *slot.inputs)]
    expected = weight.permute(order).reshape(len(rows), -1) @ patches + layer.bias.detach()
    torch.testing.assert_close(rows @ torch.cat([patches, torch.ones(1)]), expected)


def test_axes_split_and_their_errors():
    assert split_axes("(three head d) i", (24, 5), {"three": 3, "head": 2}) == {"three": 3, "head": 2, "d": 4, "i": 5}
    assert split_axes("o k...", (2, 3, 4)) == {"o": 2, "k1": 3, "k2": 4}
    assert split_axes("", ()) == {}
    for axes, shape, known, words in [
        ("o i", (2,), {}, "name 2 dimensions, the shape [2] has 1"),
        ("(head d) i", (6, 5), {"head": 4}, "do not split a dimension of 6"),
        ("(a b) i", (6, 5), {}, "do not split a dimension of 6"),
        ("o o", (2, 2), {}, "stands twice"),
    ]:
        with pytest.raises(ValueError, match=r"\w") as caught:
            split_axes(axes, shape, known)
        assert words in str(caught.value)


class Transposed(nn.Module):
    """A linear layer that keeps its weight as inputs × outputs."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.randn(outputs))


class Child(Transposed):
    pass


def test_a_registered_kind_is_found_for_its_subclasses_too():
    register_layer(Transposed, LayerKind("linear", {"weight": "i o", "bias": "o"}))
    optimizer = curvlib.MBF(
        nn.Sequential(Child(3, 2)), linear_blocks="output-averaged", grafting=None, debias=False, beta=0.0
    )
    layer_slots = optimizer.routing()
    assert layer_slots["0.bias"] == "joined to 0.weight"
    weight, bias = optimizer.param_groups[0]["params"]
    weight.grad, bias.grad = torch.randn(3, 2), torch.randn(2)
    optimizer.step()
    rows = torch.cat([weight.grad, bias.grad[None]]).T
    torch.testing.assert_close(optimizer.state[weight]["factor_0_0"][0], rows.T @ rows / 2)


def test_a_layer_means_the_same_with_and_without_its_module():
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 3, 3, bias=False) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    optimizers = [curvlib.MBF(layers[0]), curvlib.MBF(layers[1].parameters())]
    for _ in range(3):
        gradient = torch.randn_like(layers[0].weight)
        for layer, optimizer in zip(layers, optimizers, strict=True):
            layer.weight.grad = gradient.clone()
            optimizer.step()
    assert torch.equal(layers[0].weight, layers[1].weight)


class Doubled(nn.Linear):
    def forward(self, x):
        return super().forward(2 * x)


def test_a_subclass_is_heard_where_it_computes_what_its_base_does():
    class Same(nn.Linear):
        pass

    class Timed(nn.Linear):
        def forward(self, x):
            return super().forward(x)

    register_layer(Timed, nn.Linear)
    for kind in (Same, Timed):
        torch.manual_seed(0)
        plain, other = nn.Linear(3, 2), kind(3, 2)
        other.load_state_dict(plain.state_dict())
        held = []
        for model in (plain, other):
            optimizer = curvlib.KFAC(model)
            model(torch.randn(5, 3, generator=torch.Generator().manual_seed(0))).square().mean().backward()
            optimizer.step()
            held.append(optimizer.curvature(model))
        assert torch.equal(*held)
    with pytest.raises(ValueError, match=r"kind must be a registered class, got ReLU"):
        register_layer(Timed, nn.ReLU)


def test_a_subclass_with_a_forward_of_its_own_is_not_misunderstood():
    model = nn.Sequential(Doubled(3, 4), nn.Linear(4, 2))
    with pytest.warns(
        curvlib.TapWarning, match=r"0\.weight: Doubled has a forward of its own; say with register_layer"
    ):
        optimizer = curvlib.KFAC(model)
    assert "Doubled has a forward of its own" in optimizer.routing()["0.weight"]
    assert "on the batch gradient" not in optimizer.routing()["1.weight"]
    assert optimizer.routing()["0.bias"] == "joined to 0.weight"
