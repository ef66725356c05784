"""Hugging Face's Trainer: KFAC by a factory, with decay of weights alone and gradients accumulated over two batches."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

import curvlib


class Classifier(nn.Module):
    """A small network for handwritten digits, in the form that the Trainer wants."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 32), nn.LayerNorm(32), nn.Tanh(), nn.Linear(32, 10))

    def forward(self, pixels: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The Trainer divides the loss by the number of batches, so that KFAC's reduction stays "mean"."""
        logits = self.net(pixels)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def main(epochs: int = 4) -> tuple[list[float], curvlib.CurvatureOptimizer]:
    """Train on handwritten digits; returns the losses that the Trainer logged and the optimizer."""
    torch.manual_seed(0)
    digits = load_digits()
    pixels, labels = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    data: Any = [{"pixels": x, "labels": y} for x, y in zip(pixels, labels, strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=64,
            gradient_accumulation_steps=2,
            lr_scheduler_type="linear",
            logging_steps=5,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        method = curvlib.trainers.hf_factory("kfac"), {"lr": 0.1, "weight_decay": 0.01}
        trainer = Trainer(Classifier(), arguments, train_dataset=data, optimizer_cls_and_kwargs=method)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, trainer.optimizer.optimizer


if __name__ == "__main__":
    losses, optimizer = main()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    print(optimizer.health())
