"""Several processes with shares of a batch equal one with the whole batch."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

import curvlib
from curvlib import TapWarning, roots
from curvlib.distributed import shared_out
from curvlib.roots import RootJob
from curvlib.solvers import How
from tests.ranks import GROUPS, home, run

F64 = torch.float64
STEPS, BATCH = 6, 16
METHODS = {
    "MBF": lambda model: curvlib.MBF(model, 0.01, refresh_every=2),
    "MBF of samples": lambda model: curvlib.MBF(model, 0.01, of="samples"),
    "MBF, window": lambda model: curvlib.MBF(model, 0.01, linear_blocks="output", window=4),
    "KFAC": lambda model: curvlib.KFAC(model, 0.05, refresh_every=2),
    "EKFAC": lambda model: curvlib.EKFAC(model, 0.05),
    "Shampoo": lambda model: curvlib.Shampoo(model, 0.01, block_size=3),
    "Shampoo, staggered": lambda model: curvlib.Shampoo(model, 0.01, refresh_every=3, stagger=True),
    "SOAP": lambda model: curvlib.SOAP(model, 0.01, eps=1e-4, refresh_every=1, basis="eigh"),
    "SOAP, defaults": lambda model: curvlib.SOAP(model, 0.01),
    "Adam": lambda model: curvlib.Adam(model, 0.01),
    "Eva": lambda model: curvlib.Eva(model, 0.05),
    "K-BFGS": lambda model: curvlib.KBFGS(model, 0.05),
    "SINGD": lambda model: curvlib.SINGD(model, 0.01, statistics_every=1),
    "AdaHessian": lambda model: curvlib.AdaHessian(model, 0.01),
    "LayerwiseSGD": lambda model: curvlib.LayerwiseSGD(model),
    "KFAC, quadratic": lambda model: curvlib.KFAC(model, quadratic=True, momentum=0.0, kl_clip=None, labels="exact"),
}
RANDOM = {
    "TNT": lambda model: curvlib.TNT(model, 0.001),
    "KFAC, drawn": lambda model: curvlib.KFAC(model, 0.05, labels="sampled"),
}


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(9, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3)
    ).double()


def data(step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(BATCH, 2, 4, dtype=F64, generator=generator)
    return home(x), home(torch.randint(0, 3, (BATCH,), generator=generator))


FROM = {"SOAP, defaults": 14}
"""Methods that begin after so many steps of one process: before, factors have null spaces, of which any basis will do."""


def train(make, rank=0, ranks=1, begin=0):
    """Parameters after some steps on this rank's share of every batch, and the traffic."""
    model = home(network())
    if begin and ranks > 1:
        optimizer = make(model)
        _steps(model, optimizer, range(begin))
        saved = optimizer.state_dict()
    given = nn.parallel.DistributedDataParallel(model) if ranks > 1 else model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TapWarning)
        optimizer = make(given)
    if begin and ranks > 1:
        optimizer.load_state_dict(saved)
    _steps(given, optimizer, range(begin if ranks > 1 else 0, begin + STEPS), rank, ranks)
    values = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    return values, optimizer.traffic()


def _steps(given, optimizer, steps, rank=0, ranks=1):
    for step in steps:
        x, y = (one.chunk(ranks)[rank] for one in data(step))

        def closure(x=x, y=y):
            optimizer.zero_grad()
            outputs = given(x)
            loss = F.cross_entropy(outputs, y)
            optimizer.observe(outputs, "categorical", loss=loss)
            loss.backward(retain_graph=optimizer.needs_graph)
            return loss

        optimizer.step(closure)


class Experts(nn.Module):
    """Every step another expert; from the third on each rank its own, so that others hear nothing of it."""

    def __init__(self):
        super().__init__()
        self.body, self.experts = nn.Linear(8, 4), nn.ModuleList([nn.Linear(4, 6), nn.Linear(4, 6)])
        self.head = nn.Linear(6, 3)

    def forward(self, x, chosen):
        return self.head(torch.tanh(self.experts[chosen](torch.tanh(self.body(x.flatten(1))))))


def train_experts(name, rank, ranks):
    """Parameters after some steps."""
    torch.manual_seed(0)
    model = home(Experts().double())
    given = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TapWarning)
        optimizer = getattr(curvlib, name)(given)
    for step in range(6):
        x, y = (one.chunk(ranks)[rank] for one in data(step))

        def closure(x=x, y=y, step=step):
            optimizer.zero_grad()
            outputs = given(x, step % 2 if step < 2 else rank % 2)
            loss = F.cross_entropy(outputs, y)
            optimizer.observe(outputs, "categorical", loss=loss)
            loss.backward(retain_graph=optimizer.needs_graph)
            return loss

        optimizer.step(closure)
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


EXPERTS = ("Adam", "AdaHessian", "EKFAC", "Eva", "FOOF", "KBFGS", "KFAC", "Shampoo", "SINGD", "TKFAC", "TNT")


def everything(rank, ranks, folder):
    every = {**METHODS, **RANDOM}
    found = {name: train(make, rank, ranks, FROM.get(name, 0)) for name, make in every.items()}
    return found | {f"experts, {name}": (train_experts(name, rank, ranks), {}) for name in EXPERTS}


@pytest.fixture(scope="module", params=GROUPS)
def runs(request, tmp_path_factory):
    """(ranks, rank -> method -> parameters and traffic)."""
    ranks, device = request.param
    return ranks, run(everything, ranks, tmp_path_factory.mktemp("ranks"), device)


@pytest.mark.parametrize("name", METHODS)
def test_shares_of_a_batch_equal_the_whole(runs, name):
    _, found = runs
    alone, traffic = train(METHODS[name], begin=FROM.get(name, 0))
    # Null spaces have many bases, which is why one SOAP is refreshed at every step: the gradient is in none of them.
    torch.testing.assert_close(found[0][name][0], alone, rtol=1e-10, atol=1e-10)
    assert traffic == {}


@pytest.mark.parametrize("name", [*METHODS, *RANDOM])
def test_ranks_are_equal_to_the_last_bit(runs, name):
    _, found = runs
    for other in found[1:]:
        assert torch.equal(other[name][0], found[0][name][0])
        assert other[name][1] == found[0][name][1]


@pytest.mark.parametrize("name", EXPERTS)
def test_ranks_that_call_other_layers_are_equal_to_the_last_bit(runs, name):
    _, found = runs
    values = [one[f"experts, {name}"][0] for one in found]
    assert values[0].isfinite().all()
    for other in values[1:]:
        assert torch.equal(other, values[0])


def test_traffic_is_what_the_docs_say(runs):
    ranks, found = runs
    # KFAC's factors: of inputs with a bias, and of outputs; the norm's diagonals; one weight for each of these.
    inputs, outputs = (2 * 2 + 1, 9 + 1, 5 + 1), (3, 5, 3)
    statistics = sum(n * n for n in (*inputs, *outputs)) + 2 * 5 + len(inputs) + len(outputs) + 2
    assert found[0]["KFAC"][1]["statistics"] == 8 * STEPS * statistics
    costs = [n**3 for pair in zip(outputs, inputs, strict=True) for n in pair]
    sizes = [n for pair in zip(outputs, inputs, strict=True) for n in pair]
    shares, before = [0] * ranks, 0
    for n, cost in zip(sizes, costs, strict=True):
        shares[(2 * before + cost) * ranks // (2 * sum(costs))] += n * n + 2
        before += cost
    refreshes = 4  # steps 0, 2, 4 and, with a dense start, 1
    assert found[0]["KFAC"][1]["roots"] == 8 * refreshes * max(shares)
    assert found[0]["Adam"][1] == {}


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_a_refresh_is_shared_out_by_cost(ranks):
    def job(rows, size):
        how = How(1.0, "cholesky", F64)
        factor = torch.eye(size, dtype=F64).repeat(rows, 1, 1)
        return RootJob(factor, 1.0, 0.5, how, torch.zeros_like(factor), torch.zeros(rows), torch.zeros(rows))

    jobs = [job(5, 3), job(1, 20), job(40, 4), job(2, 10)]
    shares = shared_out(jobs, ranks)
    for share in shares:
        roots.refresh(share)
    for one in jobs:  # every row was solved, once
        torch.testing.assert_close(one.root, one.factor / 1.5)
        assert not one.kept.any()
    assert sum(part.factor.shape[0] for share in shares for part in share) == 48
    costs = [sum(part.factor.shape[0] * part.factor.shape[-1] ** 3 for part in share) for share in shares]
    assert max(costs) <= sum(costs) / ranks + 20**3


@pytest.fixture
def alone(tmp_path):
    """A group of one rank."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_a_group_is_taken_from_the_model_and_forgotten_by_copies():
    model = nn.parallel.DistributedDataParallel(network())
    optimizer = curvlib.Adam(model)
    assert optimizer.process_group is model.process_group
    assert copy.deepcopy(optimizer).process_group is None
    optimizer.process_group = None
    assert optimizer.traffic() == {}
