"""Processes of one group: gloo on CPUs, and the same with NCCL where every rank has a GPU of its own."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

GROUPS = [
    pytest.param(
        (ranks, device),
        id=f"{ranks} ranks, {device}",
        marks=pytest.mark.skipif(
            device == "cuda" and torch.cuda.device_count() < ranks, reason=f"NCCL needs {ranks} GPUs"
        ),
    )
    for device in ("cpu", "cuda")
    for ranks in (2, 4)
]


class Home:
    """Where this process computes; models and data are made on the CPU, the same everywhere, and brought there."""

    device = torch.device("cpu")


def home(thing):
    """A module or a tensor at home."""
    return thing.to(Home.device)


def worker(rank, ranks, device, folder, job):
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
        Home.device = torch.device("cuda", rank)
    meeting = f"file://{folder}/{job.__name__}-{ranks}"
    dist.init_process_group("nccl" if device == "cuda" else "gloo", init_method=meeting, rank=rank, world_size=ranks)
    torch.save(job(rank, ranks, folder), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def run(job, ranks, folder, device="cpu"):
    """What job(rank, ranks, folder) returns on every rank, on the CPU."""
    mp.spawn(worker, (ranks, device, str(folder), job), nprocs=ranks)
    return [torch.load(f"{folder}/{rank}.pt", map_location="cpu") for rank in range(ranks)]
