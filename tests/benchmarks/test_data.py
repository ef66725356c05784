"""Data: IDX files read exactly, and every damage named."""

from __future__ import annotations

import gzip
import hashlib
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.data import DataError, digits, mnist, read_idx
from benchmarks.data.sources import File, checksum, find


def idx(array, magic=b"\x00\x00\x08"):
    return magic + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.astype(np.uint8).tobytes()


@pytest.fixture
def images():
    return np.arange(24).reshape(2, 3, 4)


@pytest.mark.parametrize("packed", [False, True])
def test_a_file_is_read_as_it_was_written(tmp_path, images, packed):
    file = tmp_path / ("images-idx3-ubyte" + (".gz" if packed else ""))
    file.write_bytes(gzip.compress(idx(images)) if packed else idx(images))
    assert torch.equal(read_idx(file, (2, 3, 4)), torch.from_numpy(images).to(torch.uint8))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda content: content[:-1], "it is truncated or damaged"),
        (lambda content: content + b"\x00", "it is truncated or damaged"),
        (lambda content: b"\x00\x00\x0d" + content[3:], "is no IDX file of unsigned bytes with 3 dimensions"),
        (lambda content: content[:2], "is no IDX file"),
        (lambda content: content[:4] + struct.pack(">I", 9) + content[8:], "holds [9, 3, 4], expected [2, 3, 4]"),
    ],
)
def test_damage_is_named_with_its_file(tmp_path, images, damage, words):
    file = tmp_path / "images-idx3-ubyte"
    file.write_bytes(damage(idx(images)))
    with pytest.raises(DataError) as caught:
        read_idx(file, (2, 3, 4))
    assert words in str(caught.value)
    assert str(file) in str(caught.value)


def test_a_truncated_archive_says_how_to_go_on(tmp_path, images):
    file = tmp_path / "images-idx3-ubyte.gz"
    file.write_bytes(gzip.compress(idx(images))[:-10])
    with pytest.raises(DataError, match=r"cannot be read.*leave out --data to download"):
        read_idx(file, (2, 3, 4))


def test_a_damaged_archive_is_named(tmp_path):
    file = tmp_path / "labels-idx1-ubyte.gz"
    content = bytearray(gzip.compress(idx(np.random.default_rng(0).integers(0, 10, 5000))))
    content[500:540] = bytes(byte ^ 0xFF for byte in content[500:540])
    file.write_bytes(content)
    with pytest.raises(DataError, match=rf"{file.name} cannot be read"):
        read_idx(file, (5000,))


@pytest.mark.parametrize("packed", [False, True])
def test_contents_of_another_data_set_are_refused(tmp_path, images, packed):
    file = tmp_path / ("images-idx3-ubyte" + (".gz" if packed else ""))
    file.write_bytes(gzip.compress(idx(images)) if packed else idx(images))
    known = hashlib.sha256(idx(images)).hexdigest()
    assert read_idx(file, (2, 3, 4), known).shape == (2, 3, 4)
    with pytest.raises(DataError, match=rf"of another data set: unpacked it has sha256 {known}, expected 00"):
        read_idx(file, (2, 3, 4), "00")


def test_missing_files_name_the_places_that_were_searched(tmp_path):
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz is in none of .*leave out --data"):
        mnist(tmp_path)


@pytest.mark.parametrize("where", [".", "raw", "MNIST", "MNIST/raw"])
def test_files_are_found_where_people_keep_them(tmp_path, where, images):
    folder = tmp_path / where
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train-images-idx3-ubyte").write_bytes(idx(images))
    with pytest.raises(DataError, match=rf"{where}/?train-images-idx3-ubyte holds \[2, 3, 4\]"):
        mnist(tmp_path)


def test_without_a_network_the_message_names_the_way_out(monkeypatch, tmp_path):
    import pooch

    def fail(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(pooch, "retrieve", fail)
    monkeypatch.setenv("CURVLIB_CACHE", str(tmp_path))
    with pytest.raises(DataError, match=r"could not download .*no route to host; with --data DIR"):
        mnist(None)


@pytest.mark.parametrize("kind", ["sha256", "md5", "git"])
def test_downloads_are_verified(monkeypatch, tmp_path, kind):
    import pooch

    content = b"what was published"
    asked = []

    def retrieve(url, known_hash, fname, path, progressbar):
        asked.append((url, known_hash))
        (path / fname).write_bytes(content)
        return str(path / fname)

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    monkeypatch.setenv("CURVLIB_CACHE", str(tmp_path))
    known = checksum(content, kind)
    file = File("a.bin", "https://example.org/set/", known)
    assert file.download("set") == tmp_path / "set" / "a.bin"
    assert asked == [("https://example.org/set/a.bin", None if kind == "git" else known)]
    if kind == "git":  # which pooch does not know
        with pytest.raises(DataError, match=r"could not download other.bin .*not the official file"):
            File("other.bin", "https://example.org/", "git:00").download("set")
        assert not (tmp_path / "set" / "other.bin").exists()
    (tmp_path / "set" / ".lock").unlink()
    (tmp_path / "set").chmod(0o500)  # a cache that others filled
    before = len(asked)
    assert file.download("set").read_bytes() == content
    assert len(asked) == before
    assert not (tmp_path / "set" / ".lock").exists()


def test_what_a_killed_download_left_is_removed(monkeypatch, tmp_path):
    import pooch

    monkeypatch.setattr(pooch, "retrieve", lambda url, known_hash, fname, path, progressbar: (path / fname).touch())
    monkeypatch.setenv("CURVLIB_CACHE", str(tmp_path))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "tmp1a2b3c").write_bytes(b"half of it")
    File("a.bin", "https://example.org/", "sha256:00").download("set")
    assert sorted(file.name for file in (tmp_path / "set").iterdir()) == [".lock", "a.bin"]


def test_a_blob_has_the_name_that_git_gives_it():
    assert checksum(b"what is up, doc?", "git") == "git:bd9dbf5aae1a3862dd1526723246b20206e5fc37"  # of the book Pro Git


def test_a_file_of_a_folder_is_verified_too(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"damaged")
    file = File("a.bin", "https://example.org/", checksum(b"whole", "sha256"))
    with pytest.raises(DataError, match=r"a.bin is damaged or of another data set: its checksum is sha256:"):
        file.read(tmp_path, (".",))
    (tmp_path / "a.bin").write_bytes(b"whole")
    assert file.read(tmp_path, ("elsewhere", ".")) == b"whole"
    with pytest.raises(DataError, match=r"b is in none of .*/x, .*/y; leave out --data"):
        find(tmp_path, ("b",), ("x", "y"))


def test_digits_are_split_and_scaled():
    loaded = digits()
    assert (len(loaded.train), len(loaded.test)) == (1437, 360)
    assert loaded.train.inputs.shape[1:] == (64,)
    assert (loaded.train.inputs.min(), loaded.train.inputs.max()) == (0, 1)
    assert loaded.test.labels.unique().tolist() == list(range(10))


@pytest.mark.skipif(not os.environ.get("CURVLIB_DATA"), reason="CURVLIB_DATA is not set")
def test_real_mnist():
    folder = Path(os.environ["CURVLIB_DATA"])
    if not any(folder.glob("**/train-images-idx3-ubyte*")):
        pytest.skip(f"{folder} has no MNIST")
    loaded = mnist(folder)
    assert (len(loaded.train), len(loaded.test)) == (60000, 10000)
    assert loaded.train.labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert abs(loaded.train.inputs.mean().item() - 0.1307) < 1e-4
