"""What every block structure does, as properties of drawn examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..blocks import StandardBlock
from .properties import Broken, Property, equal
from .trials import Held, Trial


def _dense(trial: Trial) -> None:
    dense = trial.held([trial.gradient(0), trial.gradient(1)]).dense()
    wanted = (trial.n, trial.numel, trial.numel)
    if tuple(dense.shape) != wanted:
        raise Broken(f"dense() has shape {list(dense.shape)} instead of {list(wanted)}")
    if not bool(torch.isfinite(dense).all()):
        raise Broken("dense() is not finite")
    slack = 32 * max(1, trial.numel) * torch.finfo(trial.dtype).eps
    equal(dense, dense.mT, slack, "dense() against its transpose")
    values = torch.linalg.eigvalsh(dense)
    if bool((values[:, 0] < -slack * values[:, -1].abs()).any()):
        raise Broken(f"dense() has the eigenvalue {float(values[:, 0].min()):.2g}")


def _multiplies(trial: Trial) -> None:
    held, vector = trial.held([trial.gradient(0), trial.gradient(1)]), trial.gradient(2)
    dense = held.dense()
    wanted = (dense @ vector.flatten(1)[:, :, None]).view(vector.shape)
    equal(
        held.apply(vector, -1.0),
        wanted,
        trial.tolerance(dense, -1.0) * _growth(dense, wanted, vector),
        "apply with exponent -1",
    )


def _growth(dense: Tensor, wanted: Tensor, vector: Tensor) -> float:
    """How much larger ‖curvature‖ ‖vector‖ may be than their product."""
    bound = torch.linalg.matrix_norm(dense, 2) * vector.flatten(1).norm(dim=1)
    ratio = bound / wanted.flatten(1).norm(dim=1).clamp_min(torch.finfo(torch.float64).tiny)
    return float(torch.where(bound > 0, ratio, 1.0).max().clamp_min(1.0))


def damped(dense: Tensor, vector: Tensor, damping: float, exponent: float) -> Tensor:
    """(curvature + λI)^-p times vectors, by eigendecomposition."""
    values, vectors = torch.linalg.eigh(dense.double())
    along = vectors.mT @ vector.double().flatten(1)[:, :, None]
    scaled = (values.clamp_min(0) + damping)[:, :, None] ** -exponent * along
    return (vectors @ scaled).view(vector.shape)


def _damps(trial: Trial) -> None:
    held, vector = trial.held([trial.gradient(0), trial.gradient(1)]), trial.gradient(2)
    factors = max((len(region.factors) for region in trial.layout.regions), default=0)
    if held.block.damps == "factors" and factors > 1:
        return
    dense = held.dense()
    wanted = damped(dense, vector, trial.damping, trial.exponent)
    equal(held.apply(vector), wanted, trial.tolerance(dense, trial.exponent), "apply against (dense() + λI)^-p")


def _shrinks(trial: Trial) -> None:
    vector = trial.gradient(2)
    energies = []
    for factor in (1.0, 4.0):
        damping = replace(trial.recipe.damping, value=trial.damping * factor)
        recipe = replace(trial.recipe, root=replace(trial.recipe.root, damping=damping))
        held = trial.held([trial.gradient(0), trial.gradient(1)], recipe)
        energies.append((vector * held.apply(vector)).double().flatten(1).sum(1))
    if bool((energies[0] <= 0).any()):
        raise Broken(f"gᵀPg is {float(energies[0].min()):.2g}: the direction does not descend")
    # Where the curvature dwarfs the damping, the difference may drown in rounding; it never reverses.
    slack = 1 + trial.tolerance(trial.held([trial.gradient(0), trial.gradient(1)]).dense(), trial.exponent)
    if bool((energies[1] > energies[0] * slack).any()):
        raise Broken(
            f"gᵀPg grows from {float(energies[0].max()):.3g} to {float(energies[1].max()):.3g} as λ becomes 4 λ"
        )
    silent = trial.held()
    before = silent.apply(vector)
    damping = replace(trial.recipe.damping, value=trial.damping * 4)
    other = trial.held((), replace(trial.recipe, root=replace(trial.recipe.root, damping=damping))).apply(vector)
    if trial.recipe.damping.relative_to is None and bool((other.norm() >= before.norm() * 0.999).any()):
        raise Broken("without curvature the direction does not depend on λ")


def _averages(trial: Trial) -> None:
    gradient, other = trial.gradient(0), trial.gradient(1)
    held = trial.held([gradient])
    held.update(gradient, 0.0, 1.0)  # once more, for structures whose statistics live in the basis of the last refresh
    once = held.dense()
    slack = trial.tolerance(once, -1.0)
    held.update(gradient, 0.75, 0.25)
    equal(held.dense(), once, slack, "the curvature after 3/4 of itself and 1/4 of the same gradient")
    held.update(other, 1.0, 0.0)
    equal(held.dense(), once, slack, "the curvature after all of itself and nothing of another gradient")
    held.update(other, 0.5, 0.5)
    held.update(gradient, 0.0, 1.0)
    equal(held.dense(), once, slack, "the curvature after nothing of itself and all of the first gradient")
    held.update(gradient, 1.0, 1.0)
    equal(
        held.dense(), once * 2**trial.power, slack, "the curvature after all of itself and the same gradient once more"
    )


def _scales(trial: Trial) -> None:
    gradient = trial.gradient(0)
    once, doubled = trial.held([gradient]), trial.held([2 * gradient])
    dense, power = once.dense(), trial.power
    slack = trial.tolerance(dense, -1.0)
    equal(doubled.dense(), dense * 4.0**power, slack, "the curvature of twice the gradient")
    equal(once.dense(3.0), dense * 3.0**power, slack, "the curvature with scale=3")
    vector = trial.gradient(2)
    product = once.apply(vector, -1.0)
    wanted = product * 3.0**power
    equal(
        once.apply(vector, -1.0, 3.0),
        wanted,
        slack * _growth(dense, product, vector),
        "apply with exponent -1 and scale=3",
    )
    factors = max((len(region.factors) for region in trial.layout.regions), default=0)
    if factors <= 1 or trial.recipe.moment.composition == "trace":
        traces = dense.diagonal(dim1=1, dim2=2).sum(1)
        wanted = gradient.double().flatten(1).square().sum(1)
        equal(traces[:, None], wanted[:, None], slack, "the trace of the curvature of one gradient, against ‖g‖²,")


def _batches(trial: Trial) -> None:
    gradients = [trial.gradient(number) for number in range(3)]
    held = trial.held(gradients[:2])
    dense, direction = held.dense(), held.apply(gradients[2])
    for row in range(trial.n):
        alone = replace(trial, n=1)
        single = Held(alone, trial.recipe)
        single.take([gradient[row : row + 1] for gradient in gradients[:2]])
        slack = trial.tolerance(dense[row : row + 1], trial.exponent)
        equal(dense[row : row + 1], single.dense(), slack, f"the curvature in a batch of {trial.n}")
        found, wanted = direction[row : row + 1], single.apply(gradients[2][row : row + 1])
        equal(found, wanted, slack, f"the direction in a batch of {trial.n}")


def tensors(value: Any) -> list[Tensor]:
    """A piece of state as a list: of one tensor where it is packed."""
    return value if isinstance(value, list) else [value]


def _survives(trial: Trial) -> None:
    held = trial.held()
    before = {name: tensors(value) for name, value in held.state.items()}
    held.update(trial.gradient(0), 0.0, 1.0)
    held.refresh()
    held.update(trial.gradient(1), 0.5, 0.5)
    for name, value in held.state.items():
        if [id(one) for one in tensors(value)] != [id(one) for one in before.get(name, [])]:
            raise Broken(f"state {name!r} was replaced by another tensor, where records and checkpoints do not see it")
    again, vector = held.copied(), trial.gradient(2)
    for what in ("curvature", "direction"):
        found, wanted = ((h.dense() if what == "curvature" else h.apply(vector)) for h in (again, held))
        equal(found, wanted, 0.0, f"the {what} of a new instance with the same state")
    for one in (held, again):
        one.update(trial.gradient(3), 0.5, 0.5)
        one.refresh()
    equal(again.dense(), held.dense(), 0.0, "the curvature of a new instance with the same state, one update later,")
    equal(again.apply(vector), held.apply(vector), 0.0, "the direction of a new instance, one update later,")
    specs = held.block.spec()
    for name, value in held.state.items():
        rows = value if isinstance(value, list) else list(value)
        if name not in specs or any(tuple(row.shape) != specs[name].shape for row in rows):
            raise Broken(f"state {name!r} is not what spec() registers")


def _refreshes(trial: Trial) -> None:
    if len(trial.shape) < 2 or trial.numel == 0:
        return
    rows, columns = trial.shape[0], trial.numel // trial.shape[0]
    k = min(rows, columns)
    generator = torch.Generator().manual_seed(trial.seed)
    u, v = (
        torch.linalg.qr(torch.randn(trial.n, size, size, generator=generator, dtype=torch.float64))[0][:, :, :k]
        for size in (rows, columns)
    )
    sizes = 2.0 ** torch.arange(k, dtype=torch.float64)
    first, second = (((u * s) @ v.mT).view(trial.n, *trial.shape).to(trial.dtype) for s in (sizes, 5 * sizes.flip(0)))
    held = trial.held([first])
    sides = [[factor.size for factor in region.factors] for region in trial.layout.regions]
    if isinstance(held.block, StandardBlock) and sides != [[rows, columns]]:
        return  # bases of other sides than those that both gradients have in common
    held.update(first, 0.0, 1.0)
    held.update(second, 0.5, 0.5)
    before = held.dense()
    held.refresh()
    equal(held.dense(), before, 1e3 * trial.tolerance(before, -1.0) * 4.0**k, "the curvature after a refresh")


def _starts(trial: Trial) -> None:
    zero = torch.zeros((trial.n, *trial.shape), dtype=trial.dtype)
    vector = trial.gradient(2)
    for held in (trial.held([zero]), trial.held()):
        direction = held.apply(vector)
        if not bool(torch.isfinite(direction).all()):
            raise Broken("the direction is not finite")


def _gated(trial: Trial) -> None:
    held, again = trial.held([trial.gradient(0)]), trial.held([trial.gradient(0)])
    held.update(trial.gradient(1), 0.75, 0.25)
    again.update(trial.gradient(1), torch.tensor(0.75, dtype=torch.float64), torch.tensor(0.25, dtype=torch.float64))
    dense = held.dense()
    equal(again.dense(), dense, trial.tolerance(dense, -1.0), "the curvature with tensors as weights")


def _rounds(trial: Trial) -> None:
    single = replace(trial, dtype=torch.float32)
    # So many gradients leave no eigenspace open, in which a basis would be a matter of rounding.
    gradients = [single.gradient(number) for number in range(2 + max(trial.shape, default=0))]
    low, high = single.held(gradients[1:]), trial.held([gradient.double() for gradient in gradients[1:]])
    dense = high.dense()
    half = torch.finfo(torch.float32).eps ** 0.5  # what eigenvectors keep where eigenvalues nearly meet
    equal(low.dense(), dense, max(half, single.tolerance(dense, -1.0)), "the curvature in float32, against float64,")
    slack = max(half, single.tolerance(dense, trial.exponent))
    if slack < 0.1:
        vector = gradients[0]
        equal(low.apply(vector), high.apply(vector.double()), slack, "the direction in float32, against float64,")


PROPERTIES: Sequence[Property[Trial]] = (
    Property(
        "dense",
        "dense() is a finite, symmetric, positive semidefinite matrix [n, numel, numel] for every operand",
        "a factor in place of a square, or rows and columns in different orders",
        _dense,
    ),
    Property(
        "scale",
        "one gradient g from nothing gives a curvature with the trace ‖g‖², which grows like g² and like `scale`",
        "a wrong scale: a mean where a sum belongs, ties averaged twice, or `scale` left out",
        _scales,
    ),
    Property(
        "averaging",
        "update() makes the curvature keep · old + gain · new",
        "an averaging weight that is off: `gain` taken as 1 - keep, or the other way round",
        _averages,
    ),
    Property(
        "multiplication",
        "apply() with exponent -1 multiplies by dense()",
        "modes multiplied with each other's factors, a transposed basis, or blocks put back in another order",
        _multiplies,
    ),
    Property(
        "damped root",
        "apply() with the recipe's exponent p is (dense() + λI)^-p",
        "factors swapped, a transposed eigenbasis, a root applied to the wrong block, or a damping left out",
        _damps,
    ),
    Property(
        "damping",
        "directions descend, and the more damping the shorter they are",
        "a forgotten damping",
        _shrinks,
    ),
    Property(
        "batch",
        "operands in a batch get what each gets alone",
        "a root applied to the wrong block: rows of one operand used for another",
        _batches,
    ),
    Property(
        "state",
        "everything is in the state that spec() registers and is changed in place: a new instance with a copy goes on alike",
        "state that does not survive saving, because it is kept on the instance, or not changed in place",
        _survives,
    ),
    Property(
        "refresh",
        "a refresh without new statistics leaves the curvature as it was, also where eigenvalues have changed places",
        "an eigenbasis sorted anew without its second moment",
        _refreshes,
    ),
    Property(
        "start",
        "without any signal yet directions are finite",
        "a division by a curvature of zero",
        _starts,
    ),
    Property("gate", "weights may be 0-d tensors", "`alpha=gain` with a tensor, which waits for the device", _gated),
    Property(
        "precision",
        "float32 agrees with float64 to its precision",
        "a difference of large numbers, or a cast to a narrower dtype",
        _rounds,
    ),
)
