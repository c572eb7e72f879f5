"""Lets the tests of this folder import `benchmarks.paper` as `python -m` finds it."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))
