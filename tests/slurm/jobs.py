"""A job that trains: how far it is, what an operator does to it, and what its run has left."""

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nemo_skymoe.checkpoint.run_folder import checkpoint_of
from nemo_skymoe.checkpoint.torch_dist.common_state import read_common_state
from nemo_skymoe.checkpoint.torch_dist.storage import TorchDistStorage
from nemo_skymoe.report.curves import TRAIN_LOSSES, curve_of, read_curves
from tests.slurm.cluster import Cluster
from tests.waiting import wait_until

SECONDS = 1200
"""For whatever is waited for, a whole training among it; two cores that have nothing else to do need a tenth."""


@dataclass(frozen=True)
class Job:
    """A job of a cluster."""

    cluster: Cluster
    number: int
    log: Path
    """Its files, as a pattern."""
    step_line: re.Pattern[str]
    """A line in the log after every step, with the step's number."""
    first_step: int
    """The number of the first step in the log."""

    def shown(self) -> dict[str, str]:
        """What SLURM says about it."""
        return self.cluster.job(self.number)

    def printed(self) -> str:
        """All that it has printed."""
        return "".join(file.read_text() for file in sorted(self.log.parent.glob(self.log.name)))

    def step(self) -> int:
        """The last optimizer step in its log, counted from 0; -1 before the first."""
        numbers = map(int, self.step_line.findall(self.printed()))
        return max((number - self.first_step for number in numbers), default=-1)

    def wait(self, what: str, condition: Callable[[], object]) -> None:
        """Wait until `condition` holds; the end of the log is in the message where it does not."""
        try:
            wait_until(f"{what}, of job {self.number}", condition, SECONDS, pause=0.5)
        except TimeoutError as late:
            raise TimeoutError(f"{late}\n{self.shown()}\n{self.printed()[-4000:]}") from None

    def wait_for_step(self, step: int) -> None:
        """Wait until this step is done.

        Raises:
            AssertionError: It was the last one, or the job failed: too late for what is to happen to it.
        """
        self.wait(
            f"step {step}",
            lambda: self.step() >= step or self.shown()["JobState"] not in ("PENDING", "RUNNING"),
        )
        assert self.shown()["JobState"] == "RUNNING", f"{self.shown()}\n{self.printed()[-4000:]}"

    def wait_for_requeue(self, restarts: int) -> None:
        """Wait until it is in the queue again, for the `restarts`-th time."""
        self.wait(f"requeue {restarts}", lambda: self.shown()["Restarts"] == str(restarts))
        self.wait("a place in the queue", lambda: self.shown()["JobState"] == "PENDING")

    def start_now(self, *changes: str) -> None:
        """Spare it the two minutes that SLURM lets a requeued job wait."""
        self.cluster.run("scontrol", "update", f"JobId={self.number}", "StartTime=now", *changes)

    def wait_for_success(self) -> None:
        """Wait until it is done.

        Raises:
            AssertionError: It failed.
        """
        self.wait("the end", lambda: self.shown()["JobState"] not in ("PENDING", "RUNNING", "COMPLETING"))
        assert self.shown()["JobState"] == "COMPLETED", f"{self.shown()}\n{self.printed()[-4000:]}"


@dataclass(frozen=True)
class Kept:
    """What a finished run has left."""

    losses: dict[int, float]
    """As logged, by optimizer step, counted from 0."""
    logged: dict[int, tuple[float, ...]]
    """The adaptive coefficients of all layers after so many steps, as logged."""
    coefficients: dict[int, float]
    """Those of the last checkpoint, by layer."""
    parameters: dict[str, torch.Tensor]
    """All of the last checkpoint."""


def kept(run: Path, logged: Path, coefficients: Sequence[str], first_step: int) -> Kept:
    """Read what a run has left.

    Args:
        run: The folder with its checkpoints.
        logged: The folder with its log for TensorBoard.
        coefficients: Their place in what a checkpoint has beside tensors.
        first_step: The number of the first step in the log.
    """
    curves = read_curves(logged)
    layers = [curve for tag, curve in curves.items() if tag.startswith("moe/aux_loss_coefficient_layer_")]
    assert len(layers) > 1 and all(np.array_equal(layer.steps, layers[0].steps) for layer in layers)
    loss, last = curve_of(curves, TRAIN_LOSSES), checkpoint_of(run)
    assert loss is not None
    found: Any = functools.reduce(dict.__getitem__, coefficients, read_common_state(last))
    storage = TorchDistStorage(last)
    return Kept(
        dict(zip((loss.steps - first_step).tolist(), loss.values.tolist(), strict=True)),
        dict(zip(layers[0].steps.tolist(), zip(*(layer.values.tolist() for layer in layers), strict=True), strict=True)),
        found,
        {tensor: storage.read(tensor) for tensor in storage.tensors},
    )  # fmt: skip
