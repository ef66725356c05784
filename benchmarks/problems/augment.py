"""Augmentation of batches of images ``[n, 3, y, x]``, normalised by ``(mean, deviation)`` of their colours."""

from __future__ import annotations

from collections.abc import Callable

import torch
from einops import reduce
from torch import Tensor
from torch.nn import functional as F

Statistics = tuple[tuple[float, float, float], tuple[float, float, float]]
Augmentation = Callable[[Tensor, torch.Generator], Tensor]


def crops_and_flips(statistics: Statistics) -> Augmentation:
    """As for CIFAR: a border of 4, crops, half of them mirrored."""
    return lambda images, generator: flips(shifts(images, generator, 4, statistics), generator)


def crops_and_colours(statistics: Statistics) -> Augmentation:
    """As the MBF authors have it for SVHN: a border of 2, crops, other brightness, contrast and saturation."""
    return lambda images, generator: colours(shifts(images, generator, 2, statistics), generator, statistics)


def shifts(images: Tensor, generator: torch.Generator, pad: int, statistics: Statistics) -> Tensor:
    """Random crops of images with a black border of ``pad`` pixels."""
    mean, deviation = _of(statistics, images)
    black = -mean / deviation
    padded = F.pad(images - black, (pad, pad, pad, pad)) + black
    count, _, height, width = images.shape
    down, right = torch.randint(0, 2 * pad + 1, (2, count, 1), generator=generator).to(images.device)
    rows = down + torch.arange(height, device=images.device)
    columns = right + torch.arange(width, device=images.device)
    number = torch.arange(count, device=images.device)[:, None, None]
    return padded[number, :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


def flips(images: Tensor, generator: torch.Generator) -> Tensor:
    """Half of the images mirrored, left and right."""
    chosen = torch.rand(len(images), 1, 1, 1, generator=generator).to(images.device) < 0.5
    return torch.where(chosen, images.flip(-1), images)


def colours(images: Tensor, generator: torch.Generator, statistics: Statistics) -> Tensor:
    """Brightness by 1 ± 63/255, contrast by 0.2 to 1.8, saturation by 0.5 to 1.5, drawn for every image."""
    mean, deviation = _of(statistics, images)
    drawn = torch.rand(3, len(images), 1, 1, 1, generator=generator).to(images.device)
    spread = drawn.new_tensor([63 / 255, 0.8, 0.5])[:, None, None, None, None]
    brightness, contrast, saturation = 1 + (2 * drawn - 1) * spread
    pixels = ((images * deviation + mean) * brightness).clamp(0, 1)
    pixels = (contrast * pixels + (1 - contrast) * reduce(_grey(pixels), "n 1 y x -> n 1 1 1", "mean")).clamp(0, 1)
    pixels = (saturation * pixels + (1 - saturation) * _grey(pixels)).clamp(0, 1)
    return (pixels - mean) / deviation


def _grey(pixels: Tensor) -> Tensor:
    weights = pixels.new_tensor([0.299, 0.587, 0.114])[:, None, None]
    return (pixels * weights).sum(1, keepdim=True)


def _of(statistics: Statistics, images: Tensor) -> tuple[Tensor, Tensor]:
    mean, deviation = (images.new_tensor(values)[:, None, None] for values in statistics)
    return mean, deviation
