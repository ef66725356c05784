"""Optimizers in plain lines, one parameter at a time, in float64: what the batched engine must agree with.

Every oracle keeps the worst condition number of what it inverted, and how far it walked: a root of a matrix with condition
number κ carries a relative error of c·κ·u, and so does each step that it makes.
"""

from __future__ import annotations

import math

import torch
from hypothesis import assume

F64 = torch.float64
NOTHING = 1e-24


def symmetric_power(matrix, exponent):
    """A power of a symmetric matrix."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return (vectors * values.clamp_min(0) ** exponent) @ vectors.T


def pieces(size, limit):
    """Balanced cuts of an axis: the bounds of ceil(size / limit) pieces that differ by at most one entry, long first."""
    count = 1 if limit is None else math.ceil(size / limit)
    small, longer = divmod(size, count)
    bounds, start = [], 0
    for number in range(count):
        stop = start + small + (number < longer)
        bounds.append((start, stop))
        start = stop
    return bounds


class Oracle:
    """What all oracles count: steps, statistics, condition number, path."""

    def __init__(self):
        self.step, self.updates, self.condition, self.path = 0, 0, 1.0, 0.0
        # A damping relative to a curvature of zero, or of rounding: test_properties.py says what must hold then.
        self.undefined = False

    def meets(self, matrix):
        """Remember a matrix that is about to be inverted, or a root of it taken."""
        values = torch.linalg.eigvalsh(matrix)
        self.condition = max(self.condition, (values[-1] / values[0].clamp_min(1e-300)).item())
        return matrix

    def walk(self, weight, direction, lr, decay):
        """w <- (1 - lr decay) w - lr d."""
        self.step += 1
        self.path += lr * direction.norm().item()
        return (1 - lr * decay) * weight - lr * direction

    def tolerance(self, weight):
        """c·κ·u of all that it walked and is, c = 100."""
        return 100 * self.condition * torch.finfo(F64).eps * (self.path + weight.norm().item() + 1)

    def check(self, found, weight):
        """Compare in the norm in which the bound holds."""
        if self.undefined:
            return
        error, bound = (found - weight).norm().item(), self.tolerance(weight)
        assume(bound < 1e-3 * (1 + self.path))  # a walk that diverged; hypothesis complains where that is common
        assert error <= bound, f"differs by {error:.1e}, allowed {bound:.1e} (condition number {self.condition:.1e})"


def momentum_of(average, gradient, beta, heavy_ball, step):
    """(new average, what is used in the gradient's place) at a step from 0."""
    if heavy_ball:
        average = beta * average + gradient
        return average, average
    average = beta * average + (1 - beta) * gradient
    return average, average / (1 - beta ** (step + 1))


class Graft:
    """The norm of a diagonal method's step."""

    def __init__(self, kind, beta=0.999, eps=1e-8):
        self.kind, self.beta, self.eps, self.second, self.step = kind, beta, eps, 0.0, 0

    def __call__(self, direction, reference, gradient):
        if self.kind is None:
            return direction
        self.step += 1
        if self.kind == "sgd":
            target = reference
        else:
            if self.kind == "adagrad":
                self.second = self.second + gradient**2
            else:
                self.second = self.beta * self.second + (1 - self.beta) * gradient**2
            unbiased = self.second / (1 - self.beta**self.step) if self.kind == "adam" else self.second
            target = reference / (unbiased.sqrt() + self.eps)
        norm = direction.norm()
        return direction * (target.norm() / norm) if norm > 0 else direction * 0


class Shampoo(Oracle):
    """Shampoo for one tensor, block by block.

    ``limits`` has for every axis the length of its cuts, ``None`` for whole axes, and 1 for an axis that only numbers
    blocks, such as groups.
    """

    def __init__(
        self,
        limits,
        *,
        beta,
        relative,
        momentum,
        heavy_ball,
        exponent,
        grafting,
        debias,
        decay=0.0,
        statistics=1,
        refresh=1,
    ):
        super().__init__()
        self.limits, self.beta, self.relative, self.debias, self.decay = limits, beta, relative, debias, decay
        self.momentum, self.heavy_ball, self.exponent = momentum, heavy_ball, exponent
        self.statistics, self.refresh = statistics, refresh
        self.graft, self.average, self.factors, self.roots = Graft(grafting), 0.0, {}, {}

    def windows(self, tensor):
        """The blocks of a tensor, by the bounds of their cuts."""
        windows = {(): tensor}
        for axis, (size, limit) in enumerate(zip(tensor.shape, self.limits, strict=True)):
            windows = {
                (*key, cut): window.narrow(axis, cut[0], cut[1] - cut[0])
                for key, window in windows.items()
                for cut in pieces(size, limit)
            }
        return windows

    def update(self, weight, gradient, lr, damping):
        if weight.numel() == 0:
            return weight
        reference = gradient
        if self.momentum:
            self.average, reference = momentum_of(self.average, gradient, self.momentum, self.heavy_ball, self.step)
        if self.step % self.statistics == 0:
            self.learn(gradient)
        if self.step % self.refresh == 0:
            self.solve(damping)
        result = torch.zeros_like(reference)
        places = self.windows(result)
        for key, window in self.windows(reference).items():
            out = window
            for axis in range(out.ndim):
                if (key, axis) in self.roots:
                    out = torch.tensordot(self.roots[key, axis], out, dims=([1], [axis])).movedim(0, axis)
            places[key].copy_(out)
        return self.walk(weight, self.graft(result, reference, gradient), lr, self.decay)

    def learn(self, gradient):
        self.updates += 1
        for key, window in self.windows(gradient).items():
            for axis, size in enumerate(window.shape):
                if size == 1 and max(window.shape) > 1:
                    continue  # k counts axes of size above one
                unfolded = window.movedim(axis, 0).reshape(size, -1)
                old = self.factors.get((key, axis), torch.zeros(size, size, dtype=F64))
                new = unfolded @ unfolded.T
                self.factors[key, axis] = old + new if self.beta is None else self.beta * old + (1 - self.beta) * new

    def solve(self, damping):
        scale = 1 / (1 - self.beta**self.updates) if self.debias and self.beta is not None else 1.0
        counts = {}
        for key, _ in self.factors:
            counts[key] = counts.get(key, 0) + 1
        for (key, axis), factor in self.factors.items():
            scaled = factor * scale
            shift = damping * torch.linalg.eigvalsh(scaled)[-1].item() if self.relative else damping
            if shift < NOTHING:
                self.undefined, shift = True, 1.0
            damped = self.meets(scaled + shift * torch.eye(len(factor), dtype=F64))
            self.roots[key, axis] = symmetric_power(damped, -self.exponent / counts[key])


class MBF(Oracle):
    """MBF for one weight: blocks as lists of positions in the flat operand, tied or not."""

    def __init__(
        self,
        blocks,
        tied,
        *,
        beta,
        momentum,
        heavy_ball=True,
        debias=False,
        relative=False,
        grafting=None,
        decay=0.0,
        statistics=1,
        refresh=1,
        dense_start=False,
    ):
        super().__init__()
        self.blocks, self.tied, self.beta, self.momentum, self.decay = blocks, tied, beta, momentum, decay
        self.heavy_ball, self.debias, self.relative, self.graft = heavy_ball, debias, relative, Graft(grafting)
        self.statistics, self.refresh, self.dense_start = statistics, refresh, dense_start
        self.fisher = [torch.zeros(len(block), len(block), dtype=F64) for block in blocks]
        self.inverse, self.average, self.warm, self.refreshed = [None] * len(blocks), 0.0, 0, []

    def second_moments(self, flat):
        outer = [torch.outer(flat[block], flat[block]) for block in self.blocks]
        return [sum(outer) / len(outer)] * len(outer) if self.tied else outer

    def warm_start(self, flat_gradient):
        """The plain running mean over warm-up batches."""
        self.warm += 1
        pairs = zip(self.fisher, self.second_moments(flat_gradient), strict=True)
        self.fisher = [(self.warm - 1) / self.warm * old + new / self.warm for old, new in pairs]

    def update(self, flat_weight, flat_gradient, lr, damping):
        t = self.step
        self.average, used = momentum_of(self.average, flat_gradient, self.momentum, self.heavy_ball, t)
        if t % self.statistics == 0:
            self.updates += 1
            pairs = zip(self.fisher, self.second_moments(flat_gradient), strict=True)
            self.fisher = [self.beta * old + (1 - self.beta) * new for old, new in pairs]
        if t % self.refresh == 0 or (self.dense_start and t <= self.refresh and t % self.statistics == 0):
            self.refreshed.append(t)
            self.solve(damping)
        direction = torch.zeros_like(flat_gradient)
        for block, inverse in zip(self.blocks, self.inverse, strict=True):
            direction[block] = inverse @ used[block]
        return self.walk(flat_weight, self.graft(direction, used, flat_gradient), lr, self.decay)

    def solve(self, damping):
        # A mean over a warm start is not biased towards zero, and neither is an average that starts from it.
        scale = 1 / (1 - self.beta**self.updates) if self.debias and not self.warm else 1.0
        if self.relative:
            mean = sum((scale * one).trace().item() / len(one) for one in self.fisher) / len(self.fisher)
            damping *= mean
            if damping < NOTHING:
                self.undefined, damping = True, 1.0
        damped = [self.meets(scale * one + damping * torch.eye(len(one), dtype=F64)) for one in self.fisher]
        self.inverse = [torch.linalg.inv(one) for one in damped]


def linear_blocks(name, outputs, inputs):
    """(blocks, tied) of [W, b] with ``inputs`` columns in all, as positions in row-major order."""
    rows = [[row * inputs + column for column in range(inputs)] for row in range(outputs)]
    columns = [[row * inputs + column for row in range(outputs)] for column in range(inputs)]
    # the authors reshape [W, b] to as many rows as it has columns, without a transpose
    chunks = [[chunk * outputs + entry for entry in range(outputs)] for chunk in range(inputs)]
    return {
        "output-averaged": (rows, True),
        "input-averaged": (columns, True),
        "output": (rows, False),
        "input": (columns, False),
        "row-major": (chunks, True),
    }[name]


class MomentumDiagonal(Oracle):
    """The rule of biases and norms: v is of the EMA gradient; the authors leave that EMA itself biased."""

    def __init__(self, *, momentum, debias=False, decay=0.0, beta=0.999, eps=1e-8):
        super().__init__()
        self.momentum, self.debias, self.decay, self.beta, self.eps = momentum, debias, decay, beta, eps
        self.average, self.second = 0.0, 0.0

    def update(self, weight, gradient, lr, damping=None):
        t = self.step + 1
        self.average = self.momentum * self.average + (1 - self.momentum) * gradient
        used = self.average / (1 - self.momentum**t) if self.debias else self.average
        self.second = self.beta * self.second + (1 - self.beta) * used**2
        return self.walk(weight, used / (self.eps + (self.second / (1 - self.beta**t)).sqrt()), lr, self.decay)


class Adam(Oracle):
    """Adam, of whose momentum Shampoo's vectors may take another kind."""

    def __init__(self, *, momentum, heavy_ball, decay=0.0, beta=0.999, eps=1e-8):
        super().__init__()
        self.momentum, self.heavy_ball, self.decay, self.beta, self.eps = momentum, heavy_ball, decay, beta, eps
        self.average, self.second = 0.0, 0.0

    def update(self, weight, gradient, lr, damping=None):
        used = gradient
        if self.momentum:
            self.average, used = momentum_of(self.average, gradient, self.momentum, self.heavy_ball, self.step)
        self.second = self.beta * self.second + (1 - self.beta) * gradient**2
        unbiased = self.second / (1 - self.beta ** (self.step + 1))
        return self.walk(weight, used / (unbiased.sqrt() + self.eps), lr, self.decay)
