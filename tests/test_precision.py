"""Mixed precision: the scale of a scaler, overflows, low-precision parameters, and the global switches of products."""

from __future__ import annotations

import copy
import io
import warnings
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import curvlib
from curvlib import TapWarning, engine, roots
from curvlib.blocks import Block
from curvlib.precision import full_precision
from curvlib.testing.trainings import perceptron
from tests.campaign import METHODS
from tests.test_resume import assert_identical

# A GradScaler takes no closure, which K-BFGS cannot do without; it says so.
SCALED = sorted(set(METHODS) - {"KBFGS"})
# Others never see the scale: the scaler divides their gradients.
HEARING = ["EKFAC", "Eva", "FOOF", "KFAC", "NGD", "SINGD", "TKFAC"]
every_method = pytest.mark.parametrize("method", METHODS)
every_scaled = pytest.mark.parametrize("method", SCALED)


def batch(step, dtype, n=12):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(n, 6, dtype=torch.float64, generator=generator).to(dtype)
    return x, torch.randint(0, 3, (n,), generator=generator)


def made(method, dtype=torch.float64, **settings):
    torch.manual_seed(0)
    model = perceptron().to(dtype)
    return model, getattr(curvlib, method)(model, **settings)


class Loop:
    """A training with a scaler."""

    def __init__(self, method, scale=1.0, unscale=False, autocast=None, dtype=torch.float64, growth=1000, **settings):
        self.model, self.optimizer = made(method, dtype, **settings)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=growth)
        self.unscale, self.autocast, self.dtype = unscale, autocast, dtype
        if unscale:
            self.optimizer.loss_scale = self.scaler.get_scale

    def backward(self, x, y, parts=1, spoil=1.0):
        for some, wanted in zip(x.chunk(parts), y.chunk(parts), strict=True):
            with torch.autocast("cpu", self.autocast) if self.autocast else nullcontext():
                outputs = self.model(some)
            loss = F.cross_entropy(outputs.to(self.dtype), wanted) / parts
            self.optimizer.observe(outputs, "categorical", loss=loss)
            self.scaler.scale(loss * spoil).backward(retain_graph=self.optimizer.needs_graph)

    def step(self, number, parts=1, spoil=1.0):
        self.optimizer.zero_grad()
        self.backward(*batch(number, self.dtype), parts, spoil)
        if self.unscale:
            self.scaler.unscale_(self.optimizer)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def state(self):
        return copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict()))


# -- scales -----------------------------------------------------------------------------------------------------------


@every_scaled
@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize(("scale", "growth"), [(2.0**16, 1000), (1.0, 1), (2.0**70, 1)])
def test_no_scale_changes_a_bit(method, unscale, scale, growth):
    """All scales are powers of two."""
    scaled, plain = Loop(method, scale, unscale, growth=growth), Loop(method)
    for number in range(3):
        scaled.step(number)
        plain.step(number)
    assert growth > 1 or scaled.scaler.get_scale() == scale * 8
    assert_identical(scaled.state(), plain.state())


@every_scaled
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_the_scale_stays_out_of_what_autocast_computes(method, autocast):
    """Bfloat16 has the exponents of float32; float16 rounds other gradients to subnormal numbers, below 2^-14 / scale."""
    settings = {"low_precision": False} if method == "Muon" else {}
    loops = [Loop(method, scale, autocast=autocast, dtype=torch.float32, **settings) for scale in (2.0**8, 2.0**12)]
    for loop in loops:
        loop.step(0)
        loop.step(1)
    if autocast == torch.bfloat16:
        assert_identical(loops[0].state(), loops[1].state())
        return
    for held, other in zip(*(loop.optimizer.held() for loop in loops), strict=True):
        for name, spec in held.block.spec().items():
            if spec.role == "statistics":
                one, two = (torch.stack(list(each.state[name])) for each in (held, other))
                # A gradient of a mean over 12 is at least 2^-10 or so where it matters: 2^-24 / 2^-8 is its last bit.
                torch.testing.assert_close(one, two, rtol=0.02, atol=0.02 * float(one.abs().max()))


@pytest.mark.parametrize("method", HEARING)
@pytest.mark.parametrize("mode", ["raise", "mask"])
def test_a_scale_may_grow_until_its_square_is_infinite(method, mode):
    """As it does without float16: nothing overflows that would make a scaler stop."""
    scaled, plain = (Loop(method, scale, dtype=torch.float32, growth=1) for scale in (2.0**62, 1.0))
    for number in range(10):
        for loop in (scaled, plain):
            loop.optimizer.on_nonfinite = mode
            loop.step(number)
    assert scaled.scaler.get_scale() == 2.0**72
    assert scaled.optimizer._step_supports_amp_scaling
    assert_identical(scaled.state(), plain.state())


def test_a_square_that_overflows_by_itself_is_named_under_a_scaler():
    for method in ("Adam", "KFAC"):
        loop = Loop(method, 2.0**40, dtype=torch.float32)
        with pytest.raises(curvlib.NonFiniteGradient, match=r"0\.weight \(its square overflows\)"):
            loop.step(0, spoil=1e25)


# -- overflows --------------------------------------------------------------------------------------------------------


@every_scaled
@pytest.mark.parametrize("unscale", [False, True])
def test_an_overflow_changes_nothing_at_all_and_is_counted(method, unscale):
    loop, plain = Loop(method, 1024.0, unscale), Loop(method, 1024.0, unscale)
    for number in range(2):
        loop.step(number)
        plain.step(number)
    before = loop.state()
    loop.step(7, spoil=1e308)
    loop.step(8, spoil=float("inf"))
    assert_identical(loop.state(), before)
    assert loop.scaler.get_scale() == 256.0
    counted = loop.optimizer._step_supports_amp_scaling  # else the scaler left out the step itself
    assert counted is (method in HEARING and not unscale)
    assert loop.optimizer.health().masked == ({"the scaled gradients": 2} if counted else {})
    for number in range(2, 4):
        loop.step(number)
        plain.step(number)
    assert_identical(loop.state(), plain.state())


@every_scaled
def test_an_overflow_at_the_first_step(method):
    loop, plain = Loop(method, 1024.0), Loop(method, 1024.0)
    loop.step(7, spoil=1e308)
    loop.step(0)
    plain.step(0)
    assert_identical(loop.state(), plain.state())


@every_scaled
def test_an_overflow_of_one_optimizer_is_not_another_ones(method):
    torch.manual_seed(0)
    model = perceptron().double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TapWarning)
        first = getattr(curvlib, method)(model[0].parameters(), model=model)
        second = getattr(curvlib, method)(model[6].parameters(), model=model)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    before = copy.deepcopy(model.state_dict())
    x, y = batch(0, torch.float64)
    outputs = model(x)
    loss = F.cross_entropy(outputs, y)
    for optimizer in (first, second):
        optimizer.observe(outputs, "categorical", loss=loss)
    scaler.scale(loss).backward(retain_graph=True)
    model[0].weight.grad[0, 0] = float("inf")
    for optimizer in (first, second):
        scaler.step(optimizer)
    scaler.update()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"6.weight", "6.bias"}
    assert bool(first.health().masked) is (method in HEARING)
    assert not second.health().masked
    assert scaler.get_scale() == 32.0


@every_scaled
def test_accumulation_under_a_scaler(method):
    """Equal to the batch as without a scaler, which tests/test_accumulation.py has; here not a bit of the scale."""
    scaled, plain = Loop(method, 2.0**16, unscale=True), Loop(method)
    for number in range(2):
        scaled.step(number, parts=3)
        plain.step(number, parts=3)
    assert_identical(scaled.state(), plain.state())


# -- parameters of low precision --------------------------------------------------------------------------------------

TWINS = ("SGD", "Adam", "AdamW", "RMSprop", "Adagrad")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", sorted(set(METHODS) - set(TWINS)))
def test_what_is_held_for_low_precision_is_float32(method, dtype):
    model, optimizer = made(method, dtype)
    for _ in range(2):
        for number in range(2):
            x, y = batch(number, dtype)

            def closure(x=x, y=y):
                optimizer.zero_grad()
                outputs = model(x)
                loss = F.cross_entropy(outputs.float(), y)
                optimizer.observe(outputs, "categorical", loss=loss)
                loss.backward(retain_graph=optimizer.needs_graph)
                return loss.detach()

            optimizer.step(closure)
            kept = [value for record in optimizer.state.values() for value in record.values()]
            assert {value.dtype for value in kept if value.is_floating_point()} <= {torch.float32}
            assert all(value.isfinite().all() for value in kept)
        buffer = io.BytesIO()
        torch.save(optimizer.state_dict(), buffer)
        buffer.seek(0)
        optimizer.load_state_dict(torch.load(buffer, weights_only=True))
    assert all(parameter.isfinite().all() for parameter in model.parameters())


# -- global switches --------------------------------------------------------------------------------------------------

SWITCHES = {
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "allow_tf32": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "cuda": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "mkldnn": lambda: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),
    "all of mkldnn": lambda: setattr(torch.backends.mkldnn, "fp32_precision", "bf16"),
    "everything": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
}
PLACES = (torch.backends, torch.backends.mkldnn, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)


def open_switches():
    torch.set_float32_matmul_precision("highest")
    for place in PLACES:
        place.fp32_precision = "none"


@pytest.fixture(params=SWITCHES)
def switched(request):
    """A switch that is on; yields what all switches say."""
    open_switches()
    SWITCHES[request.param]()
    yield [place.fp32_precision for place in PLACES]
    open_switches()


def reduced():
    places = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    return torch.is_autocast_enabled("cpu") or any(one.fp32_precision not in ("ieee", "none") for one in places)


def test_switches_are_what_they_were_also_after_an_error(switched):
    with full_precision():
        assert not reduced()
        with full_precision():
            assert not reduced()
    assert [place.fp32_precision for place in PLACES] == switched
    with pytest.raises(KeyboardInterrupt), full_precision():
        raise KeyboardInterrupt
    assert [place.fp32_precision for place in PLACES] == switched


def test_an_inherited_precision_stays_inherited():
    open_switches()
    torch.backends.mkldnn.fp32_precision = "bf16"
    with full_precision():
        assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
    torch.backends.mkldnn.fp32_precision = "ieee"
    assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
    open_switches()


def kinds(base=Block):
    return {base}.union(*(kinds(kind) for kind in base.__subclasses__()))


@every_method
def test_all_of_a_step_is_in_full_precision(method, monkeypatch):
    """Whatever a structure computes: in hooks, in the step, after the step; while the model's own products are not."""
    seen = set()

    def watched(name, real):
        def call(*arguments, **options):
            assert not reduced(), name
            seen.add(name)
            return real(*arguments, **options)

        return call

    for kind in kinds():
        for name in ("update", "collect", "average", "roots", "correct", "follow", "apply", "dense"):
            if name in vars(kind):
                monkeypatch.setattr(kind, name, watched(name, vars(kind)[name]))
    monkeypatch.setattr(roots, "solve", watched("solve", roots.solve))
    monkeypatch.setattr(engine, "kernel_for", lambda *_: None)  # kernels have no products
    open_switches()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            model, optimizer = made(method, torch.float32)
            for number in range(2):
                x, y = batch(number, torch.float32)

                def closure(x=x, y=y):
                    assert reduced()
                    optimizer.zero_grad()
                    outputs = model(x)
                    loss = F.cross_entropy(outputs, y)
                    optimizer.observe(outputs, "categorical", loss=loss)
                    loss.backward(retain_graph=optimizer.needs_graph)
                    return loss.detach()

                optimizer.step(closure)
            for held in optimizer.held():
                held.dense()
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        open_switches()
    assert "apply" in seen or all(recipe.root.exponent == 0 for recipe in optimizer._recipes().values())


def test_no_switch_changes_a_bit_of_a_large_step(switched):
    """Large enough for the libraries that the switches speak to."""
    found = []
    for on in (True, False):
        if not on:
            open_switches()
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(512, 512))
        optimizer = curvlib.Shampoo([weight], damping=0.1)
        weight.grad = torch.randn(512, 512)
        optimizer.step()
        found.append(weight.detach())
    assert torch.equal(*found)
