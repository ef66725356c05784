"""What every recipe does when it trains a network, as properties of drawn trainings."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ears import TapWarning
from ..health import NonFiniteGradient
from ..inspection import Held
from ..optimizer import CurvatureOptimizer
from ..recipe import Moment
from .properties import Broken, Property, equal
from .trainings import EXAMPLES, Training, same, values


def _trains(one: Training) -> None:
    model, optimizer = one.start()
    before = values(model)
    after = one.run(model, optimizer, range(one.steps))
    if not all(bool(torch.isfinite(value).all()) for value in after.values()):
        raise Broken("parameters are not finite")
    if all(torch.equal(after[name], value) for name, value in before.items()):
        raise Broken("no parameter moves")


def _resumes(one: Training) -> None:
    model, optimizer = one.start()
    one.run(model, optimizer, range(one.steps))
    buffer = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), buffer)
    buffer.seek(0)
    again, other = one.start()
    weights, state = torch.load(buffer, weights_only=True)
    again.load_state_dict(weights)
    other.load_state_dict(state)
    more = range(one.steps, one.steps + 4)
    same(one.run(again, other, more), one.run(model, optimizer, more), 0.0, "after a resume")


def _copies(one: Training) -> None:
    model, optimizer = one.start()
    one.run(model, optimizer, range(one.steps))
    twin, copied = copy.deepcopy((model, optimizer))
    copied.attach(twin)
    more = range(one.steps, one.steps + 3)
    try:
        third, pickled = pickle.loads(pickle.dumps((model, optimizer)))
    except (
        pickle.PicklingError,
        AttributeError,
    ):  # a function made on the spot, in the recipe, has no name to find it by
        third = pickled = None
    after = one.run(model, optimizer, more)
    same(one.run(twin, copied, more), after, 0.0, "in a copy")
    if pickled is not None:
        pickled.attach(third)
        same(one.run(third, pickled, more), after, 0.0, "in a pickle")


def _reduces(one: Training) -> None:
    model, optimizer = one.start()
    after = one.run(model, optimizer, range(1))
    again, other = one.start()
    for group in other.param_groups:
        group["reduction"] = "sum"
    other.batch_size = EXAMPLES
    one.step(again, other, 0, factor=float(EXAMPLES))
    same(values(again), after, 1e-6, "with a loss that is a sum")


def _ignores(one: Training) -> None:
    frozen = next(name for name, _ in one.build().named_parameters())
    model, optimizer = one.start(frozen=[frozen])
    before = values(model)
    after = one.run(model, optimizer, range(one.steps))
    equal(after[frozen][None], before[frozen][None], 0.0, f"{frozen}, which is frozen,")
    if all(torch.equal(after[name], value) for name, value in before.items()):
        raise Broken("nothing moves beside a frozen parameter")


def _refuses(one: Training) -> None:
    model, optimizer = one.start()
    optimizer.on_nonfinite = "raise"
    one.run(model, optimizer, range(one.steps))
    before, state = values(model), copy.deepcopy(optimizer.state_dict()["state"])
    try:
        one.step(model, optimizer, one.steps, spoil=float("nan"))
    except NonFiniteGradient as error:
        if not any(name in str(error) for name in before):
            raise Broken(f"a non-finite gradient is not reported by name: {error}") from None
    else:
        raise Broken("a non-finite gradient is not reported")
    same(values(model), before, 0.0, "after a gradient that is not finite")
    for number, record in optimizer.state_dict()["state"].items():
        for name, value in record.items():
            if isinstance(value, Tensor) and not torch.equal(value, state[number][name]):
                raise Broken(f"state {name!r} changed at a gradient that is not finite")


def _keeps(one: Training) -> None:
    model, optimizer = one.start(torch.bfloat16)
    one.run(model, optimizer, range(2))
    for held in optimizer.held():
        if held.recipe.moment.dtype == "parameter":
            continue
        for name, value in held.state.items():
            for tensor in value if isinstance(value, list) else [value]:
                if tensor.is_floating_point() and torch.finfo(tensor.dtype).bits < 32:
                    raise Broken(f"{name} of {held.unit.name} is kept in {tensor.dtype}")


def _solved(optimizer: CurvatureOptimizer) -> dict[tuple[str, str], tuple[Held, Tensor]]:
    found = {}
    for held in optimizer.held():
        roles = held.block.spec()
        for name, value in held.state.items():
            if roles[name].role == "roots" and not isinstance(value, list):
                found[held.unit.name, name] = (held, value.clone())
    return found


def _waits(one: Training) -> None:
    model, optimizer = one.start()
    one.step(model, optimizer, 0)
    for number in range(1, one.steps + 4):
        before = _solved(optimizer)
        one.step(model, optimizer, number)
        for (unit, name), (held, value) in _solved(optimizer).items():
            schedule = held.recipe.schedule
            due = schedule.refreshes(number) or schedule.stagger
            if (unit, name) in before and not due and not torch.equal(value, before[unit, name][1]):
                raise Broken(f"{name} of {unit} changes at step {number}, where no refresh is due")


def _plain(moment: Moment) -> Moment:
    """The running mean that a moment averages, whatever class it is of."""
    given = {field.name: getattr(moment, field.name) for field in fields(Moment)}
    return Moment(**{**given, "average": "mean", "initial": 0.0, "debias": False})


def _averages(one: Training) -> None:
    model, optimizer = one.start()
    (tables, *_) = [optimizer._tables()]
    routes = [replace(route, recipe=replace(route.recipe, moment=_plain(route.recipe.moment))) for route in tables[0]]
    if len(tables) > 1 or any(route.recipe.moment.of == "momentum" for route in tables[0]):
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TapWarning)
        plain = CurvatureOptimizer(model, routes, lr=0.0)
    one.step(model, plain, 0)
    wanted = {held.unit.name: held.dense() for held in plain.held()}
    plain.detach()
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before, first = values(model), {unit.name: recipe.moment for unit, recipe in optimizer._recipes().items()}
    for _ in range(one.steps):
        one.step(model, optimizer, 0)
    if any(not torch.equal(value, before[name]) for name, value in values(model).items()):
        return  # a schedule, or a model of the loss, decides the step size
    for held in optimizer.held():
        moment = held.recipe.moment
        if (
            moment.labels == "sampled"
            or held.recipe.root.tracking is not None
            or moment != first[held.unit.name]  # a schedule decides its weights
            or moment.initial
            or moment.centered
            or moment.maximum
            or not wanted[held.unit.name].any()
        ):
            continue
        count = sum(held.recipe.schedule.takes_statistics(number) for number in range(one.steps))
        factors = max((len(region.factors) for region in held.unit.layout.regions), default=1)
        power = factors if moment.composition == "independent" and not held.block.elementwise else 1
        weight = _weight(moment, count)
        ratio = float(held.dense().trace() / wanted[held.unit.name].trace())
        allowed = {weight ** max(1, power)} | ({1.0} if type(moment) is not Moment else set())
        if all(abs(ratio - one) > 1e-6 * one for one in allowed):
            raise Broken(
                f"after {count} equal statistics the curvature of {held.unit.name} is {ratio:.6g} times one of them "
                f"instead of {weight ** max(1, power):.6g}"
            )


def _weight(moment: Moment, count: int) -> float:
    """What an average of equal statistics is, over one of them."""
    if moment.average == "sum":
        return float(count)
    if moment.average == "mean" or moment.debias:
        return 1.0
    assert isinstance(moment.beta, (int, float))
    return 1.0 - float(moment.beta) ** count


def _separates(one: Training) -> None:
    model, optimizer = one.start()
    recipes = optimizer._recipes().values()
    if any(one.rule.clip or one.rule.model or one.moment.extra == "probed" for one in recipes):
        return  # layers know of each other, by design
    units = [[slot.name for slot in unit.slots] for unit in optimizer._recipes()]
    before = values(model)
    after = one.run(model, optimizer, range(1))
    for mine in units:
        alone, other = one.start(frozen=[name for name in before if name not in mine])
        found = one.run(alone, other, range(1))
        for name in mine:
            step = after[name] - before[name]
            equal((found[name] - before[name])[None], step[None], 1e-6, f"the first step of {name}, trained alone,")


def _descends(one: Training) -> None:
    model, optimizer = one.start()
    inputs, targets = one.batch(0)
    loss = F.cross_entropy(model(inputs), targets)
    gradient = torch.autograd.grad(loss, list(model.parameters()))
    before = values(model)
    after = one.run(model, optimizer, range(1))
    decayed = any(group["weight_decay"] for group in optimizer.param_groups)
    slope = sum(float((g * (after[name] - before[name])).sum()) for g, name in zip(gradient, before, strict=True))
    if not decayed and slope >= 0:
        raise Broken(f"the first step has the slope {slope:.2g}")


PROPERTIES: Sequence[Property[Training]] = (
    Property("training", "parameters move, and stay finite", "a division by a curvature of zero", _trains),
    Property("descent", "the first step leads downhill", "a root that is not positive definite, or a sign", _descends),
    Property(
        "average",
        "a debiased or a running mean of equal statistics is that statistic, an EMA of n of them 1 - β^n of it",
        "an averaging weight that is off by one",
        _averages,
    ),
    Property(
        "separation",
        "a layer's first step is the one that it takes when it is trained alone",
        "a root applied to the wrong block: another layer's",
        _separates,
    ),
    Property(
        "reduction",
        "a loss that is a sum over examples, declared as such, gives the steps of the mean",
        "a wrong scale of statistics or labels",
        _reduces,
    ),
    Property(
        "resume",
        "a run that goes on from a checkpoint equals one that was never stopped, to the last bit",
        "state that does not survive saving",
        _resumes,
    ),
    Property(
        "copy", "a deep copy and a pickle go on alike, to the last bit", "state kept outside of the record", _copies
    ),
    Property("schedule", "roots change only where a refresh is due", "a root solved for at every step", _waits),
    Property("frozen", "what has no gradient does not move", "a step taken for every parameter", _ignores),
    Property(
        "non-finite",
        "a gradient that is not finite is reported by name, and changes nothing",
        "statistics taken before gradients are looked at",
        _refuses,
    ),
    Property(
        "precision", "statistics of bfloat16 parameters are float32", "state created in the parameter's dtype", _keeps
    ),
)
