"""``python -m benchmarks``."""

import sys

try:
    from .cli import main

    sys.exit(main())
except KeyboardInterrupt:  # before there is anything to stop
    sys.exit(130)
