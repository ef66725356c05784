"""MNIST and Fashion-MNIST: IDX files."""

from __future__ import annotations

import gzip
import hashlib
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .base import Data, DataError, Split
from .sources import File, find

_IDX_UBYTE = 0x08
_MNIST = "https://ossci-datasets.s3.amazonaws.com/mnist/"
_FASHION = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
_ADDRESSES = {"MNIST": _MNIST, "FashionMNIST": _FASHION}
# Beside the sha256 of the packed file, that of what is in it: whoever packed it; names and shapes of both sets are alike.
_SHA256 = {
    "MNIST": {
        "train-images-idx3-ubyte": (
            "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        ),
        "train-labels-idx1-ubyte": (
            "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        ),
        "t10k-images-idx3-ubyte": (
            "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        ),
        "t10k-labels-idx1-ubyte": (
            "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
            "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        ),
    },
    "FashionMNIST": {
        "train-images-idx3-ubyte": (
            "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        ),
        "train-labels-idx1-ubyte": (
            "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        ),
        "t10k-images-idx3-ubyte": (
            "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        ),
        "t10k-labels-idx1-ubyte": (
            "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
            "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        ),
    },
}


def mnist(folder: Path | None = None) -> Data:
    """MNIST, 60,000 and 10,000 images of 28×28, scaled to [0, 1], as ``[n, 784]``.

    Args:
        folder: where the four IDX files lie, packed or not, or a folder of which they lie in ``raw``, ``MNIST`` or
            ``MNIST/raw``. Without it they are downloaded to a cache, and their checksums verified.

    Raises:
        DataError: naming the file, what is wrong and the way out.
    """
    return _load("MNIST", folder)


def fashion(folder: Path | None = None) -> Data:
    """Fashion-MNIST (Xiao, Rasul & Vollgraf 2017): clothes in the format of MNIST; see :func:`mnist`."""
    return _load("FashionMNIST", folder)


def _load(name: str, folder: Path | None) -> Data:
    arrays = []
    shapes = ((60000, 28, 28), (60000,), (10000, 28, 28), (10000,))
    for (inner, (packed, unpacked)), shape in zip(_SHA256[name].items(), shapes, strict=True):
        file = File(f"{inner}.gz", _ADDRESSES[name], f"sha256:{packed}")
        places = (f"{name}/raw", name, "raw", ".")  # a folder of data sets, before this set's own
        path = find(folder, (file.name, inner), places) if folder is not None else file.download(name.lower())
        arrays.append(read_idx(path, shape, unpacked))
    train, train_labels, test, test_labels = arrays
    return Data(_split(train, train_labels), _split(test, test_labels))


def _split(images: Tensor, labels: Tensor) -> Split:
    return Split(images.flatten(1).float() / 255, labels.long())


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
