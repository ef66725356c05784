"""How fast curvlib is: paired ratios to specialists, to hand-written code and to what the machine can do.

    python -m benchmarks speed --peers DIR --out results/speed

Every case first checks that both sides compute the same thing, then times them in turns in one process. `cases.py` lists the
cases, `timing.py` says what a ratio is, `peers.py` finds the other libraries, `table.py` writes what was measured.
"""

from .command import SpeedError, add_speed, run_speed

__all__ = ["SpeedError", "add_speed", "run_speed"]
