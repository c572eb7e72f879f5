"""`run.executor=torchrun` without a GPU.

Upstream: nemo/collections/llm/recipes/run/executor.py, NeMo 2.5 to 2.7: the factory counts CUDA devices and
refuses where there are none, before `run.executor.ntasks_per_node` is looked at.
"""
# No `from __future__ import annotations`: NeMo-Run reads the factory's annotations.

from typing import Optional

from nemo_skymoe import gpus
from nemo_skymoe.patches import unified_memory

CPU_RANKS = 2


def apply() -> None:
    """Register a factory of that name, which starts `CPU_RANKS` ranks where there is no GPU."""
    import nemo_run as run
    from nemo.collections.llm.recipes.run import executor

    def torchrun(devices: Optional[int] = None) -> run.Config[run.LocalExecutor]:  # noqa: UP045
        """Make a local executor that uses torchrun, with a rank for each GPU, or with ranks on the CPU."""
        found = len(gpus.visible())
        config = executor.torchrun(devices=devices or found or CPU_RANKS)
        if not found:
            config.env_vars |= unified_memory.ENVIRONMENT
        return config

    run.cli.factory(torchrun)
