"""Problems: their models, losses and metrics by plain words; batches and augmentation functions of their number."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

import curvlib
from benchmarks.data import Data, Split
from benchmarks.data.graphs import adjacency
from benchmarks.data.pixels import STATISTICS
from benchmarks.problems import (
    ACCURACY,
    PROBLEMS,
    Metric,
    Problem,
    Target,
    batches,
    classification,
    evaluate,
    register,
    squares,
)
from benchmarks.problems.augment import colours, crops_and_colours, crops_and_flips, flips, shifts
from benchmarks.problems.models import GCN, GPT, resnet32, vgg
from benchmarks.records import Results, Spec
from benchmarks.runner import execute

CIFAR = STATISTICS["cifar10"]


def example(name):
    """A batch as a problem has it, and what its model is built with."""
    problem = PROBLEMS[name]
    if name.endswith("gcn"):
        graph = {node: [(node + 1) % 30, (node + 7) % 30] for node in range(30)}
        extra = {"features": torch.rand(30, 11), "adjacency": adjacency(graph, 30)}
        nodes = torch.arange(4)[None]
        return Data(Split(nodes, nodes % 3), Split(nodes, nodes % 3), extra=extra)
    if name.startswith("char"):
        text = torch.randint(0, 65, (3, 256 if name.endswith("384") else 64))
        return Data(Split(text, text), Split(text, text), extra={"letters": ["x"] * 65})
    if name in ("cifar10-resnet32", "cifar100-vgg16", "svhn-vgg11"):
        inputs = torch.randn(3, 3, 32, 32)
    else:
        inputs = torch.rand(3, {"digits": 64, "faces": 625}.get(name.partition("-")[0], 784))
    split = Split(inputs, torch.arange(len(inputs)))
    assert problem.batch_size > 0
    return Data(split, split)


@pytest.mark.parametrize("name", PROBLEMS)
def test_every_problem_trains_and_is_judged(name):
    torch.manual_seed(0)
    problem, given = PROBLEMS[name], example(name)
    model = problem.build(given)
    outputs = model(given.train.inputs)
    loss = problem.loss(outputs, given.train)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    judged, metric = evaluate(model, problem, given.test)
    assert math.isfinite(judged)
    assert math.isfinite(metric)
    drawn = curvlib.sample_labels(outputs.detach(), problem.likelihood)
    assert drawn.shape == (given.train.labels.shape if problem.likelihood == "categorical" else outputs.shape)


@pytest.mark.parametrize(
    ("build", "count"),
    [
        (lambda: resnet32(), 464_154),  # torch's counts for the same networks, by hand: He et al. have 0.46 M
        (lambda: vgg(11, 10, norm=False), 9_220_480 + 512 * 4096 + 4096 + 4096 * 4096 + 4096 + 4096 * 10 + 10),
        (
            lambda: vgg(16, 100, norm=True),
            14_714_688 + 8448 + 512 * 4096 + 4096 + 4096 * 4096 + 4096 + 4096 * 100 + 100,
        ),
        (lambda: GPT(65, 256, 384, 6, 6), 65 * 384 * 2 + 256 * 384 + 6 * (12 * 384**2 + 13 * 384) + 768),
    ],
)
def test_models_have_the_sizes_of_their_papers(build, count):
    assert sum(parameter.numel() for parameter in build().parameters()) == count


def test_a_transformer_does_not_look_ahead():
    torch.manual_seed(0)
    model = GPT(9, 8, 16, 2, 4).double()
    text = torch.randint(0, 9, (2, 8))
    changed = text.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 9
    before, after = model(text), model(changed)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


def test_attention_is_torch_s():
    torch.manual_seed(0)
    block = GPT(9, 8, 16, 1, 4).double().blocks[0]
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter)
    stream = torch.randn(2, 8, 16, dtype=torch.float64)
    parts = block.triple(block.attention_norm(stream)).view(2, 8, 3, 4, 4).permute(2, 0, 3, 1, 4)
    seen = F.scaled_dot_product_attention(*parts, is_causal=True).transpose(1, 2).flatten(2)
    middle = stream + block.joined(seen)
    assert torch.allclose(block(stream), middle + block.perceptron(middle))


def test_a_graph_network_is_its_equations():
    torch.manual_seed(0)
    given = example("cora-gcn")
    model = GCN(given, 3).eval()
    dense, features = given.extra["adjacency"].to_dense(), given.extra["features"]
    hidden = (dense @ features @ model.first.weight.T + model.first.bias).relu()
    expected = dense @ hidden @ model.second.weight.T + model.second.bias
    assert torch.allclose(model(torch.tensor([[5, 2]])), expected[[5, 2]], atol=1e-6)


def test_a_graph_network_drops_words_and_is_decayed_as_published():
    torch.manual_seed(0)
    given = example("cora-gcn")
    model, seen = GCN(given, 3), []
    model.first.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for _ in range(2000):
        model(given.train.inputs)
    mean = torch.stack(seen).mean(0)
    assert torch.allclose(mean[0], given.extra["adjacency"] @ given.extra["features"], atol=0.06)
    assert not torch.allclose(seen[0], seen[1])
    loss = PROBLEMS["cora-gcn"].penalty(model)
    assert float(loss.detach()) == pytest.approx(5e-4 * 0.5 * float(model.first.weight.detach().square().sum()))


@pytest.fixture
def _every_warning():
    """Torch gives some of its warnings once in a process."""
    torch.set_warn_always(True)
    yield
    torch.set_warn_always(False)


@pytest.mark.usefixtures("_every_warning")
@pytest.mark.parametrize("method", ["kfac", "mbf-samples"])
def test_a_graph_network_is_heard(method, tmp_path):
    problem, given = PROBLEMS["cora-gcn"], example("cora-gcn")
    record = execute(Spec("cora-gcn", method, {}, 0, steps=3), given, Results(tmp_path))
    assert problem.batch_size == len(given.train) == 1
    assert record.warnings == []


def test_losses_and_metrics_by_hand():
    outputs = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    batch = Split(torch.tensor([[0.0, 2.0], [1.0, 1.0]]), torch.tensor([1, 1]))
    assert float(squares(outputs, batch)) == (0.5 * 1 + 0.5 * (4 + 1)) / 2
    assert float(ACCURACY.of(outputs, batch)) == 0.5
    text = torch.randn(3, 4, 5)
    labels = torch.randint(0, 5, (3, 4))
    mean = torch.stack([F.cross_entropy(one, two) for one, two in zip(text, labels, strict=True)]).mean()
    assert torch.allclose(classification(text, Split(labels, labels)), mean)


def test_evaluation_in_chunks_is_the_mean_over_examples(tiny):
    torch.manual_seed(0)
    data = tiny.load(None)
    problem = replace(tiny, batch_size=3, metric=ACCURACY)
    model = problem.build(data)
    model(data.train.inputs)  # its running statistics
    found = evaluate(model, problem, data.train)
    assert model.training
    outputs = model.eval()(data.train.inputs)
    expected = classification(outputs, data.train), ACCURACY.of(outputs, data.train)
    assert found == pytest.approx([one.item() for one in expected], rel=1e-5)


@pytest.mark.parametrize(("of", "better", "value", "reached"), [
    ("train", "lower", 1.0, True), ("train", "lower", 0.9, False), ("metric", "higher", 0.5, True),
    ("metric", "higher", 0.7, False), ("metric", "lower", 0.7, True), ("test", "higher", 2.0, True),
])  # fmt: skip
def test_targets(tiny, of, better, value, reached):
    from benchmarks.records import Point

    problem = replace(tiny, metric=Metric("m", better, ACCURACY.of))
    assert Target(of, value).reached(Point(1, 1.0, train=1.0, test=2.0, metric=0.6), problem) is reached


def test_batches_are_functions_of_seed_and_number(tiny):
    split = tiny.load(None).train
    problem = replace(tiny, augment=lambda inputs, generator: inputs + torch.rand(inputs.shape, generator=generator))
    whole = list(batches(problem, split, 3, 0, 10))
    late = list(batches(problem, split, 3, 6, 10))
    for one, other in zip(whole[6:], late, strict=True):
        assert torch.equal(one.inputs, other.inputs)
        assert torch.equal(one.labels, other.labels)
    others = list(batches(problem, split, 4, 0, 1))
    assert not torch.equal(whole[0].inputs, others[0].inputs)


def test_shifts_are_crops_of_a_black_border():
    torch.manual_seed(0)
    images = torch.rand(5, 3, 32, 32)
    mean, deviation = (torch.tensor(values)[:, None, None] for values in CIFAR)
    drawn = torch.randint(0, 9, (2, 5, 1), generator=torch.Generator().manual_seed(7)).squeeze(2)
    found = shifts((images - mean) / deviation, torch.Generator().manual_seed(7), 4, CIFAR) * deviation + mean
    for number in range(5):
        down, right = drawn[:, number].tolist()
        expected = F.pad(images[number], (4, 4, 4, 4))[:, down : down + 32, right : right + 32]
        assert torch.allclose(found[number], expected, atol=1e-6)


def test_flips_mirror_about_half():
    images = torch.arange(12.0).view(1, 1, 3, 4).repeat(400, 3, 1, 1)
    found = flips(images, torch.Generator().manual_seed(0))
    mirrored = (found == images.flip(-1)).flatten(1).all(1)
    assert ((found == images).flatten(1).all(1) ^ mirrored).all()
    assert 150 < int(mirrored.sum()) < 250


def test_colours_stay_colours_and_grey_stays_grey():
    statistics = STATISTICS["svhn"]
    mean, deviation = (torch.tensor(values)[:, None, None] for values in statistics)
    grey = torch.rand(6, 1, 8, 8).expand(-1, 3, -1, -1)
    found = colours((grey - mean) / deviation, torch.Generator().manual_seed(0), statistics) * deviation + mean
    assert found.min() > -1e-5
    assert found.max() < 1 + 1e-5
    assert torch.allclose(found, found[:, :1].expand(-1, 3, -1, -1), atol=1e-5)  # saturation has nothing to do
    assert not torch.allclose(found, grey, atol=1e-2)


@pytest.mark.parametrize("make", [crops_and_flips, crops_and_colours])
def test_augmentation_keeps_shapes_and_follows_its_generator(make):
    images = torch.randn(4, 3, 32, 32)
    augment = make(CIFAR)
    found = [augment(images, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert found[0].shape == images.shape
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_steps_shrink_where_a_problem_says_so(tiny, monkeypatch, tmp_path):
    seen = []
    step = torch.optim.SGD.step

    def watched(self, closure=None):
        seen.append(self.param_groups[0]["lr"])
        return step(self, closure)

    monkeypatch.setattr(torch.optim.SGD, "step", watched)
    monkeypatch.setitem(PROBLEMS, "tiny", replace(tiny, decay=lambda share: 0.1 if share >= 0.5 else 1.0))
    execute(Spec("tiny", "torch.optim:SGD", {"lr": 0.5}, 0, steps=8), tiny.load(None), Results(tmp_path))
    assert seen == pytest.approx([0.5] * 4 + [0.05] * 4)


def test_a_problem_of_one_s_own_in_a_few_lines(monkeypatch, tmp_path):
    monkeypatch.delitem(PROBLEMS, "line", raising=False)

    # What a user writes.
    def load(folder):
        inputs = torch.linspace(-1, 1, 64)[:, None]
        return Data(Split(inputs, (inputs[:, 0] > 0).long()), Split(inputs, (inputs[:, 0] > 0).long()))

    line = register(
        Problem(
            "line",
            "A line",
            "made up",
            lambda data: torch.nn.Linear(1, 2),
            load,
            classification,
            "categorical",
            batch_size=16,
            epochs=10,
            target=Target("metric", 0.95),
            metric=ACCURACY,
        )
    )
    # Until here.
    record = execute(Spec("line", "adam", {"lr": 0.1}, 0, epochs=10), line.load(None), Results(tmp_path))
    assert any(line.target.reached(point, line) for point in record.points)
    with pytest.raises(ValueError, match=r"there is a problem 'line' already, 'A line'"):
        register(line)
    PROBLEMS.pop("line")
