"""Named optimizers: each a signature, its equations, its source and a routing table."""

from .adagrad import Adagrad
from .adam import Adam, AdamW, MomentumAdam
from .mbf import MBF
from .rmsprop import RMSprop
from .sgd import SGD
from .shampoo import Shampoo

__all__ = ["MBF", "SGD", "Adagrad", "Adam", "AdamW", "MomentumAdam", "RMSprop", "Shampoo"]
