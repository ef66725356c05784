"""Data sets: from a package, from files in a folder, or downloaded from the official source with verified checksums.

A loader takes the folder of its own data set, or one that holds several sets in folders of their own.
"""

from .autoencoding import curves, faces
from .base import Data, DataError, Split
from .bundled import digits
from .graphs import citeseer, cora, pubmed
from .idx import fashion, mnist, read_idx
from .pixels import cifar10, cifar100, svhn
from .text import shakespeare

__all__ = [
    "Data",
    "DataError",
    "Split",
    "cifar10",
    "cifar100",
    "citeseer",
    "cora",
    "curves",
    "digits",
    "faces",
    "fashion",
    "mnist",
    "pubmed",
    "read_idx",
    "shakespeare",
    "svhn",
]
