"""Parameters that are shards (FSDP2): what is trained, saved and refused is what it is without shards."""

from __future__ import annotations

import warnings
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn import functional as F

import curvlib
from curvlib import TapWarning
from tests.ranks import GROUPS, home, run

F64 = torch.float64
STEPS, BATCH = 6, 16


def in_rows(model, window):
    settings = {"damping": 0.1, "relative_damping": False, "grafting": None, "linear_blocks": "output"}
    return curvlib.MBF(model, 0.01, window=window, **settings)


METHODS = {
    "SGD": lambda model: curvlib.SGD(model, 0.05, momentum=0.9, weight_decay=0.1),
    "Adam": lambda model: curvlib.Adam(model, 0.01),
    "AdamW": lambda model: curvlib.AdamW(model, 0.01, weight_decay=0.1),
    "Lion": lambda model: curvlib.Lion(model, 0.01),
    "Adafactor": lambda model: curvlib.Adafactor(model, 0.01),
    "MBF": lambda model: curvlib.MBF(model, 0.01, refresh_every=2),
    "MBF by output": lambda model: curvlib.MBF(model, 0.01, linear_blocks="output"),
    "MBF, window": lambda model: curvlib.MBF(model, 0.01, linear_blocks="output", window=4),
    "MBF in rows": lambda model: in_rows(model, None),
    "MBF in rows, window": lambda model: in_rows(model, 4),
    "MBF of samples": lambda model: curvlib.MBF(model, 0.01, of="samples"),
    "KFAC": lambda model: curvlib.KFAC(model, 0.05, refresh_every=2, statistics_every=2),
    "KFAC, exact": lambda model: curvlib.KFAC(model, 0.05, labels="exact"),
    "Shampoo": lambda model: curvlib.Shampoo(model, 0.01, block_size=3),
    "Shampoo, staggered": lambda model: curvlib.Shampoo(model, 0.01, block_size=3, refresh_every=3, stagger=True),
    "KFAC, staggered": lambda model: curvlib.KFAC(model, 0.05, refresh_every=3, stagger=True),
    "MBF, staggered": lambda model: curvlib.MBF(model, 0.01, linear_blocks="output", refresh_every=3, stagger=True),
    "SOAP": lambda model: curvlib.SOAP(model, 0.01, eps=1e-4, refresh_every=1, basis="eigh"),
    "Muon": lambda model: curvlib.Muon(model, 0.01),
    "Eva": lambda model: curvlib.Eva(model, 0.05),
    "K-BFGS": lambda model: curvlib.KBFGS(model, 0.05),
    "PSGDKron": lambda model: curvlib.PSGDKron(model, 0.01),
}
SAVED = (
    "Adam",
    "MBF by output",
    "MBF, window",
    "MBF in rows",
    "MBF in rows, window",
    "KFAC",
    "Shampoo",
    "Shampoo, staggered",
    "SOAP",
    "K-BFGS",
)


def network(narrow=3):
    torch.manual_seed(0)
    layers = (nn.Conv1d(2, 4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 8), nn.LayerNorm(8), nn.Tanh())
    return home(nn.Sequential(*layers, nn.Linear(8, narrow)).double())


def data(step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(BATCH, 2, 4, dtype=F64, generator=generator)
    return home(x), home(torch.randint(0, 3, (BATCH,), generator=generator))


def shard(model, mesh=None):
    fully_shard(model[3], mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def make(name, model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TapWarning)
        return METHODS[name](model)


def train(model, optimizer, steps, rank=0, ranks=1):
    for step in steps:
        x, y = (one.chunk(ranks)[rank] for one in data(step))

        def closure(x=x, y=y):
            optimizer.zero_grad()
            outputs = model(x)
            loss = F.cross_entropy(outputs, y)
            optimizer.observe(outputs, "categorical")
            loss.backward()
            return loss

        optimizer.step(closure)


def values(model):
    found = [one.full_tensor() if isinstance(one, DTensor) else one for one in model.state_dict().values()]
    return torch.cat([one.flatten() for one in found])


def checkpoint(model, optimizer):
    return {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}


@contextmanager
def quiet():
    """Torch warns of checkpoints of one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


@quiet()
def save(path, model, optimizer):
    dcp.save(checkpoint(model, optimizer), checkpoint_id=path)


@quiet()
def load(path, model, optimizer):
    state = checkpoint(model, optimizer)
    dcp.load(state, checkpoint_id=path)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, optim_state_dict=state["optimizer"])


def alone(name, steps=STEPS):
    model = network()
    train(model, make(name, model), range(steps))
    return values(model)


def trained(rank, ranks, folder):
    found = {}
    for name in METHODS:
        model = shard(network())
        optimizer = make(name, model)
        train(model, optimizer, range(STEPS), rank, ranks)
        found[name] = values(model), optimizer.traffic()
    return found


def halfway(rank, ranks, folder):
    """Saved after half of the steps, and what the other half makes of it."""
    found = {}
    for name in SAVED:
        model = shard(network())
        optimizer = make(name, model)
        train(model, optimizer, range(STEPS // 2), rank, ranks)
        save(f"{folder}/{name}", model, optimizer)
        full = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
        train(model, optimizer, range(STEPS // 2, STEPS), rank, ranks)
        again = shard(network())
        other = make(name, again)
        load(f"{folder}/{name}", again, other)
        train(again, other, range(STEPS // 2, STEPS), rank, ranks)
        found[name] = values(model), values(again), full
    return found


def resumed(rank, ranks, folder):
    found = {}
    for name in SAVED:
        model = shard(network())
        optimizer = make(name, model)
        load(f"{folder}/{name}", model, optimizer)
        train(model, optimizer, range(STEPS // 2, STEPS), rank, ranks)
        found[name] = values(model)
    return found


def copies(rank, ranks, folder):
    """Two groups of shards with copies of each other."""
    mesh = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("copies", "shards"))
    found = {}
    for name in ("Adam", "KFAC", "Shampoo"):
        model = shard(network(), mesh)
        train(model, make(name, model), range(STEPS), rank, ranks)
        found[name] = values(model)
    return found


def broken(rank, ranks, folder):
    """A gradient that is not finite on one rank alone."""
    found = {}
    for name in ("Adam", "Shampoo"):
        model = shard(network())
        optimizer = make(name, model)
        train(model, optimizer, range(1), rank, ranks)
        before = values(model)
        F.cross_entropy(model(data(1)[0]), data(1)[1]).backward()
        if rank == ranks - 1:
            model[3].weight.grad.to_local()[0, 0] = torch.nan
        with pytest.raises(curvlib.NonFiniteGradient) as error:
            optimizer.step()
        assert torch.equal(values(model), before)
        optimizer.zero_grad()
        train(model, optimizer, range(1, STEPS), rank, ranks)
        found[name] = error.value.names, values(model)
    return found


@pytest.fixture(scope="module", params=GROUPS)
def runs(request, tmp_path_factory):
    ranks, device = request.param
    return run(trained, ranks, tmp_path_factory.mktemp("shards"), device)


@pytest.mark.parametrize("name", METHODS)
def test_shards_equal_the_whole(runs, name):
    torch.testing.assert_close(runs[0][name][0], alone(name), rtol=1e-10, atol=1e-10)
    for other in runs[1:]:
        assert torch.equal(other[name][0], runs[0][name][0])


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Lion", "MBF in rows", "MBF in rows, window"])
def test_rows_do_not_travel(runs, name):
    if len(runs) == 4 and name.startswith("MBF"):
        pytest.skip("the last layer has fewer rows than there are ranks, so that it is whole")
    assert all(one[name][1].get("shards", 0) == 0 for one in runs)


def test_what_travels_is_what_the_docs_say(runs):
    """Of every weight and its bias two tensors to the owner and one back, and nothing else."""
    weights = {"conv": 4 * 2 * 2 + 4, "first": 8 * 12 + 8, "norm": 8, "shift": 8, "last": 3 * 8 + 3}
    # Whether all gradients are finite, int32, and the size of KFAC's clip, float64.
    assert {one["KFAC"][1]["agreed"] for one in runs} == {STEPS * (4 + 8)}
    assert {one["Adam"][1]["agreed"] for one in runs} == {STEPS * 4}
    assert sum(one["KFAC"][1]["shards"] for one in runs) == 8 * STEPS * 3 * sum(weights.values())
    # The second moments of every input and output factor, the norm's diagonals, and a weight for each.
    inputs, outputs = (2 * 2 + 1, 12 + 1, 8 + 1), (4, 8, 3)
    statistics = sum(n * n for n in (*inputs, *outputs)) + 2 * 8 + len(inputs) + len(outputs) + 2
    due = STEPS // 2
    assert {one["KFAC"][1]["statistics"] for one in runs} == {8 * due * statistics}


def test_a_checkpoint_is_of_any_number_of_ranks(tmp_path):
    """Bitwise on as many ranks; to rounding on others, and without shards at all."""
    saved = run(halfway, 2, tmp_path)
    more = run(resumed, 4, tmp_path)
    for name in SAVED:
        went_on, again, full = saved[0][name]
        assert torch.equal(again, went_on), name
        torch.testing.assert_close(more[0][name], went_on, rtol=1e-10, atol=1e-10)
        model = network()
        optimizer = make(name, model)
        load(f"{tmp_path}/{name}", model, optimizer)
        train(model, optimizer, range(STEPS // 2, STEPS))
        torch.testing.assert_close(values(model), went_on, rtol=1e-10, atol=1e-10)
        mine = get_optimizer_state_dict(model, optimizer)["state"]
        assert {p: {k: v.shape for k, v in one.items()} for p, one in full["state"].items()} == {
            p: {k: v.shape for k, v in one.items()} for p, one in mine.items()
        }


def test_one_process_saves_for_many(tmp_path):
    wanted = {}
    for name in SAVED:
        model = network()
        optimizer = make(name, model)
        train(model, optimizer, range(STEPS // 2))
        save(f"{tmp_path}/{name}", model, optimizer)
        train(model, optimizer, range(STEPS // 2, STEPS))
        wanted[name] = values(model)
    for name, found in run(resumed, 2, tmp_path)[1].items():
        torch.testing.assert_close(found, wanted[name], rtol=1e-10, atol=1e-10)


def test_copies_of_shards(tmp_path):
    found = run(copies, 4, tmp_path)
    for name, value in found[0].items():
        torch.testing.assert_close(value, alone(name), rtol=1e-10, atol=1e-10)
        assert all(torch.equal(value, other[name]) for other in found)


def test_all_ranks_know_of_one_that_is_not_finite(tmp_path):
    found = run(broken, 2, tmp_path)
    for name in ("Adam", "Shampoo"):
        assert found[0][name][0] == found[1][name][0] == ("3.weight",)
        torch.testing.assert_close(found[0][name][1], alone(name), rtol=1e-10, atol=1e-10)


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("method", "why"),
    [
        (curvlib.TNT, "another pass"),
        (curvlib.AdaHessian, "another pass"),
        (curvlib.LayerwiseSGD, "models the loss"),
        (curvlib.EKFAC, "bases that only one rank has"),
    ],
)
def test_what_shards_can_not_do_is_refused_by_name(one_rank, method, why):
    with pytest.raises(ValueError, match=rf"0\.weight is sharded, which this recipe can't be: .*{why}"):
        method(shard(network(), one_rank))


@pytest.mark.parametrize("place", [Shard(1), Replicate()])
def test_other_placements_are_refused_by_name(one_rank, place):
    weight = nn.Parameter(distribute_tensor(torch.ones(4, 2), one_rank, [place]))
    with pytest.raises(ValueError, match=r"parameter weight is a DTensor placed as .*allowed are rows"):
        curvlib.Shampoo([("weight", weight)])


def test_a_preconditioner_of_shards(one_rank):
    recipe = curvlib.Recipe("| ,...", root=curvlib.Root(0.5))
    found = []
    for model in (network(), shard(network(), one_rank)):
        preconditioner = curvlib.Preconditioner(model, recipe)
        F.cross_entropy(model(data(0)[0]), data(0)[1]).backward()
        preconditioner.step()
        grads = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in model.parameters()]
        found.append(torch.cat([one.flatten() for one in grads]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["KFAC", "Adam"])
def test_a_checkpoint_may_be_asked_for_before_the_first_step(name, tmp_path):
    """Torch then takes a step of size zero, which methods on layers have heard nothing for."""
    model = network()
    optimizer = make(name, model)
    train(model, optimizer, range(2))
    save(str(tmp_path), model, optimizer)
    again = network()
    other = make(name, again)
    load(str(tmp_path), again, other)
    train(again, other, range(2, 4))
    train(model, optimizer, range(2, 4))
    assert torch.equal(values(again), values(model))
