"""curvlib: second-order optimizers as configurations of one batched preconditioning engine."""

from .health import Health, NonFiniteGradient
from .labels import sample_labels
from .layers import LayerKind, Slot, register_layer
from .optimizer import CurvatureOptimizer
from .optimizers import MBF, SGD, Adagrad, Adam, AdamW, MomentumAdam, RMSprop, Shampoo
from .partition import Partition, PartitionError
from .recipe import Clip, Damping, Grafting, Moment, Momentum, Recipe, Root, Rule, Schedule
from .routing import Route

__version__ = "0.1.0"

__all__ = [
    "MBF",
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "Clip",
    "CurvatureOptimizer",
    "Damping",
    "Grafting",
    "Health",
    "LayerKind",
    "Moment",
    "Momentum",
    "MomentumAdam",
    "NonFiniteGradient",
    "Partition",
    "PartitionError",
    "RMSprop",
    "Recipe",
    "Root",
    "Route",
    "Rule",
    "Schedule",
    "Shampoo",
    "Slot",
    "register_layer",
    "sample_labels",
]
