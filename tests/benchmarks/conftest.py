"""Lets the tests of this folder import `benchmarks.paper` as `python -m` finds it, and the leaves of recipes."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))
sys.path.append(str(Path(__file__).parents[1] / "recipes"))
