"""The seed of a training's initial weights and dropout."""
# No `from __future__ import annotations`: NeMo-Run reads these signatures.

import lightning.pytorch as pl
from nemo.lightning import megatron_init

from nemo_skymoe.config import ConfigurationError


class InitialSeed(pl.Callback):
    """Seeds every rank before its part of the model is built. NeMo itself seeds all runs with 1234.

    The order of the data has a seed of its own, that of the data module.

    Args:
        seed: The seed, at least 1.

    Raises:
        ConfigurationError: The seed is smaller.
    """

    def __init__(self, seed: int = 1234) -> None:
        if seed < 1:
            raise ConfigurationError(f"seed is {seed}, expected at least 1")
        self.seed = seed

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Seed this rank. At this point the process groups exist, and the model does not."""
        megatron_init._set_random_seed(self.seed)
