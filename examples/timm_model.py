"""timm: a small vision transformer under KFAC, by timm's own names and parameter groups."""

from __future__ import annotations

import timm
import torch
from sklearn.datasets import load_digits
from timm.optim import create_optimizer_v2
from torch.nn import functional as F

import curvlib


def main(steps: int = 20) -> tuple[list[float], curvlib.CurvatureOptimizer]:
    """Train on handwritten digits; returns the losses and the optimizer."""
    torch.manual_seed(0)
    digits = load_digits()
    images, labels = torch.tensor(digits.images[:, None] / 16, dtype=torch.float32), torch.tensor(digits.target)
    model = timm.create_model("test_vit", img_size=8, patch_size=4, in_chans=1, num_classes=10)

    curvlib.trainers.register_timm()
    # timm makes the groups and keeps the model to itself; model= gives KFAC the layers to listen to.
    optimizer = create_optimizer_v2(model, "curvlib-kfac", lr=0.1, weight_decay=0.05, model=model)

    losses = []
    for _ in range(steps):
        batch = torch.randint(len(labels), (128,))
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, optimizer


if __name__ == "__main__":
    losses, optimizer = main()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    print(optimizer.health())
