"""Data sets: from a package, from files in a folder, or downloaded from the official source with verified checksums."""

from __future__ import annotations

import gzip
import hashlib
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_MNIST = "https://ossci-datasets.s3.amazonaws.com/mnist/"
_MNIST_SHA256 = {
    "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
}
# Of the unpacked files: whoever packed them, these are the images. Fashion-MNIST has the same names and shapes.
_MNIST_UNPACKED_SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
_IDX_UBYTE = 0x08


class DataError(RuntimeError):
    """Data that are missing, damaged or not what they should be; says which file, and the way out."""


@dataclass(frozen=True)
class Split:
    """Examples of one split: ``inputs [n, ...]`` float32 and ``labels [n]`` int64."""

    inputs: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return self.inputs.shape[0]


@dataclass(frozen=True)
class Data:
    """A data set."""

    train: Split
    test: Split
    note: str = ""


def digits(_: Path | None = None) -> Data:
    """The 1,797 handwritten digits (8×8, 16 grey levels) that come with scikit-learn, scaled to [0, 1].

    Every fifth example is held out.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    inputs = torch.from_numpy(bunch.data).float() / 16
    labels = torch.from_numpy(bunch.target).long()
    held = torch.arange(len(inputs)) % 5 == 0
    return Data(Split(inputs[~held], labels[~held]), Split(inputs[held], labels[held]))


def mnist(folder: Path | None = None) -> Data:
    """MNIST, 60,000 and 10,000 images of 28×28, scaled to [0, 1], as ``[n, 784]``.

    Args:
        folder: where the four IDX files lie, packed or not, or a folder of which they lie in ``raw`` or ``MNIST/raw``.
            Without it they are downloaded to a cache, and their checksums verified.

    Raises:
        DataError: naming the file, what is wrong and the way out.
    """
    splits = []
    for prefix, count in (("train", 60000), ("t10k", 10000)):
        images = _official(folder, f"{prefix}-images-idx3-ubyte", (count, 28, 28))
        labels = _official(folder, f"{prefix}-labels-idx1-ubyte", (count,))
        splits.append(Split(images.reshape(count, 784).float() / 255, labels.long()))
    return Data(splits[0], splits[1])


def _official(folder: Path | None, name: str, shape: tuple[int, ...]) -> Tensor:
    return read_idx(_find(folder, f"{name}.gz"), shape, _MNIST_UNPACKED_SHA256[name])


def _find(folder: Path | None, name: str) -> Path:
    if folder is None:
        return _download(name)
    for place in (folder, folder / "raw", folder / "MNIST" / "raw"):
        for file in (place / name, place / name.removesuffix(".gz")):
            if file.is_file():
                return file
    raise DataError(f"{name} is not in {folder}, {folder}/raw or {folder}/MNIST/raw; leave out --data to download it")


def _download(name: str) -> Path:
    import pooch

    cache = Path(os.environ.get("CURVLIB_CACHE", pooch.os_cache("curvlib"))) / "mnist"
    try:
        file = pooch.retrieve(
            _MNIST + name, known_hash=f"sha256:{_MNIST_SHA256[name]}", fname=name, path=cache, progressbar=False
        )
    except (OSError, ValueError) as error:
        raise DataError(
            f"could not download {name} from {_MNIST}: {str(error).splitlines()[0]}; "
            "with --data DIR (or CURVLIB_DATA) it is read from a folder"
        ) from None
    return Path(file)


def read_idx(file: Path, shape: tuple[int, ...], sha256: str | None = None) -> Tensor:
    """An IDX file of unsigned bytes, packed with gzip or not.

    Args:
        file: the file.
        shape: what it must hold.
        sha256: of its unpacked contents, where they are known.

    Raises:
        DataError: where it holds something else, or is damaged.
    """
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file} cannot be read: {error}; fetch it again, or leave out --data to download it") from None
    header = 4 + 4 * len(shape)
    if len(content) < header or content[:4] != bytes([0, 0, _IDX_UBYTE, len(shape)]):
        raise DataError(f"{file} is no IDX file of unsigned bytes with {len(shape)} dimensions")
    found = struct.unpack(f">{len(shape)}I", content[4:header])
    if found != shape:
        raise DataError(f"{file} holds {list(found)}, expected {list(shape)}")
    expected = header + int(np.prod(shape))
    if len(content) != expected:
        raise DataError(f"{file} has {len(content)} bytes, expected {expected}; it is truncated or damaged")
    if sha256 is not None and (actual := hashlib.sha256(content).hexdigest()) != sha256:
        raise DataError(
            f"{file} is damaged or of another data set: unpacked it has sha256 {actual}, expected {sha256}; "
            "fetch it again, or leave out --data to download it"
        )
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy())
