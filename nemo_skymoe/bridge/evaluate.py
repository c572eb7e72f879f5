"""The model in a Megatron-Bridge checkpoint, without a training, on ranks that each hold the whole model."""

from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from nemo_skymoe import gpus
from nemo_skymoe.bridge.provider import SkyworkProvider
from nemo_skymoe.checkpoint.run_folder import checkpoint_of
from nemo_skymoe.checkpoint.torch_dist.pickle_check import check_checkpoint
from nemo_skymoe.patches import bridge_cpu


def start_single_rank() -> None:
    """Create Megatron's process groups for a rank that shares no model with another.

    Without CUDA it applies the CPU runtime first.
    """
    bridge_cpu.apply()
    torch.distributed.init_process_group(gpus.backend())
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(0)


def load_model(provider: SkyworkProvider, checkpoint: Path) -> torch.nn.Module:
    """Return the Megatron model of a provider with a checkpoint's weights. Every tensor has to be used.

    Args:
        provider: Its options, which are checked here.
        checkpoint: The folder of an iteration, or that of the run, whose last iteration is taken.

    Raises:
        ConfigurationError: An option of the provider cannot work.
        CheckpointError: There is no checkpoint, or it names a class that no checkpoint needs.
    """
    folder = checkpoint_of(checkpoint)
    check_checkpoint(folder)
    provider.finalize()
    model = provider.provide(pre_process=True, post_process=True).to(gpus.device())
    # Extra states hold FP8 scales, of which there are none here.
    sharded = {
        name: part for name, part in model.sharded_state_dict().items() if not name.endswith("_extra_state")
    }
    loaded: Any = dist_checkpointing.load(sharded, str(folder))
    weights = {name: loaded[name] for name in sharded}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    left_out = [name for name in (*missing, *unexpected) if not name.endswith("_extra_state")]
    assert not left_out, f"the checkpoint and the model differ in {left_out}"
    return model
