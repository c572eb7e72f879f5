"""Sources: checkpoints of any format, opened from their headers alone. Without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nemo_skymoe.checkpoint.description import Description
from nemo_skymoe.checkpoint.formats import FORMATS, form_of
from nemo_skymoe.checkpoint.run_folder import checkpoint_of
from nemo_skymoe.checkpoint.tensors.mapping import StoredWeights


@dataclass(frozen=True)
class Source:
    """An opened checkpoint."""

    folder: Path
    form: str
    """One of FORMATS."""
    weights: StoredWeights
    description: Description

    @property
    def tokenizer(self) -> Path | None:
        """The folder with the files of the tokenizer, and of whatever else travels along, if they are there."""
        return FORMATS[self.form].companions(self.folder)


def open_source(folder: Path, config: Path | None = None) -> Source:
    """Open a checkpoint of any format.

    Args:
        folder: The folder of a checkpoint, or that of a run, which stands for its last checkpoint.
        config: A config.json for a Megatron checkpoint that does not describe itself.

    Raises:
        ConfigurationError: The folder holds no checkpoint of a known format, or one that cannot be converted.
    """
    folder = checkpoint_of(folder)
    form = form_of(folder)
    return Source(folder, form, *FORMATS[form].open_model(folder, config))
