"""Skywork-MoE in Megatron-Bridge. Importing it registers our model there, which takes the 20 seconds of Bridge's import."""

import sys

# While Python looks for the module of `-m`, the first word is "-m". The command answers --list and mistakes without Bridge,
# and registers the model only before it trains.
if sys.argv[:1] != ["-m"]:
    from nemo_skymoe.bridge import registration  # noqa: F401
