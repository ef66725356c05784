"""The laboratory: exact curvature, and what approximations lose."""

from .exact import LIMIT, fisher, hessian
from .objective import Objective
from .operator import Estimate, Operator

__all__ = ["LIMIT", "Estimate", "Objective", "Operator", "fisher", "hessian"]
