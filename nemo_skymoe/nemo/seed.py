"""The seed of a training's initial weights and dropout."""
# No `from __future__ import annotations`: NeMo-Run reads these signatures.

import lightning.pytorch as pl
from nemo.lightning import megatron_init

from nemo_skymoe.config import ConfigurationError


class InitialSeed(pl.Callback):
    """Seed every rank before its part of the model is built: NeMo seeds all runs with 1234.

    The order of the data has a seed of its own, that of the data module.

    Args:
        seed: At least 1.

    Raises:
        ConfigurationError: A smaller one.
    """

    def __init__(self, seed: int = 1234) -> None:
        if seed < 1:
            raise ConfigurationError(f"seed is {seed}, expected at least 1")
        self.seed = seed

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """The process groups are there, the model is not."""
        megatron_init._set_random_seed(self.seed)
