"""Lets the tests of this folder import tiny_gpt, the model they train."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
