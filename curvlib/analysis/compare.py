"""What an approximation loses: the exact curvature of every layer beside what a structure holds, and does."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..checks import check_number
from ..inspection import Held
from ..partition import Partition
from ..recipe import Labels, Recipe
from .approximation import Approximation, Structure
from .exact import LIMIT, check_size, fisher
from .objective import Objective, Of
from .table import TOTAL, Comparison, Row


def compare(
    objective: Objective,
    approximations: Mapping[str, Structure] | Sequence[Structure],
    *,
    damping: float | Sequence[float] = 1e-2,
    labels: Labels = "exact",
    of: Of | Sequence[Of] | None = None,
    batch: int = 32,
    repeats: int = 3,
    limit: int = LIMIT,
) -> Comparison:
    """Measure structures against the exact Fisher, layer by layer and over all layers.

    A layer is a module with all of its trainable parameters: a structure that leaves out its bias, or cross terms between
    weight and bias, is charged for them. Every structure sees the same data once, in the objective's dtype, and damps with
    the same absolute λ, in its own way (shared out among factors, or added to the whole).

    Args:
        objective: model, loss and data.
        approximations: name -> structure, or structures, named by their text: a partition, a recipe, a routing table, a
            block class, or what makes an optimizer, such as ``curvlib.KFAC``.
        damping: λ, or several.
        labels: of the exact Fisher, and of every moment that listens.
        of: a module, a parameter, the name of either, or several; ``None`` for the whole network.
        batch: examples behind one gradient, for moments of the batch gradient.
        repeats: how often each time is measured; the least counts.
        limit: bytes that a dense matrix may take.

    Raises:
        ValueError: where a layer is too large, holds no curvature, or is singular at λ = 0; says what to do.
    """
    sweep = [damping] if isinstance(damping, (int, float)) else list(damping)
    for value in sweep:
        check_number("damping", value)
    if not isinstance(approximations, Mapping):
        approximations = {_label(structure): structure for structure in approximations}
    if not approximations or not sweep:
        raise ValueError("nothing to compare: give at least one approximation and one damping")
    names = objective.names(of)
    layers = _layers(objective, names)
    for mine in layers.values():
        check_size(objective.numel(mine), objective.precision, limit)
    gradient = objective.gradient(names)
    exact = {name: fisher(objective, labels, mine, limit=limit) for name, mine in layers.items()}
    gradients = dict(zip(layers, gradient.split([objective.numel(mine) for mine in layers.values()]), strict=True))
    rows: list[Row] = []
    totals: dict[tuple[str, float], _Parts] = {}
    for title, structure in approximations.items():
        approximation = Approximation(structure, objective, labels, names, batch=batch, repeats=repeats)
        for layer, mine in layers.items():
            reference = _Exact.of(exact[layer], gradients[layer], layer)
            for value in sweep:
                parts = _measure(approximation, title, layer, mine, reference, value)
                rows.append(parts.row(layer, title, value))
                totals.setdefault((title, value), _Parts(family=parts.family)).add(parts)
    if len(layers) > 1:
        rows += [parts.row(TOTAL, title, value) for (title, value), parts in totals.items()]
    order = {name: number for number, name in enumerate([*layers, TOTAL])}
    rows.sort(key=lambda row: order[row.layer])
    about = (
        f"{type(objective.model).__name__}, {len(objective)} examples, against the exact Fisher with labels={labels!r}"
    )
    return Comparison(tuple(rows), about)


def _label(structure: Structure) -> str:
    if isinstance(structure, (str, Partition)):
        return str(structure)
    if isinstance(structure, Recipe):
        return str(structure.partition)
    if callable(structure):
        return getattr(structure, "__name__", repr(structure))
    return " / ".join(str(route) for route in structure) if isinstance(structure, Sequence) else str(structure)


def _layers(objective: Objective, names: Sequence[str]) -> dict[str, list[str]]:
    """Layer -> its parameters, in the model's order."""
    layers: dict[str, list[str]] = {}
    for name in names:
        layers.setdefault(name.rpartition(".")[0] or type(objective.model).__name__, []).append(name)
    return layers


@dataclass
class _Exact:
    """E of a layer by its eigenvalues, and the gradient."""

    matrix: Tensor
    values: Tensor
    vectors: Tensor
    gradient: Tensor
    layer: str

    @classmethod
    def of(cls, matrix: Tensor, gradient: Tensor, layer: str) -> _Exact:
        values, vectors = torch.linalg.eigh(matrix)
        return cls(matrix, values.clamp_min(0), vectors, gradient, layer)

    def inverse_values(self, damping: float) -> Tensor:
        least, most = self.values[0].item(), self.values[-1].item()
        if damping == 0 and least <= len(self.values) * torch.finfo(self.values.dtype).eps * most:
            raise ValueError(
                f"damping=0: the exact curvature of {self.layer} is singular (eigenvalues from {least:.1e} to {most:.1e}); "
                f"take a damping above zero, or more examples"
            )
        return 1 / (self.values + damping)


@dataclass
class _Parts:
    """What errors are made of, so that those of several layers add up.

    Squares of Frobenius norms, inner products, decreases, bytes and times add; of spectral norms and eigenvalues the
    extreme counts.
    """

    family: str
    parameters: int = 0
    squares: dict[str, float] = field(default_factory=dict)
    largest: dict[str, float] = field(default_factory=dict)
    least: float = math.inf
    sizes: list[int] = field(default_factory=lambda: [0, 0])
    seconds: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])

    def add(self, other: _Parts) -> None:
        self.parameters += other.parameters
        for name, value in other.squares.items():
            self.squares[name] = self.squares.get(name, 0.0) + value
        for name, value in other.largest.items():
            self.largest[name] = max(self.largest.get(name, 0.0), value)
        self.least = min(self.least, other.least)
        self.sizes = [mine + more for mine, more in zip(self.sizes, other.sizes, strict=True)]
        self.seconds = [mine + more for mine, more in zip(self.seconds, other.seconds, strict=True)]

    def row(self, layer: str, approximation: str, damping: float) -> Row:
        part, top = self.squares, self.largest
        best = part["g·d*"]
        return Row(
            layer=layer,
            approximation=approximation,
            family=self.family,
            damping=damping,
            parameters=self.parameters,
            frobenius=math.sqrt(part["A-E"] / part["E"]),
            spectral=top["A-E"] / top["E"],
            inverse_frobenius=math.sqrt(part["P-inv"] / part["inv"]),
            inverse_spectral=top["P-inv"] / top["inv"],
            cosine=part["d·d*"] / math.sqrt(part["d·d"] * part["d*·d*"]),
            norm_ratio=math.sqrt(part["d·d"] / part["d*·d*"]),
            decrease=(2 * part["g·d"] - part["dEd"]) / best,
            best_decrease=part["g·d"] ** 2 / (best * part["dEd"]),
            condition=top["P"] / self.least if self.least > 0 else math.inf,
            statistics_bytes=self.sizes[0],
            roots_bytes=self.sizes[1],
            statistics_ms=1e3 * self.seconds[0],
            refresh_ms=1e3 * self.seconds[1],
            apply_ms=1e3 * self.seconds[2],
        )


def _measure(
    approximation: Approximation, title: str, layer: str, names: Sequence[str], exact: _Exact, damping: float
) -> _Parts:
    parts = _Parts(approximation.family, len(exact.values))
    dense, inverse = torch.zeros_like(exact.matrix), torch.zeros_like(exact.matrix)
    direction = torch.zeros_like(exact.gradient)
    for held, rows in _units(approximation, title, layer, names):
        grid = rows[:, None], rows[None, :]
        dense[grid] = held.dense()
        inverse[grid] = approximation.inverse(held, damping)
        direction[rows] = approximation.direction(held, damping, exact.gradient[rows])
        times = approximation.times(held, damping)
        more = _Parts(
            approximation.family,
            sizes=[approximation.bytes(held, role) for role in ("statistics", "roots")],
            seconds=[times.statistics, times.refresh, times.apply],
        )
        parts.add(more)
    inverse_values = exact.inverse_values(damping)
    best = exact.vectors @ (inverse_values * (exact.vectors.mT @ exact.gradient))
    for name, matrix, values in (
        ("A-E", dense - exact.matrix, None),
        ("E", exact.matrix, exact.values),
        ("P-inv", inverse - (exact.vectors * inverse_values) @ exact.vectors.mT, None),
        ("inv", None, inverse_values),
        ("P", inverse, None),
    ):
        spectrum = torch.linalg.eigvalsh((matrix + matrix.mT) / 2) if values is None and matrix is not None else values
        assert spectrum is not None
        parts.squares[name] = spectrum.square().sum().item()
        parts.largest[name] = spectrum.abs().max().item()
        if name == "P":
            parts.least = min(parts.least, spectrum.min().item())
    for name, left, right in (
        ("d·d*", direction, best),
        ("d·d", direction, direction),
        ("d*·d*", best, best),
        ("g·d", exact.gradient, direction),
        ("g·d*", exact.gradient, best),
        ("dEd", direction, exact.matrix @ direction + damping * direction),
    ):
        parts.squares[name] = (left @ right).item()
    return parts


def _units(approximation: Approximation, title: str, layer: str, names: Sequence[str]) -> list[tuple[Held, Tensor]]:
    """The units of a layer, each with the rows of the layer's matrix that its entries have."""
    values = approximation.objective.values(names)
    place, start = {}, 0
    for name in names:
        place[name] = torch.arange(start, start + values[name].numel())
        start += values[name].numel()
    found, covered = [], set()
    for held in approximation.held:
        mine = approximation.names_of(held)
        if mine[0] in place:
            found.append((held, torch.cat([place[name] for name in mine])))
            covered.update(mine)
    if missing := [name for name in names if name not in covered]:
        raise ValueError(
            f"{title!r} holds no curvature for {', '.join(missing)}: it is routed to a recipe with exponent 0; leave it out "
            "with of=..., or route it to a recipe"
        )
    return found
