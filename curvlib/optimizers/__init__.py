"""Named optimizers: each a signature, its equations, its source and a routing table."""

from ..trainers import hf_factory
from .adafactor import Adafactor
from .adagrad import Adagrad
from .adahessian import AdaHessian
from .adam import Adam, AdamW, MomentumAdam
from .catalogue import Catalogue, Method, table
from .ekfac import EKFAC
from .eva import Eva
from .kbfgs import KBFGS
from .kfac import KFAC
from .layerwise import LayerwiseAdamW, LayerwiseSGD, layerwise
from .lion import Lion
from .mbf import MBF
from .muon import Muon
from .ngd import NGD
from .one_sided import FOOF, FullAdagrad, OneSidedShampoo
from .psgd import PSGDKron
from .rmsprop import RMSprop
from .sgd import SGD
from .shampoo import Shampoo
from .singd import SINGD
from .soap import SOAP, KLShampoo
from .sophia import SophiaG, SophiaH
from .tkfac import TKFAC
from .tnt import TNT

__all__ = [
    "EKFAC",
    "FOOF",
    "KBFGS",
    "KFAC",
    "MBF",
    "NGD",
    "SGD",
    "SINGD",
    "SOAP",
    "TKFAC",
    "TNT",
    "AdaHessian",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Catalogue",
    "Eva",
    "FullAdagrad",
    "KLShampoo",
    "LayerwiseAdamW",
    "LayerwiseSGD",
    "Lion",
    "Method",
    "MomentumAdam",
    "Muon",
    "OneSidedShampoo",
    "PSGDKron",
    "RMSprop",
    "Shampoo",
    "SophiaG",
    "SophiaH",
    "hf_factory",
    "layerwise",
    "table",
]
