"""Data-parallel training: statistics are reduced, and a refresh is shared out over the ranks.

With R ranks, each of which has its share of a batch and the same parameters (DistributedDataParallel averages gradients):

* what layers said is averaged over all examples, in one ``all_reduce`` for every dtype, of as many numbers as the statistics
  have, and one more for each;
* the matrices of a refresh stand in a row, each as long as its n³, and rank r solves those whose middle lies in the r-th of R
  equal stretches; then all roots travel in one ``all_gather``, of R times the largest share: n² + 2 numbers for every root,
  and n more for a basis.

All ranks compute every step from the same numbers, so that their parameters stay equal to the last bit. Methods on gradients
need only the second. Where layers may be called on some ranks only, as experts are, the numbers of examples that each saw are
added up first, 8 bytes for every weight that is heard; a rank that did not call a layer adds nothing to its statistics.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor

from . import roots
from .interrupts import unbroken
from .roots import RootJob


@dataclass
class Exchange:
    """The ranks of one group, and what was sent between them.

    Attributes:
        group: of torch.distributed; every rank of it takes the same steps.
        sent: bytes by purpose, ``"statistics"`` and ``"roots"``, of this rank's share of each collective.
        uneven: whether a layer may be called on some ranks only; then ranks tell one another how many examples it saw.
    """

    group: dist.ProcessGroup
    sent: dict[str, int] = field(default_factory=dict)
    uneven: bool = True

    @property
    def rank(self) -> int:
        """This one's number."""
        return dist.get_rank(self.group)

    @property
    def size(self) -> int:
        """How many there are."""
        return dist.get_world_size(self.group)

    def _count(self, purpose: str, value: Tensor) -> None:
        self.sent[purpose] = self.sent.get(purpose, 0) + value.numel() * value.element_size()

    def sum(self, values: Sequence[Tensor]) -> list[Tensor]:
        """The sums over ranks, one collective for every dtype and device."""
        result: list[Tensor] = list(values)
        for places in _alike(values).values():
            flat = torch.cat([values[place].flatten() for place in places])
            dist.all_reduce(flat, group=self.group)
            self._count("statistics", flat)
            for place, part in zip(places, flat.split([values[place].numel() for place in places]), strict=True):
                result[place] = part.view(values[place].shape)
        return result

    def mean(self, values: Sequence[tuple[Tensor, float | Tensor]]) -> list[Tensor]:
        """The means over ranks of (value, weight)."""
        weights = [torch.as_tensor(weight, dtype=value.dtype, device=value.device) for value, weight in values]
        totals = self.sum(
            [
                *(value * weight for (value, _), weight in zip(values, weights, strict=True)),
                *(w.view(1) for w in weights),
            ]
        )
        sums, shares = totals[: len(values)], totals[len(values) :]
        return [one / share.clamp_min(torch.finfo(share.dtype).tiny) for one, share in zip(sums, shares, strict=True)]

    def refresh(self, jobs: Iterable[RootJob]) -> None:
        """Solve this rank's share of all jobs, and put in what the others have solved."""
        shares = shared_out(list(jobs), self.size)
        # What lives in a basis moves from copies on every rank, so that no rank rounds otherwise.
        old = {id(job): job.root.clone() for share in shares for job in share if job.moved is not None}
        roots.refresh(replace(job, moved=None) for job in shares[self.rank])
        for device, dtype in sorted({_home(job) for share in shares for job in share}, key=str):
            mine = [[job for job in share if _home(job) == (device, dtype)] for share in shares]
            longest = max(sum(_numbers(job) for job in share) for share in mine)
            packed = torch.zeros(longest, dtype=dtype, device=device)
            own = [part.flatten().to(dtype) for job in mine[self.rank] for part in _parts(job)]
            if own:
                flat = torch.cat(own)
                packed[: flat.numel()] = flat
            gathered = torch.empty(self.size * longest, dtype=dtype, device=device)
            dist.all_gather_into_tensor(gathered, packed, group=self.group)
            self._count("roots", packed)
            with unbroken:
                for share, flat in zip(mine, gathered.split(longest), strict=True):
                    _unpack(share, flat, old)


def shared_out(jobs: Sequence[RootJob], ranks: int) -> list[list[RootJob]]:
    """For every rank the rows of all jobs that it solves: consecutive ones, about equal shares of Σ n³."""
    shares: list[list[RootJob]] = [[] for _ in range(ranks)]
    total = max(1, sum(job.factor.shape[0] * job.factor.shape[-1] ** 3 for job in jobs))
    before = 0
    for job in jobs:
        each = job.factor.shape[-1] ** 3
        owners = [(2 * (before + each * row) + each) * ranks // (2 * total) for row in range(job.factor.shape[0])]
        first = 0
        for rank in range(ranks):
            last = first + owners.count(rank)
            if last > first:
                shares[rank].append(job.rows(first, last))
            first = last
        before += each * job.factor.shape[0]
    return shares


def _home(job: RootJob) -> tuple[torch.device, torch.dtype]:
    return job.root.device, job.root.dtype


def _parts(job: RootJob) -> list[Tensor]:
    """What travels of a job: roots, residuals, counts, and the eigenvalues of a basis."""
    return [job.root, job.residual, job.kept, *([] if job.values is None else [job.values])]


def _numbers(job: RootJob) -> int:
    return sum(part.numel() for part in _parts(job))


def _unpack(jobs: Sequence[RootJob], flat: Tensor, old: Mapping[int, Tensor]) -> None:
    first = 0
    for job in jobs:
        for part in _parts(job):
            new = flat[first : (first := first + part.numel())].view(part.shape)
            if part is job.root and job.moved is not None:
                job.moved(job.first, old[id(job)], new.clone())
            part.copy_(new)


def _alike(values: Sequence[Tensor]) -> Mapping[tuple[torch.dtype, torch.device], list[int]]:
    places: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for place, value in enumerate(values):
        places.setdefault((value.dtype, value.device), []).append(place)
    return places
