"""curvlib: second-order optimizers as configurations of one batched preconditioning engine."""

from . import newton as newton
from .calibration import Calibration, calibrate
from .differentiable import DecorrelatedNorm, matrix_inverse_sqrt, matrix_sqrt
from .ears import TapError, TapWarning
from .finish import Finish
from .health import Health, NonFiniteGradient
from .labels import sample_labels
from .layers import LayerKind, Slot, register_layer
from .optimizer import CurvatureOptimizer
from .optimizers import (
    EKFAC,
    FOOF,
    KBFGS,
    KFAC,
    MBF,
    NGD,
    SGD,
    SINGD,
    SOAP,
    TKFAC,
    TNT,
    Adafactor,
    Adagrad,
    AdaHessian,
    Adam,
    AdamW,
    Eva,
    FullAdagrad,
    KLShampoo,
    LayerwiseAdamW,
    LayerwiseSGD,
    Lion,
    MomentumAdam,
    Muon,
    OneSidedShampoo,
    PSGDKron,
    RMSprop,
    Shampoo,
    SophiaG,
    SophiaH,
)
from .partition import Partition, PartitionError
from .preconditioner import Preconditioner
from .recipe import Clip, Damping, Grafting, Moment, Momentum, Recipe, Root, Rule, Schedule, Tracking
from .routing import Route, RouteWarning
from .signals import Signal, Tap
from .solvers import register_solver

__version__ = "0.1.0"

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
    "Calibration",
    "Clip",
    "CurvatureOptimizer",
    "Damping",
    "DecorrelatedNorm",
    "Eva",
    "Finish",
    "FullAdagrad",
    "Grafting",
    "Health",
    "KLShampoo",
    "LayerKind",
    "LayerwiseAdamW",
    "LayerwiseSGD",
    "Lion",
    "Moment",
    "Momentum",
    "MomentumAdam",
    "Muon",
    "NonFiniteGradient",
    "OneSidedShampoo",
    "PSGDKron",
    "Partition",
    "PartitionError",
    "Preconditioner",
    "RMSprop",
    "Recipe",
    "Root",
    "Route",
    "RouteWarning",
    "Rule",
    "Schedule",
    "Shampoo",
    "Signal",
    "Slot",
    "SophiaG",
    "SophiaH",
    "Tap",
    "TapError",
    "TapWarning",
    "Tracking",
    "calibrate",
    "matrix_inverse_sqrt",
    "matrix_sqrt",
    "register_layer",
    "register_solver",
    "sample_labels",
]
