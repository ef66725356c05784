"""Colour images of 32×32: CIFAR-10, CIFAR-100, SVHN."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from .base import Data, DataError, Split
from .formats import matlab, unpickled
from .sources import File, checksum, maybe, read_bytes


@dataclass(frozen=True)
class Archive:
    """A set of batches that are published as one archive.

    Args:
        file: the archive.
        inner: the folder in it.
        batches: the name of each batch -> its checksum, and how many images it has; the last one is held out.
        labels: what a batch calls its labels.
        classes: how many there are.
    """

    file: File
    inner: str
    batches: Mapping[str, tuple[str, int]]
    labels: str
    classes: int


_KRIZHEVSKY = "https://www.cs.toronto.edu/~kriz/"
_CIFAR10 = Archive(
    File("cifar-10-python.tar.gz", _KRIZHEVSKY, "md5:c58f30108f718f92721af3b95e74349a"),
    "cifar-10-batches-py",
    {
        "data_batch_1": ("md5:c99cafc152244af753f735de768cd75f", 10000),
        "data_batch_2": ("md5:d4bba439e000b95fd0a9bffe97cbabec", 10000),
        "data_batch_3": ("md5:54ebc095f3ab1f0389bbae665268c751", 10000),
        "data_batch_4": ("md5:634d18415352ddfa80567beed471001a", 10000),
        "data_batch_5": ("md5:482c414d41f54cd18b22e5b47cb7c3cb", 10000),
        "test_batch": ("md5:40351d587109b95175f43aff81a1287e", 10000),
    },
    "labels",
    10,
)
_CIFAR100 = Archive(
    File("cifar-100-python.tar.gz", _KRIZHEVSKY, "md5:eb9058c3a382ffc7106e4002c42a8d85"),
    "cifar-100-python",
    {
        "train": ("md5:16019d7e3df5f24257cddd939b257f8d", 50000),
        "test": ("md5:f0ef6b0ae62326f3e7ffdfab6717acfc", 10000),
    },
    "fine_labels",
    100,
)
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
            JPEG; the note of the data says so) lie, or where they lie in ``cifar10``; or the unpacked folder itself. Without
            it they are downloaded. Unpacked batches that are not the official ones are told in the note of the data.

    Raises:
        DataError: naming the file, what is wrong and the way out.
    """
    jpeg, packed = (maybe(folder, [name], ["cifar10", "."]) for name in ("cifar10_jpeg.npz", _CIFAR10.file.name))
    if jpeg is not None and packed is None and _unpacked(folder, _CIFAR10, "cifar10") is None:
        return _jpeg(jpeg)
    return _archived(folder, _CIFAR10, "cifar10")


def cifar100(folder: Path | None = None) -> Data:
    """CIFAR-100 (Krizhevsky 2009), its 100 fine classes; files as of :func:`cifar10`, but for JPEG."""
    return _archived(folder, _CIFAR100, "cifar100")


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


def _archived(folder: Path | None, archive: Archive, name: str) -> Data:
    """The images of an archive, packed or not."""
    unpacked = _unpacked(folder, archive, name)
    if unpacked is not None:
        contents = {batch: (read_bytes(unpacked / batch), unpacked / batch) for batch in archive.batches}
    else:
        contents = _members(folder, archive, name)
    odd = [batch for batch, (known, _) in archive.batches.items() if checksum(contents[batch][0], "md5") != known]
    note = f"{name} from batches that are not the official files: {', '.join(odd)}." if odd else ""
    rows = [_rows(*contents[batch], archive, count) for batch, (_, count) in archive.batches.items()]
    pixels, labels = (torch.cat(both) for both in zip(*rows[:-1], strict=True))
    return _data(name, (pixels, labels), rows[-1], archive.classes, note)


def _unpacked(folder: Path | None, archive: Archive, name: str) -> Path | None:
    """The folder of the unpacked batches: in one of some places, or the given one itself."""
    first = next(iter(archive.batches))
    places = [f"{place}/{archive.inner}" for place in (name, name.upper(), ".")]
    if folder is not None and folder.name == archive.inner:
        places.append(".")
    found = maybe(folder, [first], places)
    return None if found is None else found.parent


def _members(folder: Path | None, archive: Archive, name: str) -> dict[str, tuple[bytes, Path]]:
    """The batches of the packed archive, with its path."""
    places = (name, name.upper(), ".")
    path = archive.file.find(folder, places) if folder is not None else archive.file.download(name)
    content = archive.file.verified(read_bytes(path), path)
    found = {}
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as opened:
        for batch in archive.batches:
            member = opened.extractfile(f"{archive.inner}/{batch}")
            assert member is not None
            found[batch] = member.read(), path
    return found


def _rows(content: bytes, path: Path, archive: Archive, count: int) -> tuple[Tensor, Tensor]:
    batch = unpickled(content, path)
    held = batch if isinstance(batch, Mapping) else {}
    pixels, labels = (np.asarray(held.get(part, ())) for part in ("data", archive.labels))
    if (pixels.shape, pixels.dtype, labels.shape, labels.dtype.kind) != ((count, 3072), np.uint8, (count,), "i"):
        raise DataError(
            f"{path} holds data {list(pixels.shape)} of {pixels.dtype} and {archive.labels} {list(labels.shape)} of "
            f"{labels.dtype}, expected [{count}, 3072] of uint8 and [{count}] of int64; fetch it again"
        )
    return torch.from_numpy(pixels.reshape(-1, 3, 32, 32)), torch.from_numpy(labels).long()


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
            if (len(offsets), len(labels)) != (count + 1, count):
                raise ValueError(f"{name} has {len(offsets)} offsets and {len(labels)} labels for {count} images")
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
