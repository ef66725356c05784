"""Colour images of 32×32: CIFAR-10, CIFAR-100, SVHN."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from .base import Data, DataError, Split
from .formats import matlab, unpickled
from .sources import File, maybe, read_bytes

_KRIZHEVSKY = "https://www.cs.toronto.edu/~kriz/"
_CIFAR10 = File("cifar-10-python.tar.gz", _KRIZHEVSKY, "md5:c58f30108f718f92721af3b95e74349a")
_CIFAR100 = File("cifar-100-python.tar.gz", _KRIZHEVSKY, "md5:eb9058c3a382ffc7106e4002c42a8d85")
_SVHN = (
    File("train_32x32.mat", "http://ufldl.stanford.edu/housenumbers/", "md5:e26dedcc434d2e4c54c9b2d4a06d8373"),
    File("test_32x32.mat", "http://ufldl.stanford.edu/housenumbers/", "md5:eb5a983be6a315427106f1b164d9cef3"),
)
_LOSSY = "CIFAR-10 from images that were once packed as JPEG, quality 75; not comparable with published accuracies."


STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.507, 0.487, 0.441), (0.267, 0.256, 0.276)),
    "svhn": ((0.4376821, 0.4437697, 0.47280442), (0.19803012, 0.20101562, 0.19703614)),
}
"""Mean and standard deviation of the colours, as the MBF authors have them."""


def cifar10(folder: Path | None = None) -> Data:
    """CIFAR-10 (Krizhevsky 2009): 50,000 and 10,000 images ``[n, 3, 32, 32]``, normalised, in 10 classes.

    Args:
        folder: where ``cifar-10-python.tar.gz``, its unpacked ``cifar-10-batches-py``, or ``cifar10_jpeg.npz`` (the images as
            JPEG; the note of the data says so) lie, or where they lie in ``cifar10``. Without it they are downloaded.

    Raises:
        DataError: naming the file, what is wrong and the way out.
    """
    jpeg = maybe(folder, ["cifar10_jpeg.npz"], ["cifar10", "."])
    inner = "cifar-10-batches-py"
    official = maybe(folder, [_CIFAR10.name, f"{inner}/data_batch_1"], ["cifar10", "."])
    if jpeg is not None and official is None:
        return _jpeg(jpeg)
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    batches = _pickled(folder, _CIFAR10, inner, names, "cifar10")
    train = [torch.cat(both) for both in zip(*(_rows(batches[name], "labels") for name in names[:5]), strict=True)]
    return _data("cifar10", (train[0], train[1]), _rows(batches["test_batch"], "labels"), 10)


def cifar100(folder: Path | None = None) -> Data:
    """CIFAR-100 (Krizhevsky 2009), its 100 fine classes; files as of :func:`cifar10`, but for JPEG."""
    batches = _pickled(folder, _CIFAR100, "cifar-100-python", ["train", "test"], "cifar100")
    return _data("cifar100", _rows(batches["train"], "fine_labels"), _rows(batches["test"], "fine_labels"), 100)


def svhn(folder: Path | None = None) -> Data:
    """SVHN (Netzer et al. 2011), cropped digits: 73,257 and 26,032 images ``[n, 3, 32, 32]``, normalised, in 10 classes.

    Args:
        folder: where ``train_32x32.mat`` and ``test_32x32.mat`` lie, or where they lie in ``svhn``.

    Raises:
        DataError: naming the file, what is wrong and the way out.
    """
    splits = []
    for file, count in zip(_SVHN, (73257, 26032), strict=True):
        content, path = file.read(folder, ("SVHN", ".", "svhn")), Path(file.name)
        images = torch.from_numpy(matlab(content, path, "X", (32, 32, 3, count)))
        labels = torch.from_numpy(matlab(content, path, "y", (count, 1))).flatten().long()
        splits.append((rearrange(images, "y x colour n -> n colour y x"), labels % 10))  # ten stands for zero
    return _data("svhn", splits[0], splits[1], 10)


def _pickled(folder: Path | None, file: File, inner: str, names: Sequence[str], place: str) -> dict[str, Any]:
    """The batches of an archive, packed or not, by name."""
    places = (place, place.upper(), ".")
    unpacked = maybe(folder, [f"{inner}/{names[0]}"], places)
    if unpacked is not None:
        return {name: unpickled(read_bytes(unpacked.parent / name), unpacked.parent / name) for name in names}
    path = file.find(folder, places) if folder is not None else file.download(place)
    content = file.verified(read_bytes(path), path)
    found = {}
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as archive:
        for name in names:
            member = archive.extractfile(f"{inner}/{name}")
            assert member is not None
            found[name] = unpickled(member.read(), path)
    return found


def _rows(batch: Mapping[str, Any], labels: str) -> tuple[Tensor, Tensor]:
    pixels = torch.from_numpy(np.asarray(batch["data"], np.uint8).reshape(-1, 3, 32, 32))
    return pixels, torch.tensor(batch[labels])


def _jpeg(path: Path) -> Data:
    from PIL import Image

    try:
        content = np.load(path)
        splits = []
        for name, count in (("train", 50000), ("test", 10000)):
            stream, offsets = content[f"{name}_jpeg"], content[f"{name}_offsets"]
            pixels = np.empty((count, 32, 32, 3), np.uint8)
            for number in range(count):
                one = stream[offsets[number] : offsets[number + 1]].tobytes()
                pixels[number] = np.asarray(Image.open(io.BytesIO(one)))
            labels = torch.from_numpy(content[f"{name}_labels"]).long()
            splits.append((torch.from_numpy(pixels).permute(0, 3, 1, 2), labels))
    except Exception as error:  # a damaged archive may raise anything
        raise DataError(f"{path} cannot be read: {error}; fetch it again, or leave out --data to download") from None
    return _data("cifar10", splits[0], splits[1], 10, _LOSSY)


def _data(name: str, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], classes: int, note: str = "") -> Data:
    mean, deviation = (torch.tensor(values)[:, None, None] for values in STATISTICS[name])
    for _, labels in (train, test):
        if int(labels.min()) < 0 or int(labels.max()) >= classes:
            raise DataError(f"labels of {name} go from {labels.min()} to {labels.max()}, expected 0 to {classes - 1}")
    splits = [Split((pixels.float() / 255 - mean) / deviation, labels) for pixels, labels in (train, test)]
    return Data(splits[0], splits[1], note)
