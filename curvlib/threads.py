"""Batches shared out to threads: on a CPU, LAPACK takes the matrices of a batch one after the other, each on all threads.

A small eigendecomposition keeps one thread busy, not several. So every thread has a run of the batch for itself, which on two
threads takes two thirds to nine tenths of the time; matrices of a thousand rows gain little.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

_LEAST = 1 << 20  # f³ of all matrices that are worth the start of threads, some 0.2 ms
_LARGE = 256  # rows above which a matrix keeps several threads busy, so that runs of unequal length lose what is won


def shared(function: Callable[..., tuple[Tensor, ...]], *batches: Tensor) -> tuple[Tensor, ...]:
    """What a function makes of batches of matrices, run by run of their rows, one after the other or one a thread.

    Args:
        function: from batches to batches, row by row; it neither waits for other threads nor changes anything.
        batches: ``[N, ...]``, the first ``[N, f, f]``.

    Returns:
        What it returns, ``[N, ...]`` each. A row depends on no other, but the library may round otherwise on fewer threads.
    """
    count, size = batches[0].shape[0], batches[0].shape[-1]
    threads = torch.get_num_threads()
    parts = min(count, threads)
    unequal = size > _LARGE and count % parts
    if batches[0].device.type != "cpu" or parts < 2 or count * size**3 < _LEAST or unequal:
        return function(*batches)
    grad = torch.is_grad_enabled()  # which threads do not inherit

    def run(part: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        with torch.set_grad_enabled(grad):
            return function(*part)

    torch.set_num_threads(threads // parts)
    try:
        with ThreadPoolExecutor(parts) as pool:
            runs = list(pool.map(run, zip(*(batch.tensor_split(parts) for batch in batches), strict=True)))
    finally:
        torch.set_num_threads(threads)
    return tuple(torch.cat(some) for some in zip(*runs, strict=True))
