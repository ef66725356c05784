"""Named optimizers: each a signature, its equations, its source and a routing table."""

from .adagrad import Adagrad
from .adam import Adam, AdamW, MomentumAdam
from .kfac import KFAC
from .mbf import MBF
from .ngd import NGD
from .rmsprop import RMSprop
from .sgd import SGD
from .shampoo import Shampoo

__all__ = ["KFAC", "MBF", "NGD", "SGD", "Adagrad", "Adam", "AdamW", "MomentumAdam", "RMSprop", "Shampoo"]
