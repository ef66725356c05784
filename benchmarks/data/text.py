"""Tiny Shakespeare (Karpathy 2015), by characters."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .base import Data, Split
from .sources import File

_TEXT = File(
    "input.txt",
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/",
    "sha256:86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
)


def shakespeare(folder: Path | None = None, length: int = 64) -> Data:
    """The 1,115,394 characters, 65 distinct ones: the first nine tenths to train on, the last tenth held out.

    Examples are windows ``[length]`` that do not overlap, labels the characters that follow.

    Args:
        folder: where ``input.txt`` lies, or where it lies in ``tinyshakespeare``. Without it it is downloaded.
        length: of a window.

    Raises:
        DataError: naming the file, what is wrong and the way out.
    """
    text = _TEXT.read(folder, (".", "tinyshakespeare")).decode("ascii")
    letters = sorted(set(text))
    number = {letter: place for place, letter in enumerate(letters)}
    encoded = torch.tensor([number[letter] for letter in text])
    held = len(encoded) * 9 // 10
    return Data(windows(encoded[:held], length), windows(encoded[held:], length), extra={"letters": letters})


def windows(text: Tensor, length: int) -> Split:
    """Windows of a text, one after the other, each with what follows its characters."""
    count = (len(text) - 1) // length
    return Split(text[: count * length].view(count, length), text[1 : count * length + 1].view(count, length))
