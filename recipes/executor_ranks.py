"""The number of ranks that an executor starts is the recipe's, whatever the number of GPUs of the machine."""

from typing import Any

import nemo_run as run

from nemo_skymoe import gpus
from nemo_skymoe.config import ConfigurationError


def follow_recipe(executor: Any, trainer: Any) -> None:
    """Let torchrun on this machine start the recipe's ranks, and refuse SLURM tasks that are not the recipe's ranks.

    Args:
        executor: An executor of NeMo-Run's, built, or None for this process.
        trainer: The recipe's trainer.

    Raises:
        ConfigurationError: The executor has other ranks, or this machine has fewer GPUs. The message names the option.
    """
    devices, nodes = trainer.devices, trainer.num_nodes
    if type(devices) is not int:  # "auto" and the like: Lightning counts
        return
    if isinstance(executor, run.SlurmExecutor):
        tasks = executor.nodes, executor.ntasks_per_node
        if tasks != (nodes, devices):
            raise ConfigurationError(
                f"run.executor.nodes and ntasks_per_node are {tasks[0]} and {tasks[1]}, expected trainer.num_nodes and"
                f" trainer.devices: {nodes} and {devices}"
            )
    elif isinstance(executor, run.LocalExecutor) and executor.get_launcher().__class__ is run.Torchrun:
        if nodes != 1:
            raise ConfigurationError(
                f"trainer.num_nodes is {nodes}, expected 1 with an executor that starts ranks on this machine alone"
            )
        found = len(gpus.visible())
        if 0 < found < devices:
            raise ConfigurationError(
                f"trainer.devices is {devices}, expected at most {found}: this machine has no more GPUs"
            )
        executor.ntasks_per_node = devices
