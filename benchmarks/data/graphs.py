"""Citation graphs with the Planetoid splits (Yang, Cohen & Salakhutdinov 2016): Cora, CiteSeer, Pubmed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .base import Data, DataError, Split
from .formats import unpickled
from .sources import File

_URL = "https://github.com/kimiyoung/planetoid/raw/master/data/"
_VALIDATION = 500
_CHECKSUMS = {
    "cora": {
        "x": "sha256:23cfa55d91c6f624233f5eb7b6e3f141f1bd2b2ae39608a63cf5d084bb27baab",
        "tx": "sha256:b9afbaa4a400df991f6f02ef677e1e44da55ffc04801fd02f9e673987829226a",
        "allx": "sha256:9419ba2f26f5c35243db64aba110e0f35a04851609e0dc5433450676ca6b8543",
        "y": "sha256:94465c14eb53e04ca262198dcbb2521ee8af60fb3f3d546cd6ca24a511b0e7d1",
        "ty": "sha256:41f5ac76596a1699cc33f53084a2419e92961c42bb75f36fc38e616d348532ad",
        "ally": "sha256:2b998f5cc7fedc86e7f97ca2498f47a1ffc1462c29e2d578b23bf3f62b6e7d71",
        "graph": "sha256:58f13302f39dde8852dad6fe6d15b89b077b6d7f837626bce671ef80344b383d",
        "test.index": "sha256:297ce89af2b51a6a194181c7dbe1796c6a1cf9cd9349a88383b1b1e227867875",
    },
    "citeseer": {
        "x": "sha256:d20de19150741e555de0ed037195630fc194114ebc7fd72ced62810148aa22f6",
        "tx": "sha256:539a8906a2da97628d212f2fdd668c109a8b3f0d36574b59e5d3fd5b5303da21",
        "allx": "sha256:2ac30345d95c9ec933a817ee0bdd6a5f077f8c184a20e696910192d534414668",
        "y": "sha256:8ba87e515d8e3ee3cf52f6d2c5b86aa73f11ecad825a808455209ec26cd54924",
        "ty": "sha256:55e5bd1ba1e733a04598753ad1a8d57957f4b8f89e74519f41f4f4938767e4ce",
        "ally": "sha256:f704b2d986dde6c2669934de1f3ae5696a6cf9455c0f6b2646a2d135ea0a1c95",
        "graph": "sha256:d79a4ef9d3e7169aee8946145f6b7306e35bc79bffad26346cfb94e10e9912a7",
        "test.index": "sha256:2af990671580b6b2df5d158d1038f8292e30c9cd821b5453f399659b25b723d4",
    },
    "pubmed": {
        "x": "sha256:fbe9cb5c47200d1b7769a26e579be3b7130b556831f9d850e77c4c74f2599b33",
        "tx": "sha256:4eb5f5d0f30f26497eb0ac6ac9719d09c67e284f1ed0385c93f3ef27a671da3d",
        "allx": "git:3b86bccf08111c37c632a9dd8ab63db25ea76361",
        "y": "sha256:e6c807633307a07ed659249006536a147c7999c797f11a2560752990181b41b3",
        "ty": "sha256:ee2e0d4819d9fbcc403689c3bf2e49face401b605932f093bc58ab6461130fdd",
        "ally": "sha256:0c37bbe3b5014ec365e9d393cf4791925e5ed94fb194305d74f064a8d7b50f0e",
        "graph": "sha256:5b89f0036ca22909471f1e6558eb42fa06e0c730a577bde5b058b40638f81dc9",
        "test.index": "sha256:b101d421688bbaecbd82e8a18f1e282378d6830f3a37666f28ebc47f844341b5",
    },
}


def cora(folder: Path | None = None) -> Data:
    """Cora: 2,708 papers with 1,433 words, 7 classes: 140 labels to train on, 500 to choose settings by, 1,000 held out.

    The graph is one example: inputs ``[1, n]`` are numbers of nodes, labels their classes. ``extra`` has
    ``features [nodes, words]``, every row of sum 1, and ``adjacency``, sparse: D^(-1/2) (A + I) D^(-1/2) with D the degrees
    (Kipf & Welling 2017).

    Args:
        folder: where the files ``ind.cora.*`` lie, or where they lie in ``raw``, ``Cora/raw`` or ``Planetoid/Cora/raw``.
            Without it they are downloaded.

    Raises:
        DataError: naming the file, what is wrong and the way out.
    """
    return _planetoid("cora", "Cora", folder)


def citeseer(folder: Path | None = None) -> Data:
    """CiteSeer: 3,327 papers with 3,703 words, 6 classes, 120 labels to train on; see :func:`cora`."""
    return _planetoid("citeseer", "CiteSeer", folder)


def pubmed(folder: Path | None = None) -> Data:
    """Pubmed: 19,717 papers with 500 words, 3 classes, 60 labels to train on; see :func:`cora`."""
    return _planetoid("pubmed", "PubMed", folder)


def _planetoid(name: str, title: str, folder: Path | None) -> Data:
    places = (f"Planetoid/{title}/raw", f"{title}/raw", "raw", ".", name)
    content = {}
    for part, checksum in _CHECKSUMS[name].items():
        file = File(f"ind.{name}.{part}", _URL, checksum)
        raw = file.read(folder, places)
        content[part] = np.array(raw.split(), np.int64) if part == "test.index" else unpickled(raw, Path(file.name))
    return assembled(content)


def assembled(content: Mapping[str, object]) -> Data:
    """A graph of the eight parts of its files; nodes of the test range that no file describes have no words, and no label.

    Raises:
        DataError: where parts do not fit.
    """
    index, known = np.asarray(content["test.index"]), content["allx"]
    start, count = known.shape[0], len(content["graph"])  # type: ignore[attr-defined, arg-type]
    if index.min() != start or index.max() != count - 1:
        raise DataError(f"test nodes go from {index.min()} to {index.max()}, expected {start} to {count - 1}")
    features = torch.zeros(count, known.shape[1])  # type: ignore[attr-defined]
    features[:start] = torch.from_numpy(known.toarray()).float()  # type: ignore[attr-defined]
    features[torch.from_numpy(index)] = torch.from_numpy(content["tx"].toarray()).float()  # type: ignore[attr-defined]
    labels = torch.zeros(count, dtype=torch.long)
    labels[:start] = torch.from_numpy(np.asarray(content["ally"]).argmax(1))
    labels[torch.from_numpy(index)] = torch.from_numpy(np.asarray(content["ty"]).argmax(1))
    first = len(np.asarray(content["y"]))
    following = torch.arange(first, min(first + _VALIDATION, start))  # which settings are chosen by
    nodes = [torch.arange(first), torch.from_numpy(np.sort(index)), following]
    splits = [Split(one[None], labels[one][None]) for one in nodes]
    features = features / features.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    extra = {"features": features, "adjacency": adjacency(content["graph"], count)}  # type: ignore[arg-type]
    return Data(splits[0], splits[1], extra=extra, validation=splits[2])


def adjacency(graph: Mapping[int, Sequence[int]], count: int) -> Tensor:
    """D^(-1/2) (A + I) D^(-1/2), sparse, of a graph's neighbours."""
    edges = {(node, other) for node, others in graph.items() for other in others if node != other}
    edges |= {(other, node) for node, other in edges} | {(node, node) for node in range(count)}
    places = torch.tensor(sorted(edges)).T
    scale = torch.bincount(places[0], minlength=count).float().rsqrt()
    return torch.sparse_coo_tensor(
        places, scale[places[0]] * scale[places[1]], (count, count), check_invariants=True
    ).coalesce()
