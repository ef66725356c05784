"""A seeded campaign of faults: a random method, network, dtype and poison, and what must hold afterwards.

python -m tests.campaign --cases 10000 --out benchmarks/results/faults
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import signal
import sys
import warnings
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from torch import nn
from torch.nn import functional as F

import curvlib
from curvlib import CurvatureOptimizer, NonFiniteGradient, TapWarning, solvers

METHODS = sorted(
    name
    for name in curvlib.optimizers.__all__
    if isinstance(getattr(curvlib, name, None), type) and issubclass(getattr(curvlib, name), CurvatureOptimizer)
)
SETTINGS = {
    "EKFAC": [{"refresh_every": 1}, {"scaling": "gradient"}],
    "KBFGS": [{"memory": 3}, {"statistics_every": 2}],
    "KFAC": [{"labels": "sampled"}, {"labels": "exact"}, {"stagger": True, "refresh_every": 3}, {"form": "eigen"}],
    "KLShampoo": [{"refresh_every": 1}, {"block_size": 2}],
    "Lion": [{"weight_decay": 0.0}],
    "MBF": [
        {"linear_blocks": "output", "window": 3},
        {"of": "samples"},
        {"stagger": True, "refresh_every": 3, "linear_blocks": "output"},
        {"linear_blocks": "row-major", "grafting": None},
    ],
    "PSGDKron": [{"max_size": 3}, {"max_skew": 1.0}],
    "SINGD": [{"structure": "triangular", "normalize": True}, {"structure": "blocks", "block_size": 2}],
    "SOAP": [{"refresh_every": 1}, {"basis": "eigh", "block_size": 2}],
    "Shampoo": [{"stagger": True, "refresh_every": 3}, {"block_size": 2, "grafting": None}, {"vectors": "kronecker"}],
    "SophiaG": [{"weight_decay": 0.0}],
    "SophiaH": [{"weight_decay": 0.0}],
}
"""Settings of a method that are drawn beside its defaults; those that decay would not stand still where they must."""
STILL = ("Lion", "SophiaG", "SophiaH")
TWINS = ("Adagrad", "Adam", "AdamW", "RMSprop", "SGD")
"""Methods whose state has the parameter's dtype, as torch's, in half of which 1e-8 is zero and 1e5 infinite."""
PACKAGE = str(Path(curvlib.__file__).parent)
DTYPES = (torch.float64, torch.float32, torch.float32, torch.bfloat16, torch.float16)
COARSE = (torch.bfloat16, torch.float16)


class Odd(nn.Module):
    """A network with an empty, a scalar and an oblong parameter."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(3, 4)
        self.scalar = nn.Parameter(torch.tensor(1.0))
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.oblong = nn.Parameter(torch.randn(1, 700) / 10)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        hidden = torch.tanh(self.body(x)) * self.scalar + self.empty.sum() + torch.tanh(self.oblong).mean()
        return self.head(hidden)


def perceptron():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 2))


def convolutional():
    return nn.Sequential(nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(4, 2))


def wide():
    """Factors that are averaged panel by panel, and kernels that lie by planes."""
    return nn.Sequential(
        nn.Linear(3, 260), nn.Tanh(), nn.Unflatten(1, (26, 10)), nn.Conv1d(26, 40, 3), nn.Flatten(), nn.Linear(320, 2)
    )


NETWORKS = (*[perceptron, convolutional, Odd] * 6, wide)
UNBOUNDED = ("FullAdagrad", "NGD", "TNT")
"""Methods whose matrices of the wide network are too large to be solved in a moment."""


class Case:
    """One case, decided by its seed alone."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.method = self.random.choice(METHODS)
        self.network = self.random.choice(NETWORKS)
        self.dtype = self.random.choice(DTYPES)
        self.poison = self.random.choice(sorted(POISONS))
        if self.method in UNBOUNDED and self.network is wide:
            self.network = perceptron
        if self.method in TWINS and self.dtype == torch.float16:
            self.dtype = torch.float32
        drawn = SETTINGS.get(self.method, [])
        self.settings = self.random.choice(drawn if self.method in STILL else [{}, *drawn])
        torch.manual_seed(seed)
        self.model = self.network().to(self.dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TapWarning)
            self.optimizer = getattr(curvlib, self.method)(self.model, **self.settings)
        self.steps = 0

    def __str__(self) -> str:
        return f"{self.method}({self.settings}), {self.network.__name__}, {self.dtype}, {self.poison}"

    def step(self, scale: float = 1.0, spoil: float = 0.0, same: bool = False) -> None:
        """One step on a batch of its own; or on one example, again and again."""
        self.steps += 1
        generator = torch.Generator().manual_seed(self.steps)
        x = torch.randn(1 if same else 8, 3, generator=torch.Generator().manual_seed(0) if same else generator)
        x = x.expand(8, 3).to(self.dtype) + spoil
        y = torch.arange(8) % 2

        def closure():
            self.optimizer.zero_grad()
            outputs = self.model(x)
            loss = F.cross_entropy(outputs.double(), y) * scale
            self.optimizer.observe(outputs, "categorical", loss=loss)
            loss.backward(retain_graph=self.optimizer.needs_graph)
            return loss.detach()

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.optimizer.step(closure)

    def values(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}

    def finite(self) -> bool:
        return all(bool(torch.isfinite(value).all()) for value in self.values().values())

    def sound(self) -> bool:
        """Whether the state is finite, residuals apart, which say that a solve failed."""
        for record in self.optimizer.state.values():
            for name, value in record.items():
                if value.is_floating_point() and not name.startswith("residual") and not torch.isfinite(value).all():
                    return False
        return True

    def matrices(self) -> dict[str, list[torch.Tensor]]:
        """The matrices of statistics and roots, by the places where they are kept.

        What lives in a basis is left out: it moves with it, and is averaged afterwards, in one step.
        """
        return {
            f"{name} of {held.unit.name}": list(torch.stack(list(held.state[name])).flatten(0, -3).clone())
            for held in self.optimizer.held()
            for name, spec in held.block.spec().items()
            if spec.role != "diagnostics" and len(spec.shape) >= 2 and not held.block.elementwise
            if not name.startswith(("second_", "whiten_"))
        }

    def goes_on(self, moves: bool = True) -> str:
        """Three normal steps: what is wrong with them, or nothing."""
        before = self.values()
        try:
            for _ in range(3):
                self.step()
        except NonFiniteGradient as error:
            return "" if str(error).startswith("non-finite") and "parameter" not in str(error) else f"unnamed: {error}"
        if not self.finite():
            return "parameters are not finite"
        if not self.sound():
            return "state is not finite"
        # A parameter of two bytes may be too coarse for a step.
        stuck = all(torch.equal(value, before[name]) for name, value in self.values().items())
        return "nothing moves" if moves and stuck and self.dtype not in COARSE else ""


def _not_finite(value: float):
    def poison(case: Case) -> str:
        before, state = case.values(), copy.deepcopy(case.optimizer.state_dict()["state"])
        try:
            case.step(spoil=value)
        except NonFiniteGradient as error:
            if not any(name in str(error) for name in before):
                return f"not named: {error}"
        else:
            return "not reported"
        if any(not torch.equal(value, before[name]) for name, value in case.values().items()):
            return "parameters changed"
        for number, record in case.optimizer.state_dict()["state"].items():
            for name, kept in record.items():
                if name in state.get(number, {}) and not torch.equal(kept, state[number][name]):
                    return f"state {name} changed"
        return case.goes_on()

    return poison


@contextmanager
def unknowing(case: Case):
    """As on an accelerator: a masked step is not known to be one."""
    known = case.random.random() < 0.5
    with mock.patch.object(curvlib.optimizer, "_known", return_value=known):
        yield known


def masked(case: Case) -> str:
    """A batch that is not finite, where steps are masked."""
    case.optimizer.on_nonfinite = "mask"
    with unknowing(case) as known:
        before, state = case.values(), copy.deepcopy(case.optimizer.state_dict()["state"])
        case.step(spoil=case.random.choice([float("nan"), float("inf")]))
        if any(not torch.equal(value, before[name]) for name, value in case.values().items()):
            return "parameters changed"
        if not case.sound():
            return "state is not finite"
        for number, record in case.optimizer.state_dict()["state"].items():
            for name, kept in record.items():
                if known and name in state.get(number, {}) and not torch.equal(kept, state[number][name]):
                    return f"state {name} changed"
        if not case.optimizer.health().masked:
            return "not counted"
        return case.goes_on()


def silent(case: Case) -> str:
    """All-zero gradients, at the first step or later."""
    for _ in range(case.random.randint(1, 3)):
        case.step(scale=0.0)
    return "not finite" if not (case.finite() and case.sound()) else case.goes_on()


def degenerate(case: Case) -> str:
    """One example again and again: curvature of rank one, or none."""
    try:
        for _ in range(case.random.randint(1, 6)):
            case.step(same=True)
    except (
        NonFiniteGradient
    ) as error:  # steps may be too long for what is learnt from one example, which is told by name
        return "" if any(name in str(error) for name in case.values()) else f"not named: {error}"
    return "not finite" if not (case.finite() and case.sound()) else case.goes_on()


def scaled(case: Case) -> str:
    """A loss that is 1e-30 to 1e30 times as large for some steps."""
    exponent = case.random.choice([-30, -20, -10, -5, 5, 10, 15, 20, 25, 30])
    reported = False
    try:
        for _ in range(case.random.randint(1, 3)):
            case.step(scale=10.0**exponent)
    except NonFiniteGradient:
        reported = True
    if not case.finite():  # a finite step may be too long for its parameter; the next one says so
        try:
            case.step()
        except NonFiniteGradient:
            return ""
        return "parameters overflowed, and nothing was said"
    if not case.sound():
        return f"state is not finite after a scale of 1e{exponent}"
    return case.goes_on(moves=exponent < 0 and not reported)


def unplugged(case: Case) -> str:
    """A parameter that stops receiving gradients, and another that starts again."""
    parameters = list(case.model.parameters())
    chosen = case.random.choice(parameters)
    chosen.requires_grad_(False)
    before = chosen.detach().clone()
    case.step()
    case.step()
    if not torch.equal(chosen, before):
        return "a frozen parameter moved"
    chosen.requires_grad_(True)
    return case.goes_on()


@contextmanager
def stopping(at: float):
    """Ctrl-C at the so many-th line of the package, in hooks as elsewhere; yields the list of lines so far."""
    seen: list[str] = []

    def trace(frame, event, _):
        if event == "call":
            return trace if frame.f_code.co_filename.startswith(PACKAGE) else None
        if event == "line":
            seen.append(f"{frame.f_code.co_filename}:{frame.f_lineno}")
            if len(seen) == at:
                signal.raise_signal(signal.SIGINT)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield seen
    finally:
        sys.settrace(before)


def interrupted(case: Case) -> str:
    """Ctrl-C at any line of a step: each matrix is the old one or the new one."""
    twin = copy.deepcopy(case.__dict__)
    other = object.__new__(Case)
    other.__dict__.update(twin)
    other.optimizer.attach(other.model)
    before, _ = case.matrices(), other.matrices()  # asking makes a copy ready, so that both steps have the same lines
    with stopping(math.inf) as seen:
        other.step()
    try:
        with stopping(case.random.randint(1, len(seen))):
            case.step()
    except KeyboardInterrupt:
        pass
    after = other.matrices()
    for name, value in case.matrices().items():
        kept = [torch.equal(*pair) for pair in zip(value, before.get(name, value), strict=True)]
        made = [torch.equal(*pair) for pair in zip(value, after[name], strict=True)]
        if not all(old or new for old, new in zip(kept, made, strict=True)):
            return f"{name} is neither old nor new"
    return "not finite" if not (case.finite() and case.sound()) else case.goes_on()


def exhausted(case: Case) -> str:
    """No memory for a refresh: the old roots stay, and are counted."""
    before = case.optimizer.health().kept
    place = case.random.choice(["_cholesky", "_eigh", "_qr"])
    name = {"_cholesky": "cholesky", "_eigh": "eigh", "_qr": "qr"}[place]
    raised = []

    def solve(*arguments):
        raised.append(1)
        raise torch.OutOfMemoryError("no memory")

    from dataclasses import replace

    with mock.patch.dict(solvers.SOLVERS, {name: replace(solvers.SOLVERS[name], solve=solve)}):
        for _ in range(3):
            case.step()
    if raised and case.optimizer.health().kept == before:
        return "a refresh without memory is not counted"
    return "not finite" if not (case.finite() and case.sound()) else case.goes_on()


POISONS = {
    "nan": _not_finite(float("nan")),
    "infinity": _not_finite(float("inf")),
    "silent": silent,
    "degenerate": degenerate,
    "scaled": scaled,
    "unplugged": unplugged,
    "interrupted": interrupted,
    "masked": masked,
    "exhausted": exhausted,
}


def run(seed: int) -> tuple[Case, str]:
    """A case, and what is wrong with it, or nothing."""
    case = Case(seed)
    for _ in range(case.random.randint(0, 2)):
        case.step()
    return case, POISONS[case.poison](case)


def main() -> int:
    """Run many cases and write what came of them."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaign", description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--out", type=Path, default=Path("results/faults"))
    options = parser.parse_args()
    counts: Counter[str] = Counter()
    failed = []
    for seed in range(options.cases):
        case, wrong = run(seed)
        counts[case.poison] += 1
        if wrong:
            failed.append(f"seed {seed}: {case}: {wrong}")
    options.out.mkdir(parents=True, exist_ok=True)
    versions = {"curvlib": curvlib.__version__, "torch": torch.__version__}
    content = {"cases": options.cases, "by poison": dict(sorted(counts.items())), "failed": failed, **versions}
    (options.out / "faults.json").write_text(json.dumps(content, indent=1))
    sys.stdout.write(json.dumps(content, indent=1) + "\n")
    return len(failed) > 0


if __name__ == "__main__":
    sys.exit(main())
