"""MBF against plain lines: groupings, kernels, the diagonal rule, schedules, the warm start."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import curvlib
from curvlib.optimizers.mbf import LINEAR_BLOCKS
from tests.optimizers.networks import loss_of, networks
from tests.optimizers.oracles import F64, MBF, MomentumDiagonal, linear_blocks

PUBLISHED = dict(
    lr=1e-5,
    damping=3e-4,
    linear_blocks="row-major",
    momentum=0.9,
    beta=0.9,
    relative_damping=False,
    grafting=None,
    heavy_ball=True,
    debias=False,
    statistics_every=2,
    refresh_every=25,
    dense_start=True,
)
PLAIN = dict(relative_damping=False, grafting=None, heavy_ball=True, debias=False, momentum=0.9, beta=0.9)


def joined(layer, attribute="data"):
    """[W, b] of a linear layer, row-major; a bias without gradient counts as zero."""
    weight, bias = getattr(layer.weight, attribute), None
    if layer.bias is not None:
        bias = getattr(layer.bias, attribute)
        bias = torch.zeros_like(layer.bias.data) if bias is None else bias
    return (weight if bias is None else torch.cat([weight, bias[:, None]], 1)).flatten().clone()


class Follower:
    """An oracle for every operand of a model: joined linear layers, kernels, and a diagonal for all else."""

    def __init__(self, model, grouping, options, diagonal):
        self.operands = {}
        for name, layer in model.named_modules():
            if isinstance(layer, nn.Linear):
                columns = layer.in_features + (layer.bias is not None)
                oracle = MBF(*linear_blocks(grouping, layer.out_features, columns), **options)
                self.operands[name] = (lambda what="data", layer=layer: joined(layer, what), oracle)
                continue
            for role, parameter in layer.named_parameters(recurse=False):
                if isinstance(layer, nn.modules.conv._ConvNd) and role == "weight":
                    size = parameter[0, 0].numel()
                    kernels = [list(range(start, start + size)) for start in range(0, parameter.numel(), size)]
                    oracle = MBF(kernels, False, **options)
                else:
                    oracle = MomentumDiagonal(**diagonal)

                def read(what="data", parameter=parameter):
                    return getattr(parameter, what).flatten().clone()

                self.operands[f"{name}.{role}"] = (read, oracle)
        self.weights = {name: read() for name, (read, _) in self.operands.items()}

    def warm(self):
        for read, oracle in self.operands.values():
            if isinstance(oracle, MBF):
                oracle.warm_start(read("grad"))

    def step(self, lr, damping, missing=()):
        for name, (read, oracle) in self.operands.items():
            if not name.startswith(missing):
                self.weights[name] = oracle.update(self.weights[name], read("grad"), lr, damping)

    def check(self):
        for name, (read, oracle) in self.operands.items():
            oracle.check(read(), self.weights[name])


@given(networks(), st.data())
@settings(max_examples=120, deadline=None)
def test_networks_follow_plain_lines(network, data):
    """Every grouping and setting; a warm start; layers without a gradient now and then; lr and damping scheduled."""
    model, batch = network
    grouping = data.draw(st.sampled_from(sorted(LINEAR_BLOCKS)))
    shared = dict(
        beta=data.draw(st.sampled_from([0.0, 0.9])),
        momentum=data.draw(st.sampled_from([0.5, 0.9])),
        heavy_ball=data.draw(st.booleans()),
        grafting=data.draw(st.sampled_from([None, "sgd", "adagrad", "rmsprop", "adam"])),
        dense_start=data.draw(st.booleans()),
    )
    warm = data.draw(st.integers(0, 2))
    # test_a_warm_start_is_not_debiased has the case of both
    debias = data.draw(st.booleans()) and not warm
    relative, decay = data.draw(st.booleans()), data.draw(st.sampled_from([0.0, 0.5]))
    every, period = data.draw(st.sampled_from([(1, 1), (2, 5), (3, 3), (1, 4), (3, 2)]))
    lr, damping = (lambda step: 2e-3 / (1 + step)), (lambda step: 1e-2 * (1 + step))
    if data.draw(st.booleans()):
        lr, damping = (lambda step: 1e-3), (lambda step: 1e-2)
    optimizer = curvlib.MBF(
        model,
        lr,
        **shared,
        damping=damping,
        linear_blocks=grouping,
        debias=debias,
        relative_damping=relative,
        weight_decay=decay,
        statistics_every=every,
        refresh_every=period,
    )
    theirs = shared | dict(debias=debias, relative=relative, decay=decay, statistics=every, refresh=period)
    diagonal = dict(momentum=shared["momentum"], debias=not shared["heavy_ball"], decay=decay)
    follower = Follower(model, grouping, theirs, diagonal)
    if warm:
        batches = [batch() for _ in range(warm)]
        probe = [(loss_of(model, one).backward(), follower.warm(), model.zero_grad()) for one in batches]
        assert optimizer.warm_start(batches, lambda one: loss_of(model, one)) == len(probe)
    silent = str(data.draw(st.integers(0, len(model))))
    for step in range(8):
        optimizer.zero_grad()
        loss_of(model, batch()).backward()
        missing = step % 3 == 1
        if missing:
            for name, parameter in model.named_parameters():
                parameter.grad = None if name.startswith(f"{silent}.") else parameter.grad
        follower.step(lr(step), damping(step), (silent,) if missing else ())
        optimizer.step()
    follower.check()


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d])
@pytest.mark.parametrize("groups", [1, 2])
def test_every_convolution_has_a_block_for_every_kernel(kind, groups):
    torch.manual_seed(0)
    dimensions = int(kind.__name__[-2])
    model = nn.Sequential(kind(2 * groups, 3 * groups, 2, stride=2, groups=groups)).double()
    optimizer = curvlib.MBF(model, 1e-3, damping=1e-2, **PLAIN, statistics_every=2, refresh_every=3, dense_start=True)
    options = dict(beta=0.9, momentum=0.9, statistics=2, refresh=3, dense_start=True)
    follower = Follower(model, "output", options, dict(momentum=0.9))
    for _ in range(8):
        optimizer.zero_grad()
        model(torch.randn(4, 2 * groups, *[5] * dimensions, dtype=F64)).tanh().sum().backward()
        follower.step(1e-3, 1e-2)
        optimizer.step()
    follower.check()
    blocks = 6 * groups
    assert optimizer.state[model[0].weight]["factor_0_0"].numel() == blocks * 2 ** (2 * dimensions)


def recorded(layer, steps, seed=0):
    """Gradients [W, b] for a linear layer, set one after another."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        gradient = torch.randn(layer.out_features, layer.in_features + 1, generator=generator, dtype=F64)
        layer.weight.grad, layer.bias.grad = gradient[:, :-1].clone(), gradient[:, -1].clone()
        yield gradient


def as_matrix(layer):
    return torch.cat([layer.weight.detach(), layer.bias.detach()[:, None]], 1)


def test_averaged_input_blocks_are_one_solve_with_the_mean_outer_product_of_columns():
    """(F + λI)^-1 M with F of G Gᵀ / (I+1)."""
    layer = nn.Linear(3, 4).double()
    expected, curvature, momentum = as_matrix(layer), 0.0, 0.0
    optimizer = curvlib.MBF(layer, 1e-2, damping=0.1, linear_blocks="input-averaged", **PLAIN, refresh_every=1)
    for gradient in recorded(layer, 5):
        curvature = 0.9 * curvature + 0.1 * gradient @ gradient.T / 4
        momentum = 0.9 * momentum + gradient
        expected = expected - 1e-2 * torch.linalg.solve(curvature + 0.1 * torch.eye(4, dtype=F64), momentum)
        optimizer.step()
    torch.testing.assert_close(as_matrix(layer), expected, rtol=1e-12, atol=1e-12)


def test_row_major_blocks_are_the_authors_reshape():
    layer = nn.Linear(3, 2).double()
    expected, curvature, momentum = as_matrix(layer), 0.0, 0.0
    optimizer = curvlib.MBF(layer, 1e-2, damping=0.1, linear_blocks="row-major", **PLAIN, refresh_every=1)
    for gradient in recorded(layer, 5):
        rows = gradient.reshape(4, 2)  # 2 × 4 read as 4 × 2, not transposed
        curvature = 0.9 * curvature + 0.1 * rows.T @ rows / 4
        momentum = 0.9 * momentum + rows
        step = momentum @ torch.linalg.inv(curvature + 0.1 * torch.eye(2, dtype=F64))
        expected = expected - 1e-2 * step.reshape(2, 4)
        optimizer.step()
    torch.testing.assert_close(as_matrix(layer), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("text", ["| o i", "| ..."])
def test_one_block_a_layer_is_the_dense_solve_with_the_empirical_fisher(text):
    """Warmed up on one example at a time, F is the mean of per-example outer products; then averages of the batch's."""
    torch.manual_seed(0)
    layer = nn.Linear(3, 2).double()
    optimizer = curvlib.MBF(layer, 1e-2, damping=0.1, linear_blocks=text, **PLAIN, refresh_every=1)
    inputs, labels = torch.randn(12, 3, dtype=F64), torch.randint(0, 2, (12,))
    optimizer.warm_start(range(12), lambda one: F.cross_entropy(layer(inputs[one : one + 1]), labels[one : one + 1]))
    homogeneous = torch.cat([inputs, torch.ones(12, 1, dtype=F64)], 1)
    errors = layer(inputs).softmax(-1).detach() - F.one_hot(labels, 2)
    gradients = torch.einsum("no,ni->noi", errors, homogeneous)
    flat = gradients.flatten(1)
    weights_first = torch.cat(
        [gradients[..., :-1].flatten(1), gradients[..., -1]], 1
    )  # rows as curvature() orders them
    torch.testing.assert_close(optimizer.curvature(layer), weights_first.T @ weights_first / 12)
    mean = flat.mean(0)
    fisher = 0.9 * flat.T @ flat / 12 + 0.1 * torch.outer(mean, mean)
    expected = as_matrix(layer).flatten() - 1e-2 * torch.linalg.solve(fisher + 0.1 * torch.eye(8, dtype=F64), mean)
    F.cross_entropy(layer(inputs), labels).backward()
    optimizer.step()
    torch.testing.assert_close(as_matrix(layer).flatten(), expected, rtol=1e-11, atol=1e-12)


def test_blocks_of_one_entry_are_the_momentum_over_the_damped_square():
    torch.manual_seed(0)
    weight = nn.Parameter(torch.zeros(3, 4, 1, 1, dtype=F64))
    optimizer = curvlib.MBF([weight], lr=1.0, damping=0.1, **PLAIN, refresh_every=1)
    second, momentum, expected = 0.0, 0.0, torch.zeros_like(weight)
    for _ in range(5):
        weight.grad = torch.randn_like(weight)
        second, momentum = 0.9 * second + 0.1 * weight.grad**2, 0.9 * momentum + weight.grad
        expected = expected - momentum / (second + 0.1)
        optimizer.step()
    torch.testing.assert_close(weight.detach(), expected.detach(), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("grouping", sorted(LINEAR_BLOCKS))
def test_a_large_damping_is_heavy_ball_sgd_scaled_by_its_inverse(grouping):
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Conv1d(2, 3, 2), nn.Flatten(), nn.Linear(9, 4)).double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    damping = 1e9
    ours = curvlib.MBF(models[0], 0.1 * damping, damping=damping, **PLAIN, linear_blocks=grouping, refresh_every=1)
    theirs = torch.optim.SGD(models[1].parameters(), lr=0.1, momentum=0.9)
    for _ in range(6):
        batch = torch.randn(5, 2, 4, dtype=F64)
        for model in models:
            model.zero_grad()
        models[1](batch).tanh().sum().backward()
        for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
            one.grad = other.grad.clone()
        models[0][0].bias.grad = None  # the diagonal rule has no λ
        ours.step()
        theirs.step()
    for name in ("0.weight", "2.weight", "2.bias"):
        # the relative difference is λmax(F)/λ
        torch.testing.assert_close(models[0].get_parameter(name), models[1].get_parameter(name), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("warm", [0, 3])
def test_the_published_schedule_refreshes_densely_at_first(warm):
    """T1 = 2, T2 = 25: statistics at every even step, inverses at 0, 2, …, 24, then 25, 50, 75; a warm start or not."""
    layer = nn.Linear(3, 2).double()
    optimizer = curvlib.MBF(layer, **PUBLISHED)
    optimizer.warm_start(range(warm), lambda _: layer(torch.randn(5, 3, dtype=F64)).pow(2).sum())
    before = {name: optimizer.state[layer.weight].get(f"{name}_0_0") for name in ("factor", "root")}
    before = {name: None if value is None else value.clone() for name, value in before.items()}
    changed = {"factor": [], "root": []}
    for step, _ in enumerate(recorded(layer, 80)):
        optimizer.step()
        for name in changed:
            held = optimizer.state[layer.weight][f"{name}_0_0"].clone()
            if before[name] is None or not torch.equal(held, before[name]):
                changed[name].append(step)
            before[name] = held
    assert changed["factor"] == [*range(0, 80, 2)]
    # step 25 refreshes from the statistic of step 24, as step 24 did: counted by the oracle, invisible in the root
    assert changed["root"] == [*range(0, 25, 2), 50, 75]
    oracle = MBF([[0]], False, beta=0.9, momentum=0.9, statistics=2, refresh=25, dense_start=True)
    for _ in range(80):
        oracle.update(torch.ones(1, dtype=F64), torch.ones(1, dtype=F64), 1e-3, 1.0)
    assert oracle.refreshed == [*range(0, 25, 2), 25, 50, 75]


def test_the_published_schedule_solves_at_its_steps_and_no_others(monkeypatch):
    from curvlib import roots

    counted, real = [], roots.refresh
    monkeypatch.setattr(roots, "refresh", lambda jobs: counted.append(len(list(jobs))) or real(jobs))
    layer = nn.Linear(3, 2).double()
    optimizer = curvlib.MBF(layer, **PUBLISHED)
    for _ in recorded(layer, 80):
        optimizer.step()
    assert [step for step, jobs in enumerate(counted) if jobs] == [*range(0, 25, 2), 25, 50, 75]


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "gaussian"])
def test_the_warm_start_is_the_running_mean_over_sampled_labels_and_touches_nothing_else(likelihood):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.ReLU(), nn.Linear(3, 2)).double()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = curvlib.MBF(model, **PUBLISHED)
    losses = {
        "categorical": F.cross_entropy,
        "bernoulli": F.binary_cross_entropy_with_logits,
        "gaussian": lambda outputs, targets: (outputs - targets).pow(2).sum(1).mean() / 2,
    }
    draws, gradients = torch.Generator().manual_seed(3), []

    def loss(batch):
        logits = model(batch)
        labels = curvlib.sample_labels(logits, likelihood, draws)
        result = losses[likelihood](logits, labels)
        gradients.append(torch.autograd.grad(result, [model[0].weight, model[0].bias], retain_graph=True))
        return result

    assert optimizer.warm_start(torch.randn(5, 8, 4, dtype=F64), loss) == 5
    chunks = [torch.cat([weight, bias[:, None]], 1).flatten().view(5, 3) for weight, bias in gradients]
    expected = sum(one.T @ one / 5 for one in chunks) / 5
    torch.testing.assert_close(optimizer.state[model[0].weight]["factor_0_0"][0], expected, rtol=1e-12, atol=1e-15)
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert optimizer.state[model[0].weight]["step"] == 0
    assert not optimizer.state[model[0].weight]["momentum"].any()
    assert not optimizer.state[model[1].weight].get("moment", torch.zeros(1)).any()


def test_a_warm_start_is_not_debiased():
    """A mean over batches is not biased towards zero: it is the curvature, whatever ``debias`` says, and stays in scale."""
    held = []
    for debias in (False, True):
        torch.manual_seed(0)
        layer = nn.Linear(3, 2).double()
        optimizer = curvlib.MBF(layer, 1e-3, damping=0.1, linear_blocks="output", **PLAIN | {"debias": debias})
        optimizer.warm_start(range(2), lambda _, layer=layer: layer(torch.randn(5, 3, dtype=F64)).pow(2).sum())
        held.append(optimizer.curvature(layer))
        torch.testing.assert_close(held[-1], held[0])
        (gradient,) = recorded(layer, 1)
        optimizer.step()
        new = torch.block_diag(*(torch.outer(row, row) for row in gradient))
        order = [0, 1, 2, 4, 5, 6, 3, 7]  # weights first
        columns = torch.stack([held[-1].flatten(), new[order][:, order].flatten()], 1)
        weights = torch.linalg.lstsq(columns, optimizer.curvature(layer).flatten()[:, None]).solution
        torch.testing.assert_close(columns @ weights, optimizer.curvature(layer).flatten()[:, None])
        assert abs(weights.sum().item() - 1) < 1e-9, f"an average of old and new has weights {weights.flatten()}"


def test_a_bias_without_gradient_counts_as_a_zero_column_and_stays():
    torch.manual_seed(0)
    layer = nn.Linear(3, 2).double()
    bias = layer.bias.detach().clone()
    layer.bias.requires_grad_(False)
    options = dict(beta=0.9, momentum=0.9)
    optimizer = curvlib.MBF(layer, 1e-2, damping=0.1, linear_blocks="output", **PLAIN, refresh_every=1)
    oracle, weight = MBF(*linear_blocks("output", 2, 4), **options), joined(layer)
    for _ in range(5):
        layer.weight.grad = torch.randn(2, 3, dtype=F64)
        weight = oracle.update(weight, joined(layer, "grad"), 1e-2, 0.1)
        optimizer.step()
    oracle.check(layer.weight.detach(), weight.view(2, 4)[:, :3])
    assert torch.equal(layer.bias, bias)


def test_without_a_model_biases_have_the_diagonal_rule():
    layer = nn.Linear(3, 2)
    assert curvlib.MBF(layer).routing()["bias"] == "joined to weight"
    bare = curvlib.MBF(layer.parameters())
    assert list(bare.routing().values())[1].startswith("... |")
    bare.attach(layer)
    assert bare.routing()["bias"] == "joined to weight"


@pytest.mark.parametrize("grouping", [*sorted(LINEAR_BLOCKS), "| o, i", "| o/2 i/2", "... |"])
def test_defaults_train_with_every_grouping(grouping):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    inputs, targets = torch.randn(128, 8), torch.randint(0, 4, (128,))
    optimizer = curvlib.MBF(model, lr=1e-2, linear_blocks=grouping)
    first = F.cross_entropy(model(inputs), targets).item()
    for _ in range(100):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.8 * first
    assert optimizer.health().ok
