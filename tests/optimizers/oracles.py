"""Optimizers in plain lines, one parameter at a time, in float64: what the batched engine must agree with."""

from __future__ import annotations

import math

import torch

F64 = torch.float64


def symmetric_power(matrix, exponent):
    """A power of a symmetric matrix."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return (vectors * values.clamp_min(0) ** exponent) @ vectors.T


def pieces(size, limit):
    """Balanced cuts of an axis: the bounds of ceil(size / limit) pieces that differ by at most one entry, long first."""
    count = math.ceil(size / limit)
    small, longer = divmod(size, count)
    bounds, start = [], 0
    for number in range(count):
        stop = start + small + (number < longer)
        bounds.append((start, stop))
        start = stop
    return bounds


class Shampoo:
    """Shampoo for one tensor, block by block."""

    def __init__(
        self, shape, *, lr, beta, damping, relative, momentum, heavy_ball, exponent, grafting, block, debias, decay
    ):
        self.lr, self.beta, self.damping, self.relative = lr, beta, damping, relative
        self.momentum, self.heavy_ball, self.exponent, self.grafting = momentum, heavy_ball, exponent, grafting
        self.block, self.debias, self.decay = block, debias, decay
        self.average = torch.zeros(shape, dtype=F64)
        self.second = torch.zeros(shape, dtype=F64)
        self.factors, self.roots, self.step, self.updates = {}, {}, 0, 0

    def windows(self, tensor):
        """The blocks of a tensor, by the bounds of their cuts."""
        windows = {(): tensor}
        for axis, size in enumerate(tensor.shape):
            cuts = pieces(size, self.block) if self.block else [(0, size)]
            windows = {
                (*key, cut): window.narrow(axis, cut[0], cut[1] - cut[0])
                for key, window in windows.items()
                for cut in cuts
            }
        return windows

    def update(self, weight, gradient, statistics, refresh):
        if self.momentum == 0:
            direction = gradient
        elif self.heavy_ball:
            self.average = self.momentum * self.average + gradient
            direction = self.average
        else:
            self.average = self.momentum * self.average + (1 - self.momentum) * gradient
            direction = self.average / (1 - self.momentum ** (self.step + 1))
        reference = direction
        if statistics:
            self.updates += 1
            for key, window in self.windows(gradient).items():
                for axis, size in enumerate(window.shape):
                    if size == 1 and max(window.shape) > 1:
                        continue
                    unfolded = window.movedim(axis, 0).reshape(size, -1)
                    old = self.factors.get((key, axis), torch.zeros(size, size, dtype=F64))
                    new = unfolded @ unfolded.T
                    self.factors[key, axis] = (
                        old + new if self.beta is None else self.beta * old + (1 - self.beta) * new
                    )
        if refresh:
            scale = 1 / (1 - self.beta**self.updates) if self.debias and self.beta is not None else 1.0
            counts = {}
            for key, _ in self.factors:
                counts[key] = counts.get(key, 0) + 1
            for (key, axis), factor in self.factors.items():
                scaled = factor * scale
                shift = self.damping * torch.linalg.eigvalsh(scaled)[-1] if self.relative else self.damping
                damped = scaled + max(float(shift), 1e-30) * torch.eye(len(factor), dtype=F64)
                self.roots[key, axis] = symmetric_power(damped, -self.exponent / counts[key])
        result = torch.zeros_like(direction)
        places = self.windows(result)
        for key, window in self.windows(direction).items():
            out = window
            for axis in range(out.ndim):
                if (key, axis) in self.roots:
                    out = torch.tensordot(self.roots[key, axis], out, dims=([1], [axis])).movedim(0, axis)
            places[key].copy_(out)
        if self.grafting:
            target = reference
            if self.grafting != "sgd":
                keep, gain = {"adagrad": (1, 1)}.get(self.grafting, (0.999, 1 - 0.999))
                self.second = keep * self.second + gain * gradient**2
                unbiased = self.second / (1 - 0.999 ** (self.step + 1)) if self.grafting == "adam" else self.second
                target = reference / (unbiased.sqrt() + 1e-8)
            norm = result.norm()
            result = result * (target.norm() / norm) if norm > 0 else result * 0
        self.step += 1
        return (1 - self.lr * self.decay) * weight - self.lr * result


class MBF:
    """MBF for one weight: blocks as lists of positions in the flat operand, tied or not."""

    def __init__(self, blocks, tied, *, lr, damping, beta, momentum, decay, statistics, refresh, dense_start):
        self.blocks, self.tied = blocks, tied
        self.lr, self.damping, self.beta, self.momentum, self.decay = lr, damping, beta, momentum, decay
        self.statistics, self.refresh, self.dense_start = statistics, refresh, dense_start
        self.fisher = [torch.zeros(len(block), len(block), dtype=F64) for block in blocks]
        self.inverse = [None] * len(blocks)
        self.average, self.step, self.refreshed = 0.0, 0, []

    def second_moments(self, flat):
        outer = [torch.outer(flat[block], flat[block]) for block in self.blocks]
        return [sum(outer) / len(outer)] * len(outer) if self.tied else outer

    def update(self, flat_weight, flat_gradient):
        t = self.step
        self.average = self.momentum * self.average + flat_gradient
        if t % self.statistics == 0:
            pairs = zip(self.fisher, self.second_moments(flat_gradient), strict=True)
            self.fisher = [self.beta * old + (1 - self.beta) * new for old, new in pairs]
        dense = self.dense_start and t <= self.refresh and t % self.statistics == 0
        if dense or t % self.refresh == 0:
            self.refreshed.append(t)
            self.inverse = [
                torch.linalg.inv(one + self.damping * torch.eye(len(one), dtype=F64)) for one in self.fisher
            ]
        direction = torch.zeros_like(flat_gradient)
        for block, inverse in zip(self.blocks, self.inverse, strict=True):
            direction[block] = inverse @ self.average[block]
        self.step += 1
        return (1 - self.lr * self.decay) * flat_weight - self.lr * direction


def linear_blocks(name, outputs, inputs):
    """(blocks, tied) of [W, b] with ``inputs`` columns in all, as positions in row-major order."""
    grid = torch.arange(outputs * inputs).view(outputs, inputs)
    return {
        "output-averaged": (list(grid), True),
        "input-averaged": (list(grid.T), True),
        "output": (list(grid), False),
        "input": (list(grid.T), False),
        "row-major": (list(grid.flatten().view(inputs, outputs)), True),
    }[name]


class AuthorsDiagonal:
    """The rule of biases and norms: v of the EMA gradient, the EMA itself not debiased."""

    def __init__(self, *, lr, momentum, decay):
        self.lr, self.momentum, self.decay = lr, momentum, decay
        self.average, self.second, self.step = 0.0, 0.0, 0

    def update(self, weight, gradient):
        self.step += 1
        self.average = self.momentum * self.average + (1 - self.momentum) * gradient
        self.second = 0.999 * self.second + 0.001 * self.average**2
        unbiased = self.second / (1 - 0.999**self.step)
        return (1 - self.lr * self.decay) * weight - self.lr * self.average / (1e-8 + unbiased.sqrt())
