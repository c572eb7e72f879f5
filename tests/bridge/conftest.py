"""Every test here imports Bridge, which Transformer Engine's absence breaks unless our package comes first."""

import nemo_skymoe.bridge  # noqa: F401
