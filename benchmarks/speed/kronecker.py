"""Cases of Kronecker products: Shampoo, SOAP, KFAC, against the libraries that are known for them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import curvlib
from curvlib import Damping, Moment, Momentum, Recipe, Root, Rule, Schedule

from . import peers
from .case import Case, at_most, faster
from .elementwise import versus
from .peers import NEVER
from .timing import Contest, Setting, Side
from .workloads import Shape, autoencoder_of, backward, displacement, gpt, images, iterations, relative, steps

EPSILON = 1.0
"""Damping of Shampoo here: gradients have variance one, so that condition numbers stay below some thousands."""

ROUNDING = 1e-3
"""Of roots in float32 with such condition numbers."""


def small(setting: Setting) -> list[Shape]:
    """Many small matrices."""
    side = setting.size(64, 8)
    return [(side, side)] * setting.size(100, 4)


def shampoo(refresh: int, cut: str = "/1024", damping: float = EPSILON) -> Callable[[list[nn.Parameter]], Any]:
    """Shampoo as Distributed Shampoo has it without grafting; ``cut`` is how axes are cut."""
    recipe = Recipe(
        f"| ,...{cut}",
        Moment(beta=0.99, debias=True, composition="power-mean"),
        Root(0.5, Damping(damping)),
        Rule(Momentum(0.9, "ema", debias=True)),
        Schedule(refresh=refresh),
    )
    return lambda these: curvlib.CurvatureOptimizer(these, recipe, lr=1e-2)


def _plain(setting: Setting, shapes: Callable[[Setting], list[Shape]], cut: str = "/1024") -> Contest:
    """Steps between refreshes. What is checked has the peer's cuts, with a remainder."""
    theirs = peers.distributed_shampoo(setting, EPSILON, NEVER)
    contest = versus(shampoo(NEVER, "//1024"), theirs, shapes(setting), setting, ROUNDING, turns=3)
    return Contest(
        steps(shampoo(NEVER, cut), shapes(setting), setting), contest.theirs, contest.difference, ROUNDING, turns=3
    )


def _refreshes(
    setting: Setting, shapes: Callable[[Setting], list[Shape]], cut: str = "/1024", alone: bool = False
) -> Contest:
    """Steps with a refresh; ``alone`` takes the time of a step without one off."""

    def theirs(refresh: int) -> Callable[[list[nn.Parameter]], Any]:
        return peers.distributed_shampoo(setting, EPSILON, refresh)

    def side(build: Callable[[int], Callable[[list[nn.Parameter]], Any]]) -> Side:
        with_refresh = steps(build(1), shapes(setting), setting)
        if not alone:
            return with_refresh
        without = steps(build(NEVER), shapes(setting), setting)
        return lambda: with_refresh() - without()

    contest = versus(shampoo(1, "//1024"), theirs(1), shapes(setting), setting, ROUNDING)
    return Contest(side(lambda refresh: shampoo(refresh, cut)), side(theirs), contest.difference, ROUNDING)


def _dash(setting: Setting) -> Contest:
    """Ten steps, the first of which refreshes, with Adam's grafting; checked where no axis is cut."""
    refresh = 10

    def ours(these: list[nn.Parameter]) -> Any:
        return curvlib.Shampoo(
            these,
            1e-2,
            beta=0.99,
            debias=False,
            damping=2 * EPSILON,  # theirs is added twice
            relative_damping=False,
            refresh_every=refresh,
            grafting_beta=0.99,
        )

    theirs, side = peers.dash(setting, EPSILON, refresh), setting.size(384, 16)
    one: list[Shape] = [(side, side), (2 * side, side)]
    same = versus(ours, theirs, one, setting, ROUNDING)
    return Contest(
        steps(ours, gpt(setting), setting),
        steps(theirs, gpt(setting), setting),
        same.difference,
        ROUNDING,
        turns=setting.size(refresh, 2),
        warm_up=setting.size(refresh, 1),
    )


def _soap(setting: Setting, peer: Callable[[Setting, int], Callable[[list[nn.Parameter]], Any]]) -> Contest:
    """Ten steps, one of which refreshes the bases.

    Peers only look at the first gradient, from which the bases are made, and begin with the second; so they are given the
    first one twice. No refresh is checked, since peers refresh after a step and curvlib before; and matrices are square and
    small, whose bases are unique but for signs, and not for the most part rounding. In the bases of one gradient all but a
    diagonal of it is rounding, by which Adam steps, so that the first step does not count.
    """
    refresh, side = 10, setting.size(16, 8)

    def ours(every: int) -> Callable[[list[nn.Parameter]], Any]:
        return lambda these: curvlib.SOAP(these, 1e-2, (0.95, 0.95), weight_decay=0.0, refresh_every=every)

    shapes: list[Shape] = [(side, side)] * 2

    def difference() -> float:
        mine = displacement(ours(NEVER), shapes, setting, [0, 1, 2], skip=1)
        return relative(mine, displacement(peer(setting, NEVER), shapes, setting, [0, 0, 1, 2], skip=2))

    return Contest(
        steps(ours(refresh), gpt(setting), setting),
        steps(peer(setting, refresh), gpt(setting), setting),
        difference,
        # A step of Adam has entries of one size whatever the gradient's, so that a small entry's rounding shows.
        ROUNDING,
        turns=setting.size(refresh, 2),
        warm_up=setting.size(refresh, 2),
    )


def _kfac(setting: Setting, form: str, method: str) -> Contest:
    """What iterations take beyond forward and backward, with statistics and refreshes at every step."""
    inputs = images(setting)
    bare, heard, hooked = (autoencoder_of(setting) for _ in range(3))
    settings: dict[str, Any] = dict(lr=1e-3, damping=1e-2, kl_clip=1e-3, split=None, form=form, refresh_every=1)
    ours = iterations(heard, inputs, curvlib.KFAC(heard, **settings), setting)
    peer = peers.KfacPytorch(hooked, setting, method, decay=0.95, clip=1e-3, lr=1e-3, momentum=0.9)
    theirs, passes = iterations(hooked, inputs, peer, setting), iterations(bare, inputs, None, setting)
    checked = "eigen" if method == "eigen" else "inverse"
    return Contest(
        lambda: ours() - passes(),
        lambda: theirs() - passes(),
        lambda: _first_kfac(setting, checked),
        ROUNDING,
        turns=setting.size(3, 1),
    )


def _first_kfac(setting: Setting, form: str) -> float:
    """One step on a small network, from the factors of one batch alone.

    kfac-pytorch takes what the hooks see for the gradients of single examples, so that its loss must be the sum; its
    directions then are those of the sum, too.
    """
    torch.manual_seed(0)
    count, lr = 64, 1e-3
    inputs = torch.rand(count, 12, device=setting.device)

    def moved(mine: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 12)).to(setting.device)
        start = [one.detach().clone() for one in model.parameters()]
        if mine:
            settings: dict[str, Any] = dict(beta=0.0, kl_clip=None, split=None, form=form, refresh_every=1)
            optimizer: Any = curvlib.KFAC(model, lr, damping=1e-2, momentum=0.0, **settings)
        else:
            optimizer = peers.KfacPytorch(model, setting, form, 1e-12, 1e30, lr / count, 0.0)
        backward(model, inputs, 1.0 if mine else count)
        optimizer.step()
        return [one.detach() - before for one, before in zip(model.parameters(), start, strict=True)]

    return relative(moved(True), moved(False))


def _growth(setting: Setting) -> Contest:
    """A step with a refresh of 1,000 layers 32 -> 32 against a hundred times that of ten."""
    few, many = 10, setting.size(1000, 20)
    layer: list[Shape] = [(32, 32), (32,)]

    def build(these: list[nn.Parameter]) -> torch.optim.Optimizer:
        return curvlib.Shampoo(these, refresh_every=1)

    def difference() -> float:
        """Whether a layer's step depends on how many there are."""
        alone, together = (displacement(build, layer * count, setting, [0]) for count in (few, many))
        return relative(together[: len(alone)], alone)

    small_side, large = (steps(build, layer * count, setting) for count in (few, many))
    return Contest(large, lambda: many / few * sum(small_side() for _ in range(5)) / 5, difference, ROUNDING)


_META = "Meta's Distributed Shampoo"
CASES = (
    Case(
        "shampoo-small",
        "Shampoo, 100 matrices of 64²: step without refresh",
        _META,
        faster(6),
        faster(6),
        partial(_plain, shapes=small),
    ),
    Case(
        "shampoo-small-refresh",
        "Shampoo, 100 matrices of 64²: refresh alone",
        _META,
        faster(5),
        faster(5),
        partial(_refreshes, shapes=small, alone=True),
    ),
    Case(
        "shampoo-gpt",
        "Shampoo, matrices of a GPT (d 384, 2 layers), blocks ≤ 1024, balanced: step without refresh",
        _META,
        faster(1.7),
        faster(1.7),
        partial(_plain, shapes=gpt),
    ),
    Case(
        "shampoo-gpt-refresh",
        "the same: step with refresh",
        _META,
        faster(1.7),
        faster(4),
        partial(_refreshes, shapes=gpt),
    ),
    Case(
        "shampoo-gpt-cuts",
        "the same with the peer's cuts: step without refresh",
        _META,
        faster(None),
        faster(None),
        partial(_plain, shapes=gpt, cut="//1024"),
    ),
    Case(
        "shampoo-gpt-cuts-refresh",
        "the same with the peer's cuts: step with refresh",
        _META,
        faster(None),
        faster(None),
        partial(_refreshes, shapes=gpt, cut="//1024"),
    ),
    Case(
        "shampoo-dash",
        "Shampoo, grafted, matrices of a GPT, blocks ≤ 1024, refresh every 10: step",
        "pytorch_optimizer's DASH",
        faster(1.1),
        faster(1.1),
        _dash,
    ),
    Case(
        "soap-official",
        "SOAP, matrices of a GPT, bases every 10: step",
        "the authors' SOAP",
        faster(2),
        faster(2),
        partial(_soap, peer=peers.official_soap),
    ),
    Case(
        "soap-heavyball",
        "SOAP, matrices of a GPT, bases every 10: step",
        "heavyball's SOAP, compiled",
        faster(1.2),
        faster(1.2),
        partial(_soap, peer=peers.heavyball_soap),
    ),
    Case(
        "kfac-inverse",
        "KFAC, autoencoder, batch 1000, refresh every step: time beyond forward and backward",
        "kfac-pytorch, inverse",
        faster(1.5),
        faster(2),
        partial(_kfac, form="inverse", method="inverse"),
    ),
    Case(
        "kfac-eigen",
        "the same",
        "kfac-pytorch, eigen",
        faster(2.2),
        faster(2),
        partial(_kfac, form="inverse", method="eigen"),
    ),
    Case(
        "kfac-eigen-same",
        'the same with form="eigen", which is the peer\'s damping',
        "kfac-pytorch, eigen",
        faster(None),
        faster(None),
        partial(_kfac, form="eigen", method="eigen"),
    ),
    Case(
        "growth-layers",
        "Shampoo, 1,000 layers 32 -> 32: step with refresh",
        "10² × the step of 10 layers",
        at_most(1.1),
        at_most(1.1),
        _growth,
    ),
)
