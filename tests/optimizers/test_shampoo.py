"""Shampoo against plain lines: any tensor, drawn networks, the published forms; its direction against a peer's."""

from __future__ import annotations

import pytest
import torch
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import curvlib
from tests.optimizers.networks import loss_of, networks
from tests.optimizers.oracles import F64, Adam, symmetric_power
from tests.optimizers.oracles import Shampoo as Oracle

SHAPES = st.lists(st.lists(st.integers(1, 5), max_size=4).map(tuple), min_size=1, max_size=3)


@st.composite
def settings_of_shampoo(draw, size=0.05):
    """(what curvlib takes, what the oracle takes, lr and damping at a step)."""
    shared = dict(
        beta=draw(st.sampled_from([None, 0.9])),
        momentum=draw(st.sampled_from([0.0, 0.9])),
        heavy_ball=draw(st.booleans()),
        debias=draw(st.booleans()),
        exponent=draw(st.sampled_from([0.25, 0.5, 1.0])),
        grafting=draw(st.sampled_from([None, "sgd", "adagrad", "rmsprop", "adam"])),
    )
    relative, decay = draw(st.booleans()), draw(st.sampled_from([0.0, 0.1]))
    every, period = draw(st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 3), (3, 2)]))
    lr, damping = (lambda step: size / (1 + step) ** 0.5), (lambda step: 1e-2 * 0.9**step)
    if draw(st.booleans()):
        lr, damping = (lambda step: size), (lambda step: 1e-2)
    ours = dict(lr=lr, damping=damping, relative_damping=relative, weight_decay=decay)
    ours |= dict(statistics_every=every, refresh_every=period)
    theirs = dict(relative=relative, decay=decay, statistics=every, refresh=period)
    return shared | ours, shared | theirs, lr, damping


def form_of(ndim, kernels, block, layer=None):
    """(einops pattern of the tensor on which the oracle works, sizes it needs, lengths of cuts)."""
    ks = " ".join(f"k{number}" for number in range(1, ndim - 1))
    transposed, groups = isinstance(layer, nn.ConvTranspose2d), getattr(layer, "groups", 1)
    if ndim < 3:
        name = " ".join("abc"[:ndim])
        return f"{name} -> {name}" if ndim else " -> a", {}, [block] * max(1, ndim)
    inputs = {"separate": f"i {ks}", "merged": f"i ({ks})", "inputs": f"(i {ks})"}[kernels]
    cuts = {"separate": [block] * ndim, "merged": [block, block, None], "inputs": [block, block]}[kernels]
    left = f"(g i) o {ks}" if transposed else f"(g o) i {ks}"
    return f"{left} -> g o {inputs}", {"g": groups}, [1, *cuts]


def folded(tensor, form):
    pattern, sizes, _ = form
    return tensor[None] if tensor.ndim == 0 else rearrange(tensor, pattern, **sizes)


def unfolded(tensor, form, like):
    pattern, sizes, _ = form
    if like.ndim == 0:
        return tensor[0]
    left, right = pattern.split(" -> ")
    ks = {f"k{number}": size for number, size in enumerate(like.shape[2:], 1)}
    return rearrange(tensor, f"{right} -> {left}", **sizes, **(ks if like.ndim >= 3 else {}))


class Follower:
    """An oracle beside every parameter, in the oracle's own form."""

    def __init__(self, parameters, make, forms):
        self.parameters, self.forms = list(parameters), forms
        self.oracles = [make(parameter, form) for parameter, form in zip(self.parameters, forms, strict=True)]
        self.weights = [parameter.detach().clone() for parameter in self.parameters]

    def step(self, lr, damping):
        for number, parameter in enumerate(self.parameters):
            if parameter.grad is not None:
                weight, gradient = (folded(one, self.forms[number]) for one in (self.weights[number], parameter.grad))
                updated = self.oracles[number].update(weight, gradient, lr, damping)
                self.weights[number] = unfolded(updated, self.forms[number], parameter).clone()

    def check(self):
        for parameter, oracle, weight in zip(self.parameters, self.oracles, self.weights, strict=True):
            oracle.check(parameter.detach(), weight)


KERNELS = st.sampled_from(["separate", "merged", "inputs"])
BLOCKS = st.sampled_from([None, 1, 2, 3])


@given(SHAPES, settings_of_shampoo(), KERNELS, BLOCKS, st.integers(0, 1000), st.sets(st.integers(0, 30), max_size=4))
@settings(max_examples=100, deadline=None)
def test_tensors_of_any_order_follow_plain_lines(shapes, drawn, kernels, block, seed, missing):
    """With gradients missing now and then: schedules count the steps of each parameter."""
    ours, theirs, lr, damping = drawn
    generator = torch.Generator().manual_seed(seed)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator, dtype=F64)) for shape in shapes]
    optimizer = curvlib.Shampoo(parameters, **ours, block_size=block, kernels=kernels, vectors="kronecker")
    forms = [form_of(len(shape), kernels, block) for shape in shapes]

    def make(parameter, form):  # a number is its own block, a diagonal, whose root is fresh at every step
        return Oracle(form[2], **(theirs if parameter.ndim else theirs | {"refresh": 1}))

    follower = Follower(parameters, make, forms)
    for step in range(12):
        for number, parameter in enumerate(parameters):
            gradient = torch.randn(parameter.shape, generator=generator, dtype=F64)
            parameter.grad = None if 3 * step + number in missing else gradient
        follower.step(lr(step), damping(step))
        optimizer.step()
    follower.check()


@given(networks(), settings_of_shampoo(2e-3), KERNELS, BLOCKS, st.sampled_from(["diagonal", "kronecker"]))
@settings(max_examples=80, deadline=None)
def test_networks_follow_plain_lines(network, drawn, kernels, block, vectors):
    """Layers, groups, strides, norms; vectors by Adam's diagonal or by a factor; the gradients of real batches."""
    model, batch = network
    ours, theirs, lr, damping = drawn
    if any(getattr(layer, "groups", 1) > 1 for layer in model):
        # these two have tests of their own, see test_a_grouped_convolution_has_a_product_for_every_group
        kernels, vectors = "merged" if kernels == "separate" else kernels, "diagonal"
    optimizer = curvlib.Shampoo(model, **ours, block_size=block, kernels=kernels, vectors=vectors)
    pairs = [
        (layer if isinstance(layer, nn.modules.conv._ConvNd) else None, parameter)
        for layer in model
        for parameter in layer.parameters()
    ]
    forms = [form_of(parameter.ndim, kernels, block, layer) for layer, parameter in pairs]

    def make(parameter, form):
        if parameter.ndim <= 1 and vectors == "diagonal":
            return Adam(momentum=theirs["momentum"], heavy_ball=theirs["heavy_ball"], decay=theirs["decay"])
        return Oracle(form[2], **theirs)

    follower = Follower([parameter for _, parameter in pairs], make, forms)
    for step in range(8):
        optimizer.zero_grad()
        loss_of(model, batch()).backward()
        follower.step(lr(step), damping(step))
        optimizer.step()
    follower.check()


@pytest.mark.parametrize("shape", [(5,), (4, 3), (3, 2, 4), (2, 3, 2, 2)])
def test_the_published_form_of_gupta_is_one_setting(shape):
    """L_i starts at εI and sums; every one of k axes has the power -1/(2k)."""
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(shape, dtype=F64))
    weight, k = parameter.detach().clone(), len(shape)
    published = dict(beta=None, relative_damping=False, grafting=None, momentum=0.0, refresh_every=1)
    options = dict(vectors="kronecker", kernels="separate", block_size=None)
    optimizer = curvlib.Shampoo([parameter], lr=0.1, damping=1e-3, **published, **options)
    factors = [1e-3 * torch.eye(size, dtype=F64) for size in shape]
    for _ in range(10):
        gradient = torch.randn(shape, dtype=F64)
        parameter.grad = gradient.clone()
        direction = gradient
        for axis in range(k):
            axes = [other for other in range(k) if other != axis]
            factors[axis] += torch.tensordot(gradient, gradient, dims=[axes, axes])
            root = symmetric_power(factors[axis], -1 / (2 * k))
            direction = torch.tensordot(root, direction, dims=[[1], [axis]]).movedim(0, axis)
        weight = weight - 0.1 * direction
        optimizer.step()
    torch.testing.assert_close(parameter.detach(), weight, rtol=1e-10, atol=1e-10)  # κ is 1e5


def test_the_form_of_the_mbf_and_tnt_authors_is_one_setting():
    """EMA of 0.9 without debiasing, on top of a warm start; -1/4, -1/6 with kernels merged, -1/2; heavy ball before."""
    torch.manual_seed(0)
    shapes = {(4, 3): 2, (3, 2, 3, 3): 3, (5,): 1}
    parameters = [nn.Parameter(torch.randn(shape, dtype=F64)) for shape in shapes]
    weights = [parameter.detach().clone() for parameter in parameters]
    authors = dict(beta=0.9, debias=False, grafting=None, heavy_ball=True, relative_damping=False, vectors="kronecker")
    optimizer = curvlib.Shampoo(parameters, lr=1e-2, damping=1e-2, momentum=0.9, refresh_every=1, **authors)
    warm = [[torch.randn(shape, dtype=F64) for shape in shapes] for _ in range(3)]
    batches = iter(warm)
    optimizer.warm_start(
        range(3), lambda _: sum((one * gradient).sum() for one, gradient in zip(parameters, next(batches), strict=True))
    )

    def unfold(gradient):
        gradient = gradient.flatten(2) if gradient.ndim > 2 else gradient
        matrices = [gradient.movedim(axis, 0).reshape(size, -1) for axis, size in enumerate(gradient.shape)]
        return [matrix @ matrix.T for matrix in matrices]

    factors = [
        [sum(unfold(batch[number])[axis] for batch in warm) / 3 for axis in range(k)]
        for number, k in enumerate(shapes.values())
    ]
    balls = [torch.zeros(shape, dtype=F64) for shape in shapes]
    for _ in range(6):
        for number, (parameter, k) in enumerate(zip(parameters, shapes.values(), strict=True)):
            parameter.grad = torch.randn(parameter.shape, dtype=F64)
            balls[number] = 0.9 * balls[number] + parameter.grad
            direction = balls[number].flatten(2) if k == 3 else balls[number]
            for axis, new in enumerate(unfold(parameter.grad)):
                factor = factors[number][axis] = 0.9 * factors[number][axis] + 0.1 * new
                root = symmetric_power(factor + 1e-2 * torch.eye(len(factor), dtype=F64), -1 / (2 * k))
                direction = torch.tensordot(root, direction, dims=[[1], [axis]]).movedim(0, axis)
            weights[number] = weights[number] - 1e-2 * direction.reshape(parameter.shape)
        optimizer.step()
    for parameter, weight in zip(parameters, weights, strict=True):
        torch.testing.assert_close(parameter.detach(), weight, rtol=1e-10, atol=1e-10)  # κ is 1e4


@pytest.mark.parametrize("shape", [(6, 5), (5, 6), (4, 4), (7,)])
def test_the_direction_is_a_peers(shape):
    """The peer starts its factors at εI, sums, and takes the power -1/(2k) of each of k axes, as Gupta et al. do."""
    peer = pytest.importorskip("pytorch_optimizer")
    torch.manual_seed(0)
    ours = nn.Parameter(torch.randn(shape, dtype=F64))
    theirs = nn.Parameter(ours.detach().clone())
    other = peer.Shampoo([theirs], lr=0.1, momentum=0.0, preconditioning_compute_steps=1, matrix_eps=1e-4)
    options = dict(beta=None, relative_damping=False, grafting=None, momentum=0.0, vectors="kronecker")
    mine = curvlib.Shampoo([ours], lr=0.1, damping=1e-4, refresh_every=1, **options)
    for _ in range(15):
        gradient = torch.randn(shape, dtype=F64)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        mine.step()
        other.step()
    # κ is λmax/ε, below 1e6; the peer's root is by SVD
    torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("block", [None, 2, 3])
@pytest.mark.parametrize("power", [0, 2])
def test_blocked_averaged_directions_are_a_peers(block, power):
    """The peer's EMA starts at εI and so forgets ε with its beta; here ε is the damping, forgotten on a schedule."""
    peer = pytest.importorskip("pytorch_optimizer")
    from pytorch_optimizer.optimizer.utils.graft import LayerWiseGrafting

    torch.manual_seed(0)
    ours = nn.Parameter(torch.randn(6, 6, dtype=F64))
    theirs = nn.Parameter(ours.detach().clone())
    other = peer.ScalableShampoo(
        [theirs],
        lr=0.1,
        betas=(0.0, 0.9),
        inverse_exponent_override=power,
        start_preconditioning_step=1,
        preconditioning_compute_steps=1,
        block_size=block or 64,
        shape_interpretation=False,
        graft_type=LayerWiseGrafting.NONE,
        nesterov=False,
        matrix_eps=1e-2,
        use_svd=True,
    )
    mine = curvlib.Shampoo(
        [ours],
        lr=0.1,
        beta=0.9,
        debias=False,
        damping=lambda step: 1e-2 * 0.9 ** (step + 1),
        relative_damping=False,
        exponent=2 / power if power else 0.5,
        grafting=None,
        momentum=0.0,
        block_size=block,
        refresh_every=1,
    )
    for _ in range(15):
        gradient = torch.randn(6, 6, dtype=F64)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        mine.step()
        other.step()
    torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-8, atol=1e-8)


def test_vectors_take_adams_diagonal_by_default():
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(5, dtype=F64)) for _ in range(2)]
    weights[1].data.copy_(weights[0].data)
    ours, theirs = curvlib.Shampoo([weights[0]], lr=1e-2), torch.optim.Adam([weights[1]], lr=1e-2)
    for _ in range(20):
        gradient = torch.randn(5, dtype=F64)
        weights[0].grad = weights[1].grad = gradient
        ours.step()
        theirs.step()
    torch.testing.assert_close(weights[0].detach(), weights[1].detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kernels", ["separate", "merged", "inputs"])
def test_a_grouped_convolution_has_a_product_for_every_group(kernels):
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, 3, groups=2).double()
    optimizer = curvlib.Shampoo(layer, kernels=kernels, beta=None, debias=False)
    layer.weight.grad = torch.randn_like(layer.weight)
    layer.bias.grad = torch.randn_like(layer.bias)
    optimizer.step()
    left = optimizer.state[layer.weight]["factor_0_0"]
    grouped = layer.weight.grad.view(2, 3, -1)
    torch.testing.assert_close(left, grouped @ grouped.mT)


def test_a_vector_of_a_grouped_convolution_has_one_factor_and_the_power_of_one():
    """p/k with k = 1: not a product over groups and channels."""
    layer = nn.Conv2d(4, 6, 3, groups=2).double()
    weight = layer.bias.detach().clone()
    options = dict(beta=None, debias=False, grafting=None, momentum=0.0, relative_damping=False, vectors="kronecker")
    optimizer = curvlib.Shampoo([layer.bias], lr=1.0, damping=1e-2, model=layer, **options)
    layer.bias.grad = torch.arange(1.0, 7.0, dtype=F64)
    optimizer.step()
    # of a vector g and F = ggᵀ the direction is (‖g‖² + λ)^-p g, for each group or for all
    groups = layer.bias.grad.view(2, 3)
    each = (groups / (groups.pow(2).sum(1, keepdim=True) + 1e-2).sqrt()).flatten()
    whole = layer.bias.grad / (layer.bias.grad.pow(2).sum() + 1e-2).sqrt()
    step = weight - layer.bias.detach()
    assert torch.allclose(step, each) or torch.allclose(step, whole)


@pytest.mark.parametrize("gradient", [[1.0, 0, 0, 0, -3, 2, 0], [1, 0, -1], [0, 2, 0, -2, 0], [-1, 0, 2, 0, -1, 0, 0]])
def test_gradients_that_sum_to_zero_have_exact_roots(gradient):
    """As below a batch norm or a softmax: nothing that judges a root may divide by what such a gradient cancels."""
    gradient = torch.tensor(gradient, dtype=F64)[:, None] / 3
    parameter = nn.Parameter(torch.zeros_like(gradient))
    options = dict(beta=None, grafting=None, momentum=0.0, relative_damping=False, refresh_every=1)
    optimizer = curvlib.Shampoo([parameter], 1.0, damping=1e-2, **options)
    parameter.grad = gradient.clone()
    optimizer.step()
    # one axis above size one: k = 1, and (ggᵀ + λ)^-1/2 g is g / √(‖g‖² + λ)
    torch.testing.assert_close(
        -parameter.detach(), gradient / (gradient.norm() ** 2 + 1e-2).sqrt(), rtol=1e-12, atol=1e-12
    )
    assert not optimizer.state[parameter]["kept_0_0"].any()
    optimizer.zero_grad()
    parameter.grad = torch.ones_like(gradient)  # where the factor has nothing, the root is λ^-1/2
    before, root = parameter.detach().clone(), optimizer.state[parameter]["root_0_0"][0].clone()
    assert torch.allclose(root @ torch.ones(len(gradient), dtype=F64), torch.full((len(gradient),), 10.0, dtype=F64))
    optimizer.step()
    assert ((parameter.detach() - before) * parameter.grad).sum() < 0


@pytest.mark.parametrize(("period", "steps"), [(1, [*range(12)]), (3, [0, 3, 6, 9]), (5, [0, 5, 10])])
def test_roots_change_at_multiples_of_the_refresh_period_and_statistics_at_theirs(period, steps):
    weight = nn.Parameter(torch.randn(4, 3, dtype=F64))
    optimizer = curvlib.Shampoo([weight], statistics_every=2, refresh_every=period)
    before, changed = {}, {"root": [], "factor": []}
    for step in range(12):
        weight.grad = torch.randn(4, 3, dtype=F64)
        optimizer.step()
        held = {name: optimizer.state[weight][f"{name}_0_0"].clone() for name in changed}
        for name, value in held.items():
            if name not in before or not torch.equal(value, before[name]):
                changed[name].append(step)
        before = held
    assert changed["factor"] == [*range(0, 12, 2)]
    # every other root of period 1 is of the same, debiased, statistic
    assert changed["root"] == (steps if period > 1 else steps[::2])
