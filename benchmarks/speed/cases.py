"""All cases, by name, in the order of the table."""

from . import elementwise, generated, kronecker, limits, mbf
from .case import Case

CASES: dict[str, Case] = {
    case.name: case for case in (*elementwise.CASES, *mbf.CASES, *kronecker.CASES, *generated.CASES, *limits.CASES)
}
