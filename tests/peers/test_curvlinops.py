"""Factors, blocks and their scales against curvlinops 3.0.1, ASDL (asdfghjkl 0.1a5) and a loop over examples.

What curvlib calls the curvature is the mean over examples of the second moments of the gradients of each example's own
loss. Where another library means a multiple of that, the multiple is written here: :func:`multiple`.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from curvlib import CurvatureOptimizer, Moment, Recipe, Root

curvlinops = pytest.importorskip("curvlinops")

F64, RTOL = torch.float64, 1e-10
N, CLASSES, POSITIONS = 6, 3, 4
LOSSES = {"categorical": nn.CrossEntropyLoss, "gaussian": nn.MSELoss}
SHARINGS = ["expand", "reduce"]
FISHERS = {"data": "EMPIRICAL", "exact": "TYPE2"}
NETWORKS = ["perceptron", "convolutional", "pooled", "positions"]
KINDS = {  # of statistics: partition, moment
    "expand": ("| o, i k...", {"of": "signals", "sharing": "expand"}),
    "reduce": ("| o, i k...", {"of": "signals", "sharing": "reduce"}),
    "neurons": ("o | i k...", {"of": "samples"}),
    "layers": ("| ...", {"of": "samples"}),
}
WAYS = [{"reduction": reduction, "parts": parts} for reduction, parts in product(["mean", "sum"], [1, 2])]

every_network = pytest.mark.parametrize("network", NETWORKS)
every_loss = pytest.mark.parametrize("loss", LOSSES)
every_kind = pytest.mark.parametrize("kind", KINDS)
both_labels = pytest.mark.parametrize("labels", FISHERS)
every_way = pytest.mark.parametrize("way", WAYS, ids=lambda way: f"{way['reduction']}{way['parts']}")


class Of(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.forward = function


def as_torch(outputs, loss):
    """With classes where torch's losses look for them; curvlib has them last."""
    return outputs.movedim(-1, 1) if loss == "categorical" else outputs


def problem(network, loss):
    """(model, inputs, targets); the loss of "positions" is a mean, or a sum, over the positions of an example, too."""
    torch.manual_seed(0)
    if network == "convolutional":
        model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 2, 2), nn.ReLU(), nn.Flatten())
        model.append(nn.Linear(12, CLASSES))
        x = torch.randn(N, 2, 3, 4, dtype=F64)
    else:
        pool = Of(lambda x: x.mean(1)) if network == "pooled" else nn.Identity()
        model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), pool, nn.Linear(4, CLASSES))
        x = torch.randn(N, *(() if network == "perceptron" else (POSITIONS,)), 5, dtype=F64)
    shape = (N, POSITIONS) if network == "positions" else (N,)
    y = torch.randint(0, CLASSES, shape) if loss == "categorical" else torch.randn(*shape, CLASSES, dtype=F64)
    return model.double(), x, y


def layers_of(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))}


def loss_of(outputs, y, loss, reduction):
    return LOSSES[loss](reduction=reduction)(as_torch(outputs, loss), y)


def hear(kind, model, loss, x, y, labels="data", reduction="mean", parts=1, divided=True):
    """An optimizer that took one step of length zero on a batch, in equal parts."""
    partition, moment = KINDS[kind]
    recipe = Recipe(partition, Moment(average="mean", labels=labels, **moment), Root(1, 1.0), join_bias=True)
    optimizer = CurvatureOptimizer(model, recipe, lr=0.0, reduction=reduction if divided else float(parts))
    optimizer.zero_grad()
    for some, wanted in zip(x.chunk(parts), y.chunk(parts), strict=True):
        outputs, each = model(some), 2 if loss == "gaussian" else 1
        optimizer.observe(outputs, loss, scale=each / y[0].numel() if reduction == "mean" else each)
        value = loss_of(outputs, wanted, loss, reduction)
        (value / parts if reduction == "mean" and divided else value).backward()
    optimizer.step()
    return optimizer


def factors(optimizer, layer):
    """Kronecker: of the output gradients, then of the inputs with a bias column last."""
    return [value for name, value in optimizer.state[layer.weight].items() if name.startswith("factor")]


def arguments(model, loss, x, y, reduction="mean", parts=1):
    """What every operator of curvlinops takes."""
    model = nn.Sequential(model, Of(lambda outputs: as_torch(outputs, loss)))
    batches = list(zip(x.chunk(parts), y.chunk(parts), strict=True))
    return model, LOSSES[loss](reduction=reduction), list(model.parameters()), batches


def kfac(labels, sharing, *problem, **way):
    operator = curvlinops.KFACLinearOperator(
        *arguments(*problem, **way),
        fisher_type=curvlinops.FisherType[FISHERS[labels]],
        kfac_approx=curvlinops.KFACType[sharing.upper()],
        separate_weight_and_bias=False,
        check_deterministic=False,
    )
    operator.compute_kronecker_factors()
    return operator


def blocks(operator, model):
    """(name, layer, its block: rows of the weight, row-major, then of the bias)."""
    matrix, layers = operator @ torch.eye(operator.shape[0], dtype=F64), layers_of(model).items()
    sizes = [sum(parameter.numel() for parameter in layer.parameters()) for _, layer in layers]
    rows = zip(layers, matrix.split(sizes), strict=True)
    return [(*layer, some.split(sizes, 1)[index]) for index, (layer, some) in enumerate(rows)]


def multiple(labels, reduction, y):
    """What curvlinops' curvature is of curvlib's.

    It does not divide by the number of examples where the loss does not. The empirical Fisher of a loss that is a mean
    over terms has gradients divided by the root of their number, not by their number.
    """
    if reduction == "sum":
        return y.shape[0]
    return y[0].numel() if labels == "data" else 1


def close(one, two):
    torch.testing.assert_close(one, two, rtol=RTOL, atol=RTOL * float(two.abs().max()))


@pytest.mark.parametrize(  # where positions have losses of their own, curvlinops' exact labels differ: see the next test
    ("network", "labels", "sharing"),
    sorted(set(product(NETWORKS, FISHERS, SHARINGS)) - {("positions", "exact", "reduce")}),
)
@every_loss
@every_way
def test_kronecker_factors_and_their_product_are_those_of_curvlinops(network, loss, labels, sharing, way):
    model, x, y = problem(network, loss)
    optimizer = hear(sharing, model, loss, x, y, labels, **way)
    theirs = kfac(labels, sharing, model, loss, x, y, **way)
    held, times = theirs.state_dict(), multiple(labels, way["reduction"], y)
    for name, layer, block in blocks(theirs, model):
        outputs, inputs = factors(optimizer, layer)
        close(times * outputs[0], held["gradient_covariances"][f"0.{name}"])
        close(inputs[0], held["input_covariances"][f"0.{name}"])
        close(times * optimizer.curvature(layer), block)


@every_loss
def test_exact_labels_of_the_positions_of_an_example_are_independent_also_where_gradients_are_summed(loss):
    model, x, y = problem("positions", loss)
    optimizer = hear("reduce", model, loss, x, y, "exact", "sum")
    together = kfac("exact", "reduce", model, loss, x, y, reduction="sum").state_dict()
    alone = []
    for number in range(POSITIONS):
        one = nn.Sequential(model, Of(lambda outputs, number=number: outputs[:, number]))
        alone.append(kfac("exact", "reduce", one, loss, x, y[:, number], reduction="sum").state_dict())
    for name, layer in layers_of(model).items():
        outputs = N * factors(optimizer, layer)[0][0]
        close(outputs, sum(theirs["gradient_covariances"][f"0.0.{name}"] for theirs in alone))
        assert (outputs - together["gradient_covariances"][f"0.{name}"]).norm() > outputs.norm()


@pytest.mark.parametrize(  # curvlinops' empirical Fisher takes positions for examples
    ("network", "labels"), sorted(set(product(NETWORKS, FISHERS)) - {("positions", "data")})
)
@every_loss
@every_way
def test_exact_blocks_of_layers_are_slices_of_the_dense_matrices_of_curvlinops(network, loss, labels, way):
    model, x, y = problem(network, loss)
    optimizer = hear("layers", model, loss, x, y, labels, **way)
    kind = curvlinops.EFLinearOperator if labels == "data" else curvlinops.GGNLinearOperator
    for _, layer, block in blocks(kind(*arguments(model, loss, x, y, **way), check_deterministic=False), model):
        close(multiple(labels, way["reduction"], y) * optimizer.curvature(layer), block)


@every_network
@every_loss
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_blocks_of_neurons_are_those_of_a_loop_over_examples(network, loss, reduction):
    model, x, y = problem(network, loss)
    optimizer = hear("neurons", model, loss, x, y, reduction=reduction)

    def one(parameters, example, target):
        return loss_of(functional_call(model, parameters, (example[None],)), target[None], loss, reduction)

    each = vmap(grad(one), (None, 0, 0))({name: value.detach() for name, value in model.named_parameters()}, x, y)
    for name, layer in layers_of(model).items():
        rows = torch.cat([each[f"{name}.weight"].flatten(2), each[f"{name}.bias"][:, :, None]], 2)
        close(factors(optimizer, layer)[0], torch.einsum("noi,noj->oij", rows, rows) / N)


@pytest.mark.parametrize("network", NETWORKS[:2])  # ASDL takes positions for examples
@every_loss
@both_labels
def test_the_blocks_of_neurons_are_the_unit_wise_blocks_of_asdl(network, loss, labels):
    asdl = pytest.importorskip("asdl")
    model, x, y = problem(network, loss)
    optimizer = hear("neurons", model, loss, x, y, labels, "sum")
    kind = {"data": asdl.FISHER_EMP, "exact": asdl.FISHER_EXACT}[labels]
    likelihood = {"categorical": asdl.LOSS_CROSS_ENTROPY, "gaussian": asdl.LOSS_MSE}[loss]
    maker = asdl.get_fisher_maker(model, asdl.FisherConfig(kind, [asdl.SHAPE_UNIT_WISE], likelihood, data_size=N))
    maker.setup_logits_repr(outputs := maker.setup_model_call(model, x))
    maker.setup_loss_call(LOSSES[loss](), outputs, y)
    maker.forward_and_backward()
    times = 2 if (labels, loss) == ("exact", "gaussian") else 1  # the Gaussian of ASDL has unit variance
    for layer in layers_of(model).values():
        close(factors(optimizer, layer)[0], times * layer.fisher.unit.data)


@every_network
@every_loss
@every_kind
@both_labels
def test_factors_do_not_depend_on_the_size_of_the_batch_its_parts_or_the_reduction(network, loss, kind, labels):
    model, x, y = problem(network, loss)
    once = hear(kind, model, loss, x, y, labels)
    longer = torch.cat([x, x]), torch.cat([y, y])
    same = [hear(kind, model, loss, *longer, labels), hear(kind, model, loss, *longer, labels, parts=2)]
    same += [hear(kind, model, loss, x, y, labels, parts=2, divided=divided) for divided in (True, False)]
    sums = [hear(kind, model, loss, x, y, labels, "sum", parts) for parts in (1, 2)]
    terms = (CLASSES if loss == "gaussian" else 1) * (POSITIONS if network == "positions" else 1)
    times = terms**2 if labels == "data" else terms  # the loss of an example is a mean over its terms, or their sum
    for layer in layers_of(model).values():
        wanted = factors(once, layer)
        for optimizer in same + sums:
            for index, (one, two) in enumerate(zip(factors(optimizer, layer), wanted, strict=True)):
                close(one, two * (times if optimizer in sums and index == 0 else 1))


@every_loss
@both_labels
@pytest.mark.parametrize("sharing", SHARINGS)
def test_expanding_splits_a_gradient_over_equal_positions_and_reducing_does_not(loss, labels, sharing):
    model, x, y = problem("pooled", loss)
    one = hear(sharing, model, loss, x[:, :1], y, labels)
    many = hear(sharing, model, loss, x[:, :1].expand(-1, POSITIONS, -1), y, labels)
    for layer in layers_of(model).values():
        (outputs, inputs), wanted = factors(many, layer), factors(one, layer)
        close(inputs, wanted[1])
        close(outputs, wanted[0] / (POSITIONS if sharing == "expand" and layer is model[0] else 1))
