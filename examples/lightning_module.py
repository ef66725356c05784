"""Lightning: KFAC in automatic optimization, with gradients accumulated over two batches."""

from __future__ import annotations

import lightning
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import curvlib


class Classifier(lightning.LightningModule):
    """A small network for handwritten digits."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
        self.losses: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """With labels="sampled", this is where ``self.optimizers().observe(outputs, "categorical")`` belongs."""
        inputs, labels = batch
        loss = F.cross_entropy(self.net(inputs), labels)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        """Nothing is heard here, nor in the sanity check before training."""
        inputs, labels = batch
        self.log("validation", F.cross_entropy(self.net(inputs), labels))

    def configure_optimizers(self) -> curvlib.CurvatureOptimizer:
        """Give the optimizer the module, so that it can listen."""
        return curvlib.KFAC(self, lr=0.1)


def main(epochs: int = 4) -> tuple[list[float], curvlib.CurvatureOptimizer]:
    """Train on handwritten digits; returns the losses of all batches and the optimizer."""
    lightning.seed_everything(0, verbose=False)
    digits = load_digits()
    data = TensorDataset(torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target))
    module = Classifier()
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accumulate_grad_batches=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(data, 64, shuffle=True, drop_last=True), DataLoader(data, 256))
    return module.losses, trainer.optimizers[0]


if __name__ == "__main__":
    losses, optimizer = main()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    print(optimizer.health())
