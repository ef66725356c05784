"""The laboratory: what block structures lose on really trained networks, as figures and tables on one page."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

import curvlib
from curvlib import Damping, Moment, Recipe, Root
from curvlib.analysis import Comparison, Objective, Structure, compare, fisher
from curvlib.blocks import EigenBlock

from .data import Data, digits, mnist
from .problems import shuffled
from .records import write_whole

DAMPINGS = (0.01, 0.1, 1.0, 10.0)
"""λ, as multiples of the mean eigenvalue of the layer's exact Fisher."""


@dataclass(frozen=True)
class Specimen:
    """One layer of one trained network, and what it is looked at through.

    Args:
        name: of files.
        title: of figures.
        build: a fresh network.
        layer: the weight that is looked at.
        structures: name -> structure.
        spectra: the structures whose eigenvalues are drawn.
        maps: title -> partition whose blocks are drawn into the inverse.
        about: what it is.
        others: weights of which only the inverse is drawn.
    """

    name: str
    title: str
    build: Callable[[], nn.Module]
    layer: str
    structures: Mapping[str, Structure]
    spectra: Sequence[str]
    maps: Mapping[str, str]
    about: str
    others: Sequence[str] = ()


class Attention(nn.Module):
    """The rows of an image as tokens, one layer of self-attention with a fused projection, mean pooling, and classes."""

    def __init__(self, rows: int = 8, pixels: int = 8, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.rows, self.heads = rows, heads
        self.embed = nn.Linear(pixels, width)
        self.position = nn.Parameter(0.1 * torch.randn(rows, width))
        self.project = nn.Linear(width, 3 * width)
        self.merge = nn.Linear(width, width)
        self.classes = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores ``[n, 10]`` of images ``[n, rows · pixels]``."""
        tokens = torch.tanh(self.embed(x.unflatten(1, (self.rows, -1))) + self.position)
        query, key, value = self.project(tokens).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        pooled: Tensor = self.classes((tokens + self.merge(mixed)).mean(1))
        return pooled


def tanh_network() -> nn.Sequential:
    """256-20-20-20-20-20-10 with tanh, of the MBF authors' code."""
    widths = (256, 20, 20, 20, 20, 20)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(20, 10))


def conv_network() -> nn.Sequential:
    """Two 3×3 convolutions with 8 and 12 channels on 8×8 images, and a linear layer."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(48, 10),
    )


def per_head(partition: str) -> Recipe:
    """A structure over the heads of a fused projection."""
    return Recipe(
        partition,
        Moment("samples", composition="trace"),
        Root(1, Damping(1e-2)),
        axes="(part head d) i",
        sizes={"part": 3, "head": 4},
        block=EigenBlock if "," in partition else None,
    )


_METHODS: Mapping[str, Structure] = {"KFAC": curvlib.KFAC, "KFAC, eigen": partial(curvlib.KFAC, form="eigen")}
_REDUCED: Mapping[str, Structure] = {"KFAC, eigen, reduce": partial(curvlib.KFAC, form="eigen", sharing="reduce")}

SPECIMENS = (
    Specimen(
        "tanh",
        "Linear layer 20×20 of a tanh network",
        tanh_network,
        "6.weight",
        {
            "diagonal": "... |",
            "chunks of 5": "| (o i)/5",
            "chunks of 10": "| (o i)/10",
            "chunks of 40": "| (o i)/40",
            "chunks of 100": "| (o i)/100",
            "tiles 4×4": "| o/4 i/4",
            "tiles 10×10": "| o/10 i/10",
            "o | i": "o | i",
            "i | o": "i | o",
            "~o | i": "~o | i",
            "~i | o": "~i | o",
            "| o, i": "| o, i",
            "| o/5, i/5": "| o/5, i/5",
            "full layer": "| ...",
            **_METHODS,
        },
        ("diagonal", "o | i", "i | o", "~o | i", "KFAC, eigen", "| o, i"),
        {"per output": "o | i", "per input": "i | o"},
        "The middle layer (and, in the second picture, the last) of the network that the MBF authors' code builds to show "
        "where the inverse is large.",
        ("10.weight",),
    ),
    Specimen(
        "conv",
        "3×3 convolution, 8 to 12 channels",
        conv_network,
        "4.weight",
        {
            "diagonal": "... |",
            "kernels": "o i | k...",
            "o | i k...": "o | i k...",
            "i | o k...": "i | o k...",
            "k... tied": "~o ~i | k...",
            "chunks of 36": "| (o i k...)/36",
            "chunks of 144": "| (o i k...)/144",
            "tiles 3×2": "| o/3 i/2 k...",
            "tiles 6×4": "| o/6 i/4 k...",
            "| o, i k...": "| o, i k...",
            "| o, i, k...": "| o, i, k...",
            "full layer": "| ...",
            **_METHODS,
            **_REDUCED,
        },
        ("diagonal", "kernels", "o | i k...", "i | o k...", "KFAC, eigen", "| o, i k..."),
        {"per kernel": "o i | k...", "per output": "o | i k...", "per input channel": "i | o k..."},
        "The second convolution of a small network on digits.",
    ),
    Specimen(
        "attention",
        "Fused attention projection 16 to 3×4×4",
        Attention,
        "project.weight",
        {
            "diagonal": "... |",
            "o | i": "o | i",
            "i | o": "i | o",
            "head | d i": per_head("part head | d i"),
            "head | d, i": per_head("part head | d, i"),
            "part | head d i": per_head("part | head d i"),
            "tiles 8×8": "| o/8 i/8",
            "chunks of 32": "| (o i)/32",
            "chunks of 128": "| (o i)/128",
            "| o, i": "| o, i",
            "| o/16, i": "| o/16, i",
            "full layer": "| ...",
            **_METHODS,
            **_REDUCED,
        },
        ("diagonal", "o | i", "i | o", "head | d i", "KFAC, eigen", "| o, i"),
        {"per output": "o | i", "per input": "i | o", "chunks of 64": "| (o i)/64"},
        "Queries, keys and values of four heads, from one linear layer that all tokens of a sequence share.",
    ),
)


_SOURCES = {
    (True, True): "scikit-learn's digits, enlarged to 16×16",
    (True, False): "MNIST, reduced to 16×16",
    (False, True): "scikit-learn's digits, 8×8",
    (False, False): "scikit-learn's digits, 8×8",
}


@dataclass
class Result:
    """What was found of one specimen.

    Attributes:
        specimen: what was looked at.
        accuracy: of the trained network on held-out data.
        data: what it was trained on.
        mean: mean eigenvalue of the layer's exact Fisher.
        damping: λ of the page's table.
        comparison: all structures over all dampings.
        figures: name -> SVG.
    """

    specimen: Specimen
    accuracy: float
    data: str
    mean: float
    damping: float
    comparison: Comparison
    figures: dict[str, str] = field(default_factory=dict)


def load(name: str, folder: Path | None) -> Data:
    """The data of a specimen: bundled digits; for the tanh network enlarged to 16×16, or MNIST where a folder is given."""
    if name != "tanh":
        return digits()
    data = digits() if folder is None else mnist(folder)
    side = round(data.train.inputs.shape[1] ** 0.5)

    def resized(inputs: Tensor) -> Tensor:
        images = inputs.view(-1, 1, side, side)
        return F.interpolate(images, size=(16, 16), mode="bilinear", antialias=True, align_corners=False).flatten(1)

    train, test = (type(split)(resized(split.inputs), split.labels) for split in (data.train, data.test))
    return Data(train, test)


def train(specimen: Specimen, data: Data, steps: int = 600, seed: int = 0) -> tuple[nn.Module, float]:
    """Train with Adam; returns the network and its accuracy on held-out data."""
    torch.manual_seed(seed)
    model = specimen.build()
    optimizer = curvlib.Adam(model, lr=3e-3)
    for batch in shuffled(data.train, 128, seed, 0, steps):
        optimizer.zero_grad()
        F.cross_entropy(model(batch.inputs), batch.labels).backward()
        optimizer.step()
    with torch.no_grad():
        right = (model(data.test.inputs).argmax(1) == data.test.labels).float().mean()
    return model.eval(), float(right)


def look(specimen: Specimen, folder: Path | None, examples: int = 1000) -> Result:
    """Train a network, measure all structures on its layer, and draw."""
    from curvlib.analysis import figures

    data = load(specimen.name, folder)
    model, accuracy = train(specimen, data)
    inputs, targets = data.train.inputs[:examples], data.train.labels[:examples]
    objective = Objective(model, F.cross_entropy, inputs, targets, dtype=torch.float64)
    exact = fisher(objective, of=specimen.layer)
    mean = float(exact.trace()) / len(exact)
    sweep = [mean * multiple for multiple in DAMPINGS]
    comparison = compare(objective, specimen.structures, damping=sweep, of=specimen.layer)
    source = _SOURCES[specimen.name == "tanh", folder is None]
    result = Result(specimen, accuracy, source, mean, sweep[1], comparison)
    drawn = {
        f"inverse-{layer}": figures.inverse_map(objective, layer, specimen.maps)
        for layer in (specimen.layer, *specimen.others)
    } | {
        "spectra": figures.spectra(
            objective,
            specimen.layer,
            {name: structure for name, structure in specimen.structures.items() if name in specimen.spectra},
        ),
        "pareto": figures.pareto(comparison, damping=sweep[1], title=specimen.title),
        "sweep": figures.sweep(
            Comparison(tuple(row for row in comparison if row.approximation in specimen.spectra), comparison.about)
        ),
    }
    result.figures = {name: figures.as_svg(figure) for name, figure in drawn.items()}
    return result


def run_lab(out: Path, folder: Path | None, console: Console) -> Path:
    """Look at all specimens, print a line for each, and write the page; returns it."""
    results = []
    for number, specimen in enumerate(SPECIMENS, 1):
        began = time.perf_counter()
        result = look(specimen, folder)
        results.append(result)
        for name, svg in result.figures.items():
            write_whole(out / f"{specimen.name}-{name}.svg", svg.encode())
        write_whole(out / f"{specimen.name}.csv", result.comparison.to_csv().encode())
        write_whole(out / f"{specimen.name}.json", result.comparison.to_json().encode())
        console.print(
            f"[{number}/{len(SPECIMENS)}] {specimen.title}: {len(specimen.structures)} structures, held-out accuracy "
            f"{result.accuracy:.1%}, {time.perf_counter() - began:.0f} s",
            highlight=False,
            markup=False,
        )
    from .lab_page import write_page

    page = write_page(results, out)
    console.print(f"Page: {page.resolve()}", highlight=False, markup=False, soft_wrap=True)
    return page
