"""What the story asks of a front door: NeMo (`through_nemo`) or Megatron-Bridge (`through_bridge`)."""

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

import torch

from nemo_skymoe.demo.progress import Bar

RANKS = 2


@dataclass(frozen=True, kw_only=True)
class Training:
    """One training of the story, in values that every front door has a name for."""

    folder: Path
    """Folder of all runs, with their TensorBoard logs in `tensorboard/NAME`."""
    name: str
    corpus: Path
    max_steps: int
    start: Path | None = None
    """The checkpoint to start from. None is random weights."""
    learning_rates: tuple[float, float] | None = None
    """Peak and end. None leaves the recipe's."""
    data_seed: int | None = None
    smoothing: float | None = None
    """Smoothing of an MoE's adaptive coefficients. None leaves the recipe's."""

    def arguments(self) -> dict[str, Any]:
        """Return what the recipe is called with: both front doors have the same names for it."""
        given: dict[str, Any] = {
            "dir": str(self.folder),
            "name": self.name,
            "corpus": str(self.corpus),
            "devices": RANKS,
            "max_steps": self.max_steps,
            "val_check_interval": self.max_steps // 3,
        }
        if self.start is not None:
            given["resume_path"] = str(self.start)
        if self.learning_rates is not None:
            given["max_lr"], given["min_lr"] = self.learning_rates
        if self.data_seed is not None:
            given["data_seed"] = self.data_seed
        return given


class Door(Protocol):
    """A front door: a module with these names. Recipes are made in the story's process and trained on every rank."""

    FORMAT: str
    """The name of its checkpoints' format, as `skymoe upcycle --to` has it."""

    def dense(self, training: Training, /) -> Any:
        """Return the recipe of `skywork_tiny`."""
        ...

    def moe(self, training: Training, /) -> Any:
        """Return the recipe of `skywork_moe_tiny`."""
        ...

    def train(self, recipe: Any, bar: Bar, /) -> list[dict[str, int]]:
        """Run a recipe on this rank, show its progress, and return the mesh that it trained on."""
        ...

    def start_single_rank(self) -> None:
        """Create Megatron's process groups for a rank that shares no model with another."""
        ...

    def load(
        self, checkpoint: Path, vocab_size: int, /, *, experts: bool, capacity_factor: float | None = None
    ) -> torch.nn.Module:
        """Return the dense model or the MoE with the weights of a checkpoint."""
        ...

    def configuration(self, checkpoint: Path, /) -> str:
        """Return what a checkpoint of a training says about its model, as text."""
        ...


def door_of(frontdoor: str) -> Door:
    """Return a front door by its name, "nemo" or "bridge", which imports it."""
    return cast(Door, import_module(f"nemo_skymoe.demo.through_{frontdoor}"))
