"""Models of the problems, as their papers and authors' code have them."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from einops import einsum, rearrange
from einops.layers.torch import Rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ..data import Data


def autoencoder(*widths: int) -> nn.Sequential:
    """Linear layers with ReLU between them, but for the code (the narrowest layer) and the output, which are linear."""
    layers: list[nn.Module] = []
    code = min(widths)
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        if outputs == code:
            layers.pop()
    return nn.Sequential(*layers[:-1])


def small_cnn(side: int = 8, hidden: int | None = None) -> nn.Sequential:
    """Two 3×3 convolutions with 16 and 32 channels, each followed by ReLU and pooling, and one or two linear layers."""
    features = 32 * (side // 4) ** 2
    head = [nn.Linear(features, 10)] if hidden is None else _perceptron(features, hidden, 10)
    return nn.Sequential(
        Rearrange("n (y x) -> n 1 y x", y=side),
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        *head,
    )


def _perceptron(*widths: int) -> list[nn.Module]:
    layers: list[nn.Module] = [module for pair in pairwise(widths) for module in (nn.Linear(*pair), nn.ReLU())]
    return layers[:-1]


class _Residual(nn.Module):
    """Two 3×3 convolutions beside a shortcut without parameters: every second pixel, and channels of zeros (option A)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.stride = outputs // inputs
        self.first = nn.Conv2d(inputs, outputs, 3, self.stride, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(outputs)

    def forward(self, images: Tensor) -> Tensor:
        inner = F.relu(self.first_norm(self.first(images)))
        inner = self.second_norm(self.second(inner))
        missing = inner.shape[1] - images.shape[1]
        shortcut = images[:, :, :: self.stride, :: self.stride]
        return F.relu(inner + F.pad(shortcut, (0, 0, 0, 0, missing // 2, missing - missing // 2)))


def resnet32(classes: int = 10) -> nn.Sequential:
    """ResNet-32 for images of 32×32 (He et al. 2016, §4.2): three stages of five blocks, 16, 32 and 64 channels."""
    widths = [16] * 6 + [32] * 5 + [64] * 5
    blocks = [_Residual(*pair) for pair in pairwise(widths)]
    stem = (nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    return _normal(nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes)))


_VGG = {
    11: (64, 0, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0),
    16: (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0),
}


def vgg(depth: int, classes: int, norm: bool) -> nn.Sequential:
    """VGG for images of 32×32 (Simonyan & Zisserman 2015), as the MBF authors have it: 512-4096-4096, no dropout."""
    layers: list[nn.Module] = []
    channels = 3
    for width in _VGG[depth]:
        if width == 0:
            layers.append(nn.MaxPool2d(2))
            continue
        layers.append(nn.Conv2d(channels, width, 3, padding=1))
        layers += [nn.BatchNorm2d(width)] if norm else []
        layers.append(nn.ReLU())
        channels = width
    return _normal(nn.Sequential(*layers, nn.Flatten(), *_perceptron(512, 4096, 4096, classes)))


def _normal(model: nn.Sequential) -> nn.Sequential:
    """The authors' initialisation: kernels N(0, 2 / (k² outputs)), their biases zero, the rest torch's own."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, 0, math.sqrt(2 / (module.kernel_size[0] ** 2 * module.out_channels)))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


class GCN(nn.Module):
    """Two graph convolutions, H' = (Â H) Wᵀ + c (Kipf & Welling 2017): 16 hidden units, ReLU, dropout 0.5.

    A graph is one example, and its nodes are positions: linear layers see what their neighbours sent.

    Args:
        data: its ``extra`` has ``features [nodes, words]`` and the sparse ``adjacency`` Â.
        classes: of nodes.
        hidden: units.
    """

    features: Tensor
    adjacency: Tensor

    def __init__(self, data: Data, classes: int, hidden: int = 16) -> None:
        super().__init__()
        self.register_buffer("features", data.extra["features"].to_sparse(), persistent=False)
        self.register_buffer("adjacency", data.extra["adjacency"], persistent=False)
        self.first = nn.Linear(self.features.shape[1], hidden)
        self.second = nn.Linear(hidden, classes)
        self.dropout = nn.Dropout(0.5)
        for layer in (self.first, self.second):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, nodes: Tensor) -> Tensor:
        """Logits ``[1, n, classes]`` of some nodes ``[1, n]``."""
        words = self.features
        kept = torch.sparse_coo_tensor(  # dropout leaves zeros zero, and most of them are
            words.indices(), self.dropout(words.values()), words.shape, check_invariants=False, is_coalesced=True
        )
        hidden = F.relu(self.first((self.adjacency @ kept.to_dense())[None]))
        return self.second((self.adjacency @ self.dropout(hidden[0]))[nodes])


class GPT(nn.Module):
    """A transformer over characters (Radford et al. 2019, in the sizes of Karpathy's nanoGPT).

    Args:
        letters: size of the alphabet.
        length: of the context.
        width: of the residual stream.
        depth: blocks.
        heads: of attention.
        dropout: share.
    """

    def __init__(self, letters: int, length: int, width: int, depth: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.letters = nn.Embedding(letters, width)
        self.positions = nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(_Block(width, heads, dropout) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, letters, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, 0, 0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, text: Tensor) -> Tensor:
        """Logits ``[n, length, letters]`` of what follows the characters ``[n, length]``."""
        places = torch.arange(text.shape[1], device=text.device).expand_as(text)
        return self.head(self.norm(self.blocks(self.letters(text) + self.positions(places))))


class _Block(nn.Module):
    """Attention to what came before, and a perceptron, each beside the residual stream."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.scale = heads, math.sqrt(width // heads)
        self.attention_norm = nn.LayerNorm(width)
        self.triple = nn.Linear(width, 3 * width)
        self.joined = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        inner = (nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(dropout))
        self.perceptron = nn.Sequential(nn.LayerNorm(width), *inner)

    def forward(self, stream: Tensor) -> Tensor:
        triple = self.triple(self.attention_norm(stream))
        query, key, value = rearrange(triple, "n t (three h d) -> three n h t d", three=3, h=self.heads)
        # Written out, since fused attention has no second derivative, which Hessian products need.
        scores = einsum(query, key, "n h t d, n h s d -> n h t s") / self.scale
        future = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1)
        weights = self.dropout(scores.masked_fill(future, -torch.inf).softmax(-1))
        seen = einsum(weights, value, "n h t s, n h s d -> n h t d")
        stream = stream + self.dropout(self.joined(rearrange(seen, "n h t d -> n t (h d)")))
        return stream + self.perceptron(stream)
