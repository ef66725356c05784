"""Loaders: official formats written small and read back, damage named, recipes as published."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import scipy.sparse
import torch

from benchmarks import data
from benchmarks.data import DataError, autoencoding, graphs, pixels
from benchmarks.data.formats import unpickled
from benchmarks.data.sources import File, checksum
from benchmarks.data.text import windows

HERE = Path("a.pickle")


class Evil:
    def __reduce__(self):
        return (os.system, ("true",))


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_pickles_of_arrays_and_matrices_are_read(protocol):
    held = {
        "data": np.arange(6.0).reshape(2, 3),
        "m": scipy.sparse.csr_matrix(np.eye(3)),
        "g": defaultdict(list, {1: [2]}),
    }
    found = unpickled(pickle.dumps(held, protocol), HERE)
    assert np.array_equal(found["data"], held["data"])
    assert (found["m"] != held["m"]).nnz == 0
    assert found["g"][1] == [2]


@pytest.mark.parametrize("content", [pickle.dumps(Evil()), b"", b"\x80\x02garbage", pickle.dumps([1, 2])[:-3]])
def test_other_pickles_are_refused_unrun(content):
    with pytest.raises(DataError, match=r"a\.pickle cannot be read"):
        unpickled(content, HERE)


def cifar_batch(count, seed, labels="labels", classes=10):
    generator = np.random.default_rng(seed)
    drawn = generator.integers(0, classes, count).tolist()
    return {"data": generator.integers(0, 256, (count, 3072), dtype=np.uint8), labels: drawn}


def published(monkeypatch, name, batches, content=b""):
    """Take some batches, and an archive of them, for the official ones."""
    official = getattr(pixels, name)
    known = {batch: (checksum(pickle.dumps(held, 2), "md5"), len(held["data"])) for batch, held in batches.items()}
    file = File(official.file.name, "https://example.org/", checksum(content, "md5"))
    monkeypatch.setattr(pixels, name, replace(official, file=file, batches=known))


@pytest.mark.parametrize("packed", [False, True])
def test_cifar10_is_read_in_the_official_order(tmp_path, monkeypatch, packed):
    batches = {f"data_batch_{number}": cifar_batch(4, number) for number in range(1, 6)}
    batches["test_batch"] = cifar_batch(3, 0)
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for name, batch in batches.items():
            content = pickle.dumps(batch, 2)
            if packed:
                info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            else:
                file = tmp_path / "cifar10" / "cifar-10-batches-py" / name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)
    if packed:
        (tmp_path / "cifar-10-python.tar.gz").write_bytes(archive.getvalue())
    published(monkeypatch, "_CIFAR10", batches, archive.getvalue())
    loaded = data.cifar10(tmp_path)
    assert (loaded.train.inputs.shape, loaded.test.inputs.shape) == ((20, 3, 32, 32), (3, 3, 32, 32))
    assert loaded.train.labels[4:8].tolist() == batches["data_batch_2"]["labels"]
    mean, deviation = (torch.tensor(values)[:, None, None] for values in pixels.STATISTICS["cifar10"])
    first = (loaded.train.inputs[4] * deviation + mean) * 255
    assert torch.allclose(first.flatten(), torch.from_numpy(batches["data_batch_2"]["data"][0]).float(), atol=1e-3)
    assert loaded.note == ""
    if not packed:
        inner = data.cifar10(tmp_path / "cifar10" / "cifar-10-batches-py")
        assert torch.equal(inner.train.inputs, loaded.train.inputs)


def unpacked(folder, monkeypatch, **changes):
    """CIFAR-100 as a folder, of which some files are not as published."""
    batches = {"train": cifar_batch(50, 0, "fine_labels"), "test": cifar_batch(5, 1, "fine_labels")}
    published(monkeypatch, "_CIFAR100", batches)
    (folder / "cifar-100-python").mkdir()
    for name, batch in {**batches, **changes}.items():
        content = batch if isinstance(batch, bytes) else pickle.dumps(batch, 2)
        (folder / "cifar-100-python" / name).write_bytes(content)


def test_batches_that_are_not_the_official_ones_are_told(tmp_path, monkeypatch):
    unpacked(tmp_path, monkeypatch, test=cifar_batch(5, 7, "fine_labels"))
    assert data.cifar100(tmp_path).note == "cifar100 from batches that are not the official files: test."


WRONG = {
    "few": cifar_batch(4, 7, "fine_labels"),
    "coarse": cifar_batch(5, 7, "coarse_labels"),
    "texts": {**cifar_batch(5, 7), "fine_labels": ["a"] * 5},
    "floats": {"data": np.zeros((5, 3072)), "fine_labels": [0] * 5},
    "flat": {"data": np.zeros(5 * 3072, np.uint8), "fine_labels": [0] * 5},
    "a list": [1, 2],
    "cut": pickle.dumps(cifar_batch(5, 7, "fine_labels"), 2)[:-100],
}


@pytest.mark.parametrize("what", WRONG)
def test_damaged_batches_are_named(tmp_path, monkeypatch, what):
    unpacked(tmp_path, monkeypatch, test=WRONG[what])
    with pytest.raises(
        DataError, match=r"cifar-100-python/test (holds data .* expected \[5, 3072\]|cannot be read)"
    ) as caught:
        data.cifar100(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_batch_that_is_missing_is_named(tmp_path, monkeypatch):
    unpacked(tmp_path, monkeypatch)
    (tmp_path / "cifar-100-python" / "test").unlink()
    with pytest.raises(DataError, match=r"cifar-100-python/test cannot be read"):
        data.cifar100(tmp_path)


def test_jpeg_images_are_counted(tmp_path):
    np.savez(tmp_path / "cifar10_jpeg.npz", train_jpeg=np.zeros(3, np.uint8), train_offsets=np.zeros(4, np.int64))
    with pytest.raises(DataError, match=r"cifar10_jpeg\.npz cannot be read"):
        data.cifar10(tmp_path)


def test_an_archive_that_is_not_the_official_one_is_refused(tmp_path):
    (tmp_path / "cifar-100-python.tar.gz").write_bytes(b"something")
    with pytest.raises(DataError, match=r"damaged or of another data set.*expected md5:eb9058c3"):
        data.cifar100(tmp_path)


def test_labels_outside_of_the_classes_are_refused(tmp_path, monkeypatch):
    unpacked(tmp_path, monkeypatch, train=cifar_batch(50, 0, "fine_labels", 200))
    with pytest.raises(DataError, match=r"labels of cifar100 go from \d+ to 1\d\d, expected 0 to 99"):
        data.cifar100(tmp_path)


def test_a_graph_is_assembled_with_nodes_that_nobody_describes(tmp_path):
    words = scipy.sparse.csr_matrix(np.array([[1, 1, 0], [0, 1, 0], [0, 0, 2.0]], np.float32))
    content = {
        "y": np.eye(2)[:2],
        "allx": words,
        "ally": np.eye(2)[[0, 1, 1]],
        "tx": words[:2],
        "ty": np.eye(2)[[1, 0]],
        "test.index": np.array([5, 3]),  # no file describes node 4
        "graph": {0: [1], 1: [0, 2], 2: [1, 2], 3: [0], 4: [], 5: [0]},
    }
    found = graphs.assembled(content)
    assert found.train.inputs.tolist() == [[0, 1]]
    assert (found.validation.inputs.tolist(), found.validation.labels.tolist()) == ([[2]], [[1]])
    assert (found.test.inputs.tolist(), found.test.labels.tolist()) == ([[3, 5]], [[0, 1]])
    assert torch.equal(found.extra["features"].sum(1), torch.tensor([1.0, 1, 1, 1, 0, 1]))
    dense = torch.zeros(6, 6)
    for one, other in ((0, 1), (1, 2), (3, 0), (5, 0)):
        dense[one, other] = dense[other, one] = 1
    dense += torch.eye(6)
    scale = dense.sum(1).rsqrt().diag()
    assert torch.allclose(found.extra["adjacency"].to_dense(), scale @ dense @ scale)
    with pytest.raises(DataError, match=r"test nodes go from 3 to 4, expected 3 to 5"):
        graphs.assembled({**content, "test.index": np.array([3, 4])})


def test_windows_are_followed_by_what_comes_next():
    split = windows(torch.arange(20), 6)
    assert split.inputs.tolist() == [list(range(start, start + 6)) for start in (0, 6, 12)]
    assert torch.equal(split.labels, split.inputs + 1)
    assert len(windows(torch.arange(19), 6)) == 3  # the last character is a label only
    assert len(windows(torch.arange(18), 6)) == 2


def test_curves_go_through_their_points_and_are_smooth():
    drawn = autoencoding.drawn_curves(300, torch.Generator().manual_seed(3))
    assert drawn.shape == (300, 784)
    assert (drawn.min() >= 0, drawn.max() <= 1) == (True, True)
    points = 4 + 20 * torch.rand(300, 3, 2, generator=torch.Generator().manual_seed(3))
    nearest = points.round().long()
    ink = drawn.view(300, 28, 28)[torch.arange(300)[:, None], nearest[..., 1], nearest[..., 0]]
    assert ink.min() > 0.55  # exp(-1/2), half a pixel away in both directions
    assert torch.equal(autoencoding.drawn_curves(300, torch.Generator().manual_seed(3)), drawn)


def test_patches_lie_inside_of_their_images():
    ones = torch.ones(3, 1, 64, 64)
    assert torch.allclose(autoencoding.patches(ones, 50, torch.Generator().manual_seed(0)), torch.ones(150, 625))


def test_original_autoencoder_files_are_preferred(tmp_path):
    (tmp_path / "CURVES").mkdir()
    rows = np.random.default_rng(0).random((30000, 784), np.float32)
    held = {"bdata": rows[:20000], "bdatatest": rows[20000:]}
    scipy.io.savemat(tmp_path / "CURVES" / "digs3pts_1.mat", held, do_compression=False)
    loaded = data.curves(tmp_path)
    assert (loaded.note, len(loaded.train), len(loaded.test)) == ("", 20000, 10000)
    assert torch.equal(loaded.test.inputs, torch.from_numpy(rows[20000:]))
    scipy.io.savemat(tmp_path / "CURVES" / "digs3pts_1.mat", {"bdata": rows[:7]})
    with pytest.raises(DataError, match=r"digs3pts_1.mat holds .*7, 784.*expected bdata \[20000, 784\]"):
        data.curves(tmp_path)
    (tmp_path / "CURVES" / "digs3pts_1.mat").write_bytes(b"MATLAB 5.0, cut")
    with pytest.raises(DataError, match=r"digs3pts_1.mat cannot be read"):
        data.curves(tmp_path)


REAL = {
    "fashion": ("train-images-idx3-ubyte*", (60000, 784), (10000, 784), [9, 0, 0, 3, 0]),
    "cora": ("ind.cora.graph", (1, 140), (1, 1000), [3, 4, 4, 0, 3]),
    "citeseer": ("ind.citeseer.graph", (1, 120), (1, 1000), [3, 1, 5, 5, 3]),
    "shakespeare": ("input.txt", (15685, 64), (1742, 64), None),
    "faces": ("olivettifaces.mat", (103500, 625), (41400, 625), [0] * 5),
}


@pytest.mark.skipif(not os.environ.get("CURVLIB_DATA"), reason="CURVLIB_DATA is not set")
@pytest.mark.parametrize("name", REAL)
def test_real_files(name):
    folder = Path(os.environ["CURVLIB_DATA"])
    file, train, test, labels = REAL[name]
    if not any(folder.glob(f"**/{file}")):
        pytest.skip(f"{folder} has no {file}")
    loaded = getattr(data, name)(folder)
    assert (tuple(loaded.train.inputs.shape), tuple(loaded.test.inputs.shape)) == (train, test)
    assert labels is None or loaded.train.labels.flatten()[:5].tolist() == labels
    if loaded.validation is not None:
        assert loaded.validation.inputs.shape == (1, 500)
    if name == "cora":
        assert loaded.extra["adjacency"]._nnz() == 2 * 5278 + 2708
    if name == "faces":
        assert abs(float(loaded.train.inputs.square().mean()) - 1) < 1e-4
        assert "not equal" in loaded.note
        assert ("olivettifaces.mat is not the official file" in loaded.note) != autoencoding._OLIVETTI.is_official(
            next(folder.glob(f"**/{file}")).read_bytes()
        )
