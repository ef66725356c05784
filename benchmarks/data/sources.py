"""Files: found in a folder, or downloaded once from their official source to a cache, their checksums verified."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from .base import DataError


@dataclass(frozen=True)
class File:
    """One file of a data set.

    Args:
        name: its official name.
        url: the folder of its official source, or its whole address where that ends otherwise.
        checksum: ``"sha256:..."``, ``"md5:..."``, or ``"git:..."``, the name of a blob in a repository.
    """

    name: str
    url: str
    checksum: str

    @property
    def address(self) -> str:
        """Where it is downloaded."""
        return self.url + self.name if self.url.endswith("/") else self.url

    def is_official(self, content: bytes) -> bool:
        """Whether this is the content of the official file."""
        return checksum(content, self.checksum.partition(":")[0]) == self.checksum

    def verified(self, content: bytes, path: Path) -> bytes:
        """The content of the file at a path.

        Raises:
            DataError: where it is not the official one.
        """
        if not self.is_official(content):
            actual = checksum(content, self.checksum.partition(":")[0])
            raise DataError(
                f"{path} is damaged or of another data set: its checksum is {actual}, expected {self.checksum}; "
                "fetch it again, or leave out --data to download it"
            )
        return content

    def read(self, folder: Path | None, places: Sequence[str]) -> bytes:
        """Its verified content, from one of some places in a folder, or the cache.

        Raises:
            DataError: where it is not found, cannot be downloaded, cannot be read, or is not the official one.
        """
        path = self.find(folder, places) if folder is not None else self.download(places[-1])
        return self.verified(read_bytes(path), path)

    def find(self, folder: Path, places: Sequence[str]) -> Path:
        """Where it lies in a folder.

        Raises:
            DataError: naming the places that were searched.
        """
        return find(folder, (self.name,), places)

    def download(self, cache: str) -> Path:
        """Where it lies in the cache; ``CURVLIB_CACHE`` moves it.

        Raises:
            DataError: where it cannot be had.
        """
        import pooch

        folder = Path(os.environ.get("CURVLIB_CACHE", pooch.os_cache("curvlib"))) / cache
        if (path := folder / self.name).is_file() and self.is_official(read_bytes(path)):
            return path
        known = None if self.checksum.startswith("git:") else self.checksum
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / ".lock"):
                for left in folder.glob("tmp*"):  # of downloads that were killed, since nobody else is at it now
                    left.unlink()
                pooch.retrieve(
                    self.address, known_hash=known, fname=self.name, path=folder, progressbar=sys.stderr.isatty()
                )
            if known is None and checksum(path.read_bytes(), "git") != self.checksum:
                path.unlink()
                raise ValueError("what came is not the official file")
        except (OSError, ValueError) as error:
            cause = getattr(next(iter(error.args), None), "reason", error)  # below what requests and urllib3 say of it
            reason = (str(cause).splitlines() or [type(cause).__name__])[0]
            raise DataError(
                f"could not download {self.name} from {self.address}: {reason}; "
                "with --data DIR (or CURVLIB_DATA) it is read from a folder"
            ) from None
        return path


def find(folder: Path, names: Sequence[str], places: Sequence[str]) -> Path:
    """The first file that exists, of some names in some places of a folder.

    Raises:
        DataError: naming the first name and the places.
    """
    found = maybe(folder, names, places)
    if found is None:
        where = ", ".join(str(folder / place) for place in places)
        raise DataError(f"{names[0]} is in none of {where}; leave out --data to download it")
    return found


def maybe(folder: Path | None, names: Sequence[str], places: Sequence[str]) -> Path | None:
    """The first file that exists, if any does."""
    if folder is None:
        return None
    candidates = (folder / place / name for place in places for name in names)
    return next((file for file in candidates if file.is_file()), None)


def read_bytes(path: Path) -> bytes:
    """The content of a file.

    Raises:
        DataError: where it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from None


def checksum(content: bytes, kind: str) -> str:
    """A checksum with its kind before it."""
    if kind == "git":
        content, kind = b"blob %d\0" % len(content) + content, "sha1"
        return f"git:{hashlib.new(kind, content, usedforsecurity=False).hexdigest()}"
    return f"{kind}:{hashlib.new(kind, content, usedforsecurity=False).hexdigest()}"
