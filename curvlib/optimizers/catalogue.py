"""The catalogue: what every named method is, read from its recipes and measured on one layer."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from functools import partial

import torch
from torch import nn

from ..ears import TapWarning
from ..optimizer import CurvatureOptimizer
from ..recipe import Moment, Momentum, Recipe, Rule
from ..storage import state_bytes

Build = Callable[[nn.Module], CurvatureOptimizer]

_WIDTH = 64
_HEADINGS = ("method", "partition", "moment", "root", "rule", "bytes / weight", "source")


@dataclass(frozen=True)
class Method:
    """One method, with its defaults.

    Attributes:
        name: of the class, and settings where it has several forms.
        partition: of a linear layer's weight.
        moment: what fills it.
        root: the exponent, and how it is damped.
        rule: what becomes of the direction.
        bytes: of state a weight, of a square linear layer with 64 outputs, gradients not counted.
        source: the paper.
    """

    name: str
    partition: str
    moment: str
    root: str
    rule: str
    bytes: str
    source: str


@dataclass(frozen=True, repr=False)
class Catalogue:
    """All methods, by name; its text is a table."""

    methods: tuple[Method, ...]

    def __iter__(self) -> Iterator[Method]:
        return iter(self.methods)

    def __str__(self) -> str:
        rows = [_HEADINGS, *(astuple(method) for method in self.methods)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADINGS))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        )

    __repr__ = __str__

    def markdown(self) -> str:
        """The table in Markdown."""
        lines = [_line(_HEADINGS), _line(["---"] * len(_HEADINGS))]
        for method in self.methods:
            name, partition, *rest = astuple(method)
            lines.append(_line([f"`{name}`", f"`{partition}`".replace("|", "\\|") if partition != "–" else "–", *rest]))
        return "\n".join(lines)


def _line(cells: list[str] | tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def table() -> Catalogue:
    """Partition, moment, root, rule, state and source of every method of :mod:`curvlib.optimizers`."""
    from .kbfgs import KBFGS
    from .mbf import MBF

    variants: dict[str, Build] = {
        "KBFGS(memory=100)": partial(KBFGS, memory=100),
        "MBF(window=32)": partial(MBF, linear_blocks="output", window=32),
    }
    builders = {kind.__name__: kind for kind in methods().values()} | variants
    return Catalogue(tuple(_method(name, builders[name]) for name in sorted(builders, key=str.lower)))


def methods() -> dict[str, type[CurvatureOptimizer]]:
    """The classes of :mod:`curvlib.optimizers`, by their names in lower case."""
    from .. import optimizers

    kinds = [getattr(optimizers, name) for name in optimizers.__all__]
    named = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, CurvatureOptimizer)]
    return {kind.__name__.lower(): kind for kind in named}


def _method(name: str, build: Build) -> Method:
    state = torch.get_rng_state()
    layer = nn.Linear(_WIDTH, _WIDTH, bias=False)
    torch.set_rng_state(state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TapWarning)
        optimizer = build(layer)
    ((unit, recipe),) = optimizer._recipes().items()
    optimizer.detach()
    curved = recipe.root.exponent != 0
    return Method(
        name,
        str(recipe.partition) if curved else "–",
        _moment(recipe.moment) if curved else "–",
        _root(recipe) if curved else "–",
        _rule(recipe.rule),
        _bytes(state_bytes(unit, recipe) / _WIDTH**2),
        _source(type(optimizer)),
    )


def _bytes(size: float) -> str:
    return f"{size:,.0f}" if size >= 10 else f"{size:.2g}"


def _moment(moment: Moment) -> str:
    average = {"ema": "EMA", "sum": "sum", "mean": "mean"}[moment.average]
    composed = "" if moment.composition == "independent" else f", {moment.composition}"
    return f"{average} of {moment.of}{composed}"


def _root(recipe: Recipe) -> str:
    damping = recipe.damping
    how = damping.split or (f"of the {damping.relative_to}" if damping.relative_to else "")
    exponent = f"-{float(recipe.root.exponent):g}"
    block = "" if recipe.block is None else f", {recipe.block.__name__}"
    return f"{exponent}{', ' + how if how else ''}{block}"


def _rule(rule: Rule) -> str:
    parts = [_momentum(rule.momentum)] if rule.momentum is not None else []
    if rule.grafting is not None:
        parts.append(f"grafting on {rule.grafting.kind}")
    parts += [type(finish).__name__ for finish in rule.finish]
    if rule.model is not None:
        parts.append(f"{type(rule.model).__name__} steps")
    if rule.clip is not None:
        parts.append(f"{rule.clip.kind.upper()} clip")
    return ", ".join(parts) or "–"


def _momentum(momentum: Momentum) -> str:
    kind = "EMA momentum" if momentum.kind == "ema" else "heavy ball"
    extra = ", Nesterov" if momentum.nesterov else ", interpolated" if momentum.mix is not None else ""
    return f"{kind}{' of directions' if momentum.after else ''}{extra}"


def _source(kind: type[CurvatureOptimizer]) -> str:
    match = re.search(r"\(([^();]*\b(?:19|20)\d\d)\b", kind.__doc__ or "")
    return match[1] if match else "–"
