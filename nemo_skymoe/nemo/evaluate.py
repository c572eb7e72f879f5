"""The model in a NeMo checkpoint, without a trainer, on ranks that each hold the whole model."""

from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from nemo_skymoe import gpus
from nemo_skymoe.checkpoint.torch_dist.pickle_check import check_checkpoint
from nemo_skymoe.checkpoint.torch_dist.storage import PREFIX, weights_folder
from nemo_skymoe.patches import nemo_cpu


def start_single_rank() -> None:
    """Create Megatron's process groups for a rank that shares no model with another.

    Without CUDA it applies the CPU runtime first.
    """
    nemo_cpu.apply()
    torch.distributed.init_process_group(gpus.backend())
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(0)


def load_model(config: Any, checkpoint: Path, vocab_size: int) -> torch.nn.Module:
    """Return the Megatron model of a NeMo configuration with a checkpoint's weights. Every tensor has to be used.

    Raises:
        ConfigurationError: The checkpoint names a class that no checkpoint needs.
    """
    check_checkpoint(checkpoint)
    config.vocab_size = vocab_size
    model = config.configure_model(tokenizer=None, pre_process=True, post_process=True).to(gpus.device())
    # Extra states hold FP8 scales, of which there are none here.
    sharded = {
        name: part
        for name, part in model.sharded_state_dict(prefix=PREFIX).items()
        if not name.endswith("_extra_state")
    }
    loaded: Any = dist_checkpointing.load(sharded, str(weights_folder(checkpoint)))
    # Megatron also returns the trainer's state that NeMo saved beside the tensors.
    weights = {name.removeprefix(PREFIX): value for name, value in loaded.items() if name.startswith(PREFIX)}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    left_out = [name for name in (*missing, *unexpected) if not name.endswith("_extra_state")]
    assert not left_out, f"the checkpoint and the model differ in {left_out}"
    return model
