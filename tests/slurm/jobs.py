"""A job that trains: how far it is, what an operator does to it, and what its run has left."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from nemo_skymoe.checkpoint.torch_dist.storage import TorchDistStorage
from nemo_skymoe.report.curves import read_curves
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

    def shown(self) -> dict[str, str]:
        """What SLURM says about it."""
        return self.cluster.job(self.number)

    def printed(self) -> str:
        """All that it has printed."""
        return "".join(file.read_text() for file in sorted(self.log.parent.glob(self.log.name)))

    def step(self) -> int:
        """The last optimizer step in its log, counted from 0; -1 before the first."""
        return max((int(step) for step in re.findall(r"global_step: (\d+)", self.printed())), default=-1)

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


def checkpoint(runs: Path, name: str) -> Path:
    """The last one of a run."""
    (last,) = (runs / name / "checkpoints").glob("*-last")
    return last


def kept(runs: Path, name: str) -> Kept:
    """Read what the run `name` has left."""
    curves = read_curves(runs / "tensorboard" / name)
    layers = [curve for tag, curve in curves.items() if tag.startswith("moe/aux_loss_coefficient_layer_")]
    assert len(layers) > 1 and all(np.array_equal(layer.steps, layers[0].steps) for layer in layers)
    loss, last = curves["reduced_train_loss"], checkpoint(runs, name)
    storage = TorchDistStorage(last)
    state = torch.load(last / "weights" / "common.pt", weights_only=False)["callbacks"]["SkyworkMoECallback"]
    return Kept(
        dict(zip(loss.steps.tolist(), loss.values.tolist(), strict=True)),
        dict(zip(layers[0].steps.tolist(), zip(*(layer.values.tolist() for layer in layers), strict=True), strict=True)),
        state["aux_loss_coefficients"],
        {tensor: storage.read(tensor) for tensor in storage.tensors},
    )  # fmt: skip
