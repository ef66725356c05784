"""A plain loop: KFAC with labels drawn from the model, which need one line more than Adam."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import curvlib


def main(epochs: int = 3) -> tuple[list[float], curvlib.CurvatureOptimizer]:
    """Train a small network on handwritten digits; returns the losses and the optimizer."""
    torch.manual_seed(0)
    digits = load_digits()
    inputs, labels = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    optimizer = curvlib.KFAC(model, lr=0.1, labels="sampled")

    losses = []
    for _ in range(epochs):
        for batch in torch.randperm(len(labels)).split(128):
            optimizer.zero_grad()
            outputs = model(inputs[batch])
            optimizer.observe(outputs, likelihood="categorical")
            loss = F.cross_entropy(outputs, labels[batch])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses, optimizer


if __name__ == "__main__":
    losses, optimizer = main()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    print(optimizer.health())
