"""The problems: the MBF paper's own, and some that two cores carry in minutes."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from .. import data
from ..data import Data, Split
from ..data.pixels import STATISTICS
from .augment import crops_and_colours, crops_and_flips
from .models import GCN, GPT, autoencoder, resnet32, small_cnn, vgg
from .problem import Metric, Problem, Target, register


def reconstruction(outputs: Tensor, batch: Split) -> Tensor:
    """Binary cross-entropy with logits, summed over pixels, mean over examples."""
    return F.binary_cross_entropy_with_logits(outputs, batch.inputs, reduction="sum") / len(batch)


def squares(outputs: Tensor, batch: Split) -> Tensor:
    """Half the squared error, summed over pixels, mean over examples."""
    return (outputs - batch.inputs).square().sum() / (2 * len(batch))


def classification(outputs: Tensor, batch: Split) -> Tensor:
    """Cross-entropy, mean over examples, and over the characters of each where there are several."""
    return F.cross_entropy(outputs.flatten(0, -2), batch.labels.flatten())


def _right(outputs: Tensor, batch: Split) -> Tensor:
    return (outputs.argmax(-1) == batch.labels).float().mean()


ACCURACY = Metric("accuracy", "higher", _right)
LOGIT_ERROR = Metric("pixel error", "lower", lambda outputs, batch: (outputs.sigmoid() - batch.inputs).square().mean())
PIXEL_ERROR = Metric("pixel error", "lower", lambda outputs, batch: (outputs - batch.inputs).square().mean())

_HINTON = "Hinton & Salakhutdinov 2006, as in the MBF, TNT and K-BFGS papers"


def thirds(share: float) -> float:
    """A tenth of the step size after each third of the budget, as the MBF authors have it for CNNs."""
    return 0.1 ** min(int(3 * share), 2)


def first_layer(model: nn.Module) -> Tensor:
    """Kipf & Welling's L2: 5e-4 times half the squares of the first layer's weight."""
    return 2.5e-4 * next(model.parameters()).square().sum()


def _gpt(given: Data, width: int, depth: int, heads: int, dropout: float) -> GPT:
    return GPT(len(given.extra["letters"]), given.train.inputs.shape[1], width, depth, heads, dropout)


register(
    Problem(
        "digits-autoencoder",
        "Autoencoder on digits",
        "scikit-learn's handwritten digits; 64-128-64-32-8-32-64-128-64",
        lambda _: autoencoder(64, 128, 64, 32, 8, 32, 64, 128, 64),
        data.digits,
        reconstruction,
        "bernoulli",
        batch_size=128,
        epochs=120,
        target=Target("train", 20.0),
        metric=LOGIT_ERROR,
    )
)
register(
    Problem(
        "digits-cnn",
        "Small CNN on digits",
        "scikit-learn's handwritten digits; two convolutions and a linear layer",
        lambda _: small_cnn(),
        data.digits,
        classification,
        "categorical",
        batch_size=128,
        epochs=15,
        target=Target("train", 0.1),
        metric=ACCURACY,
    )
)
register(
    Problem(
        "mnist-autoencoder",
        "Autoencoder on MNIST",
        f"{_HINTON}; 784-1000-500-250-30-250-500-1000-784",
        lambda _: autoencoder(784, 1000, 500, 250, 30, 250, 500, 1000, 784),
        data.mnist,
        reconstruction,
        "bernoulli",
        batch_size=1000,
        epochs=20,
        target=Target("train", 70.0),
        metric=LOGIT_ERROR,
        seconds=500,
    )
)
register(
    Problem(
        "mnist-autoencoder-small",
        "Small autoencoder on MNIST",
        "the MNIST autoencoder, reduced to 784-128-64-16-64-128-784",
        lambda _: autoencoder(784, 128, 64, 16, 64, 128, 784),
        data.mnist,
        reconstruction,
        "bernoulli",
        batch_size=1000,
        epochs=10,
        target=Target("train", 100.0),
        metric=LOGIT_ERROR,
    )
)
register(
    Problem(
        "faces-autoencoder",
        "Autoencoder on FACES",
        f"{_HINTON}; 625-2000-1000-500-30-500-1000-2000-625, half the squared error",
        lambda _: autoencoder(625, 2000, 1000, 500, 30, 500, 1000, 2000, 625),
        data.faces,
        squares,
        "gaussian",
        batch_size=1000,
        epochs=20,
        target=Target("train", 20.0),
        metric=PIXEL_ERROR,
        seconds=2000,
    )
)
register(
    Problem(
        "curves-autoencoder",
        "Autoencoder on CURVES",
        f"{_HINTON}; 784-400-200-100-50-25-6-25-50-100-200-400-784",
        lambda _: autoencoder(784, 400, 200, 100, 50, 25, 6, 25, 50, 100, 200, 400, 784),
        data.curves,
        reconstruction,
        "bernoulli",
        batch_size=1000,
        epochs=200,
        target=Target("train", 80.0),
        metric=LOGIT_ERROR,
        seconds=500,
    )
)
register(
    Problem(
        "fashion-cnn",
        "Small CNN on Fashion-MNIST",
        "Xiao, Rasul & Vollgraf 2017; two convolutions and two linear layers",
        lambda _: small_cnn(28, hidden=64),
        data.fashion,
        classification,
        "categorical",
        batch_size=256,
        epochs=4,
        target=Target("metric", 0.88),
        metric=ACCURACY,
        tunable="test",
        points=4,
    )
)
register(
    Problem(
        "cifar10-resnet32",
        "ResNet-32 on CIFAR-10",
        "He et al. 2016, as in the MBF and TNT papers; shortcuts without parameters, crops and flips",
        lambda _: resnet32(),
        data.cifar10,
        classification,
        "categorical",
        batch_size=128,
        epochs=150,
        target=Target("metric", 0.92),
        metric=ACCURACY,
        augment=crops_and_flips(STATISTICS["cifar10"]),
        decay=thirds,
        tunable="metric",
    )
)
register(
    Problem(
        "cifar100-vgg16",
        "VGG16 on CIFAR-100",
        "Simonyan & Zisserman 2015, as in the MBF paper; batch normalisation, crops and flips",
        lambda _: vgg(16, 100, norm=True),
        data.cifar100,
        classification,
        "categorical",
        batch_size=128,
        epochs=150,
        target=Target("metric", 0.73),
        metric=ACCURACY,
        augment=crops_and_flips(STATISTICS["cifar100"]),
        decay=thirds,
        tunable="metric",
    )
)
register(
    Problem(
        "svhn-vgg11",
        "VGG11 on SVHN",
        "Simonyan & Zisserman 2015, as in the MBF paper; no normalisation, crops and colours",
        lambda _: vgg(11, 10, norm=False),
        data.svhn,
        classification,
        "categorical",
        batch_size=128,
        epochs=150,
        target=Target("metric", 0.95),
        metric=ACCURACY,
        augment=crops_and_colours(STATISTICS["svhn"]),
        decay=thirds,
        tunable="metric",
    )
)
for _name, _title, _load, _classes, _value in (
    ("cora-gcn", "Cora", data.cora, 7, 0.8),
    ("citeseer-gcn", "CiteSeer", data.citeseer, 6, 0.68),
    ("pubmed-gcn", "Pubmed", data.pubmed, 3, 0.77),
):
    register(
        Problem(
            _name,
            f"GCN on {_title}",
            "Kipf & Welling 2017 (two layers, 16 hidden units, dropout 0.5, L2 5e-4 on the first) on a Planetoid split: 20 "
            "labels a class, settings by 500 others; whole graph at every step",
            partial(GCN, classes=_classes),
            _load,
            classification,
            "categorical",
            batch_size=1,
            epochs=200,
            target=Target("metric", _value),
            metric=ACCURACY,
            penalty=first_layer,
            tunable="test",
        )
    )
for _name, _title, _length, _width, _depth, _heads, _dropout, _batch, _epochs, _value in (
    ("char-gpt-tiny", "Tiny transformer", 64, 64, 2, 4, 0.0, 32, 1, 2.2),
    ("char-gpt", "Small transformer", 64, 128, 4, 4, 0.0, 32, 4, 1.9),
    ("char-gpt-384", "Transformer", 256, 384, 6, 6, 0.2, 64, 80, 1.5),
):
    register(
        Problem(
            _name,
            f"{_title} on Tiny Shakespeare",
            f"Karpathy's nanoGPT: {_depth} blocks of width {_width}, {_heads} heads, context {_length}, by characters",
            partial(_gpt, width=_width, depth=_depth, heads=_heads, dropout=_dropout),
            partial(data.shakespeare, length=_length),
            classification,
            "categorical",
            batch_size=_batch,
            epochs=_epochs,
            target=Target("test", _value),
            metric=ACCURACY,
            tunable="test",
            points=5,
        )
    )
