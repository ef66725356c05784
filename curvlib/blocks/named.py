"""The partitions that papers use, by name. A partition is a text; these are only its best-known ones."""

from __future__ import annotations

DIAGONAL = "... |"
"""Every entry is its own block: Adam, AdaGrad, RMSprop."""

KERNELS = "o i | k..."
"""One block per kernel, that is per (output, input) channel: MBF on convolutions."""

PER_OUTPUT = "o | ..."
"""One block per output neuron: MBF on linear layers."""

PER_INPUT = "i k... | o"
"""One block per input, holding its weights to all outputs: MBF on linear layers, the other orientation."""

KRONECKER = "| o, i k..."
"""One Kronecker product a layer: KFAC; Shampoo with kernels merged into the inputs."""

MODES = "| ,..."
"""One factor for every axis: Shampoo, TNT."""

BLOCKED_KRONECKER = "| ,.../1024"
"""One factor for every axis, axes cut in balanced pieces of at most 1024: blocked Shampoo."""

FULL_LAYER = "| ..."
"""The dense block of a layer: full-layer natural gradient, full-matrix AdaGrad."""
