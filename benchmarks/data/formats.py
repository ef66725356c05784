"""Formats of official files: MATLAB's, and pickles without running what they name."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from .base import DataError

# What files of 2009 and 2016 name, and where it is today.
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"): ("numpy._core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"): ("numpy._core.multiarray", "scalar"),
    ("numpy", "ndarray"): ("numpy", "ndarray"),
    ("numpy", "dtype"): ("numpy", "dtype"),
    ("scipy.sparse.csr", "csr_matrix"): ("scipy.sparse", "csr_matrix"),
    ("scipy.sparse._csr", "csr_matrix"): ("scipy.sparse", "csr_matrix"),
    ("collections", "defaultdict"): ("collections", "defaultdict"),
    ("__builtin__", "list"): ("builtins", "list"),
    ("builtins", "list"): ("builtins", "list"),
    ("_codecs", "encode"): ("_codecs", "encode"),
}


class _Restricted(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no official file does")
        return super().find_class(*_ALLOWED[module, name])


def unpickled(content: bytes, path: Path) -> Any:
    """What a pickle of Python 2 or 3 holds; text of Python 2 is read as Latin-1.

    Raises:
        DataError: where it is damaged, or names anything but arrays, sparse matrices and dictionaries.
    """
    try:
        return _Restricted(io.BytesIO(content), encoding="latin1").load()
    except Exception as error:  # a damaged pickle may raise anything
        raise DataError(f"{path} cannot be read: {error}; fetch it again, or leave out --data to download it") from None


def matlab(content: bytes, path: Path, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """An array of a MATLAB file.

    Raises:
        DataError: where the file is damaged, or holds something else.
    """
    from scipy.io import loadmat

    try:
        found = loadmat(io.BytesIO(content))
    except Exception as error:  # a damaged file may raise anything
        raise DataError(f"{path} cannot be read: {error}; fetch it again") from None
    if name not in found or found[name].shape != shape or found[name].dtype.kind not in "uif":
        held = {key: list(value.shape) for key, value in found.items() if isinstance(value, np.ndarray)}
        raise DataError(f"{path} holds {held}, expected {name} {list(shape)} of numbers")
    return found[name]
