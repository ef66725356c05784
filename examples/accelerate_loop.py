"""accelerate: MBF of single examples, with gradients accumulated over two batches."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import curvlib


def main(epochs: int = 4) -> tuple[list[float], curvlib.CurvatureOptimizer]:
    """Train a small network on handwritten digits; returns the losses of all batches and the optimizer."""
    torch.manual_seed(0)
    digits = load_digits()
    data = TensorDataset(torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target))
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, loader = accelerator.prepare(
        nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)),
        DataLoader(data, 64, shuffle=True, drop_last=True),
    )
    # Made from the prepared model, the optimizer knows the other processes, where there are any.
    optimizer = accelerator.prepare(curvlib.MBF(model, lr=1e-2, of="samples"))

    losses = []
    for _ in range(epochs):
        for inputs, labels in loader:
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(inputs), labels)
                accelerator.backward(loss)  # of the loss divided by two: reduction stays "mean"
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
    return losses, optimizer.optimizer


if __name__ == "__main__":
    losses, optimizer = main()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    print(optimizer.health())
