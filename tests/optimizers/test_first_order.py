"""Lion, Muon, AdaFactor and Sophia against torch's, a peer's, or their equations in plain lines."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_optimizer import Lion as PeerLion
from torch import nn

import curvlib
from curvlib.finishes import ClipRms, Orthogonal, ParameterScale
from curvlib.testing import check_recipe
from tests.optimizers.oracles import F64

STEPS = 50


def network(dtype=F64):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (2, 3, 3)),
        nn.Conv2d(2, 4, 2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(16, 5),
        nn.Tanh(),
        nn.Linear(5, 3),
    ).to(dtype)


def trained(make, model, steps=STEPS):
    """The parameters after some steps on the same random batches."""
    model = copy.deepcopy(model)
    optimizer = make(model)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(20, 18, generator=generator, dtype=F64).to(next(model.parameters()).dtype)
        y = torch.randint(0, 3, (20,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def matrices(model):
    return [parameter for parameter in model.parameters() if parameter.ndim == 2]


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.5, 0.8)])
def test_lion_is_the_peers(decay, betas):
    mine = trained(lambda model: curvlib.Lion(model, 1e-2, betas, decay), network())
    peers = trained(lambda model: PeerLion(model.parameters(), 1e-2, betas, decay), network())
    torch.testing.assert_close(mine, peers, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize(("lr", "d"), [(1e-2, 1.0), (0.3, 2.0)])
def test_adafactor_is_torchs(decay, lr, d):
    # Beyond 1 / lr² steps torch decays by lr, and this by the step size.
    steps = min(STEPS, int(lr**-2)) if decay else STEPS
    options = dict(lr=lr, weight_decay=decay, d=d)
    mine = trained(lambda model: curvlib.Adafactor(model, **options), network(), steps)
    torchs = trained(
        lambda model: torch.optim.Adafactor(model.parameters(), eps=(None, 1e-3), **options), network(), steps
    )
    torch.testing.assert_close(mine, torchs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("scale", "theirs"), [("spectral", "original"), ("adam", "match_rms_adamw")])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muons_first_step_is_torchs_to_bfloat16(scale, theirs, nesterov):
    start = network()
    flat = torch.cat([parameter.detach().flatten() for parameter in start.parameters()])
    options = dict(lr=0.02, momentum=0.95, weight_decay=0.1, nesterov=nesterov)
    mine = trained(lambda model: curvlib.Muon(matrices(model), scale=scale, **options), start, 1)
    torchs = trained(lambda model: torch.optim.Muon(matrices(model), adjust_lr_fn=theirs, **options), start, 1)
    unit = torch.finfo(torch.bfloat16).eps
    assert (mine - torchs).norm() <= 10 * unit * (torchs - flat).norm()


def newton_schulz(matrix, steps):
    x = matrix / matrix.norm()
    if x.shape[0] > x.shape[1]:
        return newton_schulz(matrix.T, steps).T
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def test_muon_is_its_equations():
    start = network()
    mine = trained(lambda model: curvlib.Muon(matrices(model), 0.02, scale="spectral", low_precision=False), start)

    class Plain(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})

        @torch.no_grad()
        def step(self):
            for weight in self.param_groups[0]["params"]:
                average = self.state[weight].setdefault("m", torch.zeros_like(weight))
                average.mul_(0.95).add_(weight.grad, alpha=0.05)
                looked = 0.95 * average + 0.05 * weight.grad
                rows, columns = weight.shape
                weight -= 0.02 * max(1, rows / columns) ** 0.5 * newton_schulz(looked, 5)

    torch.testing.assert_close(mine, trained(lambda model: Plain(matrices(model)), start), rtol=1e-9, atol=1e-11)


def test_muon_leaves_embeddings_and_vectors_to_adam():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3), nn.LayerNorm(3))
    routes = curvlib.Muon(model).routing()
    assert {name for name, route in routes.items() if "route 0" in route} == {"1.weight"}


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 3), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_the_polar_express_arrives(rows, columns, count, seed):
    generator = torch.Generator().manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(count, n, n, generator=generator, dtype=F64))[0] for n in (rows, columns))
    k = min(rows, columns)
    sizes = 10.0 ** (-2 * torch.rand(count, 1, k, generator=generator, dtype=F64))  # condition up to 100
    given_, wanted = (u[:, :, :k] * sizes) @ v[:, :, :k].mT, u[:, :, :k] @ v[:, :, :k].mT
    finish = Orthogonal(10, "polar-express", scale=None, dtype=None)
    found = torch.stack(list(finish(list(given_), [], [])))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-8)


@pytest.mark.parametrize("iterations", [3, 5, 8, 11])
def test_the_polar_express_in_plain_lines(iterations):
    """The paper's odd polynomials of singular values, from the norm 1.01 down, each with the interval shrunk by 1.01."""
    published = [
        (8.28721201814563, -23.595886519098837, 17.300387312530933),
        (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
        (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
        (3.3184196573706015, -2.488488024314874, 0.51004894012372),
        (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
        (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
        (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    ]
    matrix = torch.randn(7, 5, dtype=F64, generator=torch.Generator().manual_seed(0))
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    s = s / (1.01 * matrix.norm())
    for t in range(iterations):
        a, b, c = published[t] if t < 7 else (1.875, -1.25, 0.375)
        x = s / 1.01 if t < 7 else s
        s = a * x + b * x**3 + c * x**5
    (found,) = Orthogonal(iterations, "polar-express", scale=None, dtype=None)([matrix], [], [])
    torch.testing.assert_close(found, (u * s) @ vh, rtol=1e-6, atol=1e-6)


def test_the_quintic_keeps_singular_values_near_one():
    matrix = torch.randn(40, 30, dtype=F64, generator=torch.Generator().manual_seed(0))
    (found,) = Orthogonal(5, scale=None, dtype=None)([matrix], [], [])
    values = torch.linalg.svdvals(found)
    assert 0.6 < values.min() <= values.max() < 1.3
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    assert (found * (u @ vh)).sum() / found.norm() / 30**0.5 > 0.97


def test_orthogonal_batches_equal_shapes_and_merges_inputs():
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 3), (2, 5, 2), (4, 3), (7,), (10, 2)]
    given_ = [torch.randn(shape, dtype=F64, generator=generator) for shape in shapes]
    finish = Orthogonal(dtype=None)
    together = finish(given_, [], [])
    for one, found in zip(given_, together, strict=True):
        (alone,) = finish([one], [], [])
        torch.testing.assert_close(found, alone, rtol=1e-12, atol=1e-14)
    assert together[3] is given_[3]
    torch.testing.assert_close(together[1], finish([given_[1].reshape(2, 10)], [], [])[0].view(2, 5, 2))
    (zero,) = finish([torch.zeros(3, 3)], [], [])
    assert torch.equal(zero, torch.zeros(3, 3))


def test_clipped_and_scaled_steps():
    direction, weight = torch.tensor([3.0, 4.0]), torch.tensor([1.0, 7.0])
    (clipped,) = ClipRms(0.5)([direction], [], [weight])
    torch.testing.assert_close(clipped.square().mean().sqrt(), torch.tensor(0.5))
    (kept,) = ClipRms(100.0)([direction], [], [weight])
    torch.testing.assert_close(kept, direction)
    (scaled,) = ParameterScale()([direction], [], [weight])
    torch.testing.assert_close(scaled, 5 * direction)
    (floored,) = ParameterScale(0.1)([direction], [], [torch.zeros(2)])
    torch.testing.assert_close(floored, 0.1 * direction)


@pytest.mark.parametrize("labels", ["sampled", "data"])
def test_sophia_is_its_equations(labels):
    start, rho, size, eps, lr, decay = network(), 0.5, 20, 1e-15, 1e-2, 0.1
    model = copy.deepcopy(start)
    optimizer = curvlib.SophiaG(model, lr, (0.9, 0.8), rho, size, decay, statistics_every=3, eps=eps, labels=labels)
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    average, second = [torch.zeros_like(w) for w in weights], [torch.zeros_like(w) for w in weights]
    clipped = 0
    for t in range(STEPS):
        generator = torch.Generator().manual_seed(t)
        x, y = torch.randn(size, 18, generator=generator, dtype=F64), torch.randint(0, 3, (size,), generator=generator)
        optimizer.zero_grad()
        outputs = model(x)
        optimizer.observe(outputs, "categorical", generator=torch.Generator().manual_seed(t))
        drawn = curvlib.sample_labels(outputs, "categorical", torch.Generator().manual_seed(t))
        drawn = drawn if labels == "sampled" else y
        own = torch.autograd.grad(
            nn.functional.cross_entropy(outputs, drawn), list(model.parameters()), retain_graph=True
        )
        nn.functional.cross_entropy(outputs, y).backward()
        for place, parameter in enumerate(model.parameters()):
            if t % 3 == 0:
                second[place] = 0.8 * second[place] + 0.2 * own[place] ** 2
            average[place] = 0.9 * average[place] + 0.1 * parameter.grad
            ratio = average[place].abs() / (rho * size * second[place] + eps)
            clipped += int((ratio > 1).sum())
            weights[place] = weights[place] * (1 - lr * decay) - lr * average[place].sign() * ratio.clamp(max=1)
        optimizer.step()
        for found, wanted in zip(model.parameters(), weights, strict=True):
            torch.testing.assert_close(found.detach(), wanted, rtol=1e-10, atol=1e-12)
    assert 0.05 < clipped / (STEPS * sum(w.numel() for w in weights)) < 0.95


@pytest.mark.parametrize("make", [curvlib.Lion, curvlib.Adafactor, curvlib.Muon, curvlib.SophiaG])
def test_the_kit(make):
    check_recipe(make, examples=3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: curvlib.Lion(p, betas=(1.5, 0.9)), r"betas\[0\].*1.5"),
        (lambda p: curvlib.Muon(p, iterations=0), "iterations.*0"),
        (lambda p: curvlib.Muon(p, coefficients="cubic"), "coefficients.*'cubic'"),
        (lambda p: curvlib.Adafactor(p, beta2_decay=0.5), "beta2_decay must be at most 0, got 0.5"),
        (lambda p: curvlib.Adafactor(p, d=0.0), "limit.*0"),
        (
            lambda p: curvlib.CurvatureOptimizer(
                p, curvlib.Recipe("... |", rule=curvlib.Rule(curvlib.Momentum(mix=0.9)))
            ),
            "mix needs",
        ),
    ],
)
def test_settings_out_of_range_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make([nn.Parameter(torch.zeros(2, 2))])
