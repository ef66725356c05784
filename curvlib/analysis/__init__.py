"""The laboratory: exact curvature, and what approximations lose."""

from .approximation import Approximation, Structure
from .compare import compare
from .exact import LIMIT, fisher, hessian
from .objective import Objective
from .operator import Estimate, Operator
from .table import TOTAL, Comparison, Row

__all__ = [
    "LIMIT",
    "TOTAL",
    "Approximation",
    "Comparison",
    "Estimate",
    "Objective",
    "Operator",
    "Row",
    "Structure",
    "compare",
    "fisher",
    "hessian",
]
