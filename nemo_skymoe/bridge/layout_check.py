"""Check the parallel sizes of a training of Bridge: against its ranks, its batch, and the checkpoint that it continues."""

import math
from pathlib import Path
from typing import Any

from megatron.bridge.training.config import ConfigContainer
from megatron.bridge.utils.common_utils import get_world_size_safe

from nemo_skymoe.checkpoint.config_values import read_yaml
from nemo_skymoe.checkpoint.torch_dist.run_config import RUN_CONFIG
from nemo_skymoe.config import ConfigurationError, SkyworkOptions
from nemo_skymoe.pipeline.division import check_division

_SIZES = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)


def check_ranks(config: ConfigContainer) -> None:
    """Refuse a number of ranks that the parallel sizes do not divide, and a batch that the ranks do not.

    Raises:
        ConfigurationError: The message names the options.
    """
    model: Any = config.model
    world = get_world_size_safe()
    tensor, pipeline = model.tensor_model_parallel_size, model.pipeline_model_parallel_size
    context, expert = model.context_parallel_size, model.expert_model_parallel_size
    within = expert_tensor_parallelism(model)
    stages = {"pipeline_model_parallel_size": pipeline}
    attention = {"tensor_model_parallel_size": tensor, **stages, "context_parallel_size": context}
    _check_multiple(world, attention)
    check_division(model)
    if getattr(model, "num_moe_experts", None):
        _check_multiple(
            world, {"expert_tensor_parallel_size": within, "expert_model_parallel_size": expert, **stages}
        )
    replicas = world // math.prod(attention.values())
    micro, whole = config.train.micro_batch_size, config.train.global_batch_size
    if micro and whole and config.train.rampup_batch_size is None and whole % (micro * replicas):
        raise ConfigurationError(
            f"train.global_batch_size is {whole}, expected a multiple of train.micro_batch_size={micro} x {replicas}"
            f" data-parallel ranks = {micro * replicas}"
        )
    if isinstance(model, SkyworkOptions) and not config.validation.skip_train:
        model.check_training()


def expert_tensor_parallelism(model: Any) -> int:
    """Return the number of ranks that share an expert, as Megatron settles it."""
    if model.expert_tensor_parallel_size:
        return model.expert_tensor_parallel_size
    return 1 if model.expert_model_parallel_size > 1 else model.tensor_model_parallel_size


def _check_multiple(world: int, sizes: dict[str, int]) -> None:
    product = math.prod(sizes.values())
    if world % product:
        factors = " x ".join(f"model.{name}={size}" for name, size in sizes.items())
        raise ConfigurationError(f"{world} ranks were started, expected a multiple of {factors} = {product}")


def check_resumed_layout(iteration: Path, config: ConfigContainer) -> None:
    """Refuse to continue a run under other parallel sizes if its optimizer was saved for those that it had.

    Args:
        iteration: The folder of the iteration that Bridge would continue, with its `run_config.yaml`.
        config: The training.

    Raises:
        ConfigurationError: The message says how the checkpoint has to be saved.
    """
    if not config.optimizer.use_distributed_optimizer or not config.checkpoint.load_optim:
        return
    saved = read_yaml(iteration / RUN_CONFIG)
    model, checkpoint = (
        part if isinstance(part := saved.get(n), dict) else {} for n in ("model", "checkpoint")
    )
    if checkpoint.get("dist_ckpt_optim_fully_reshardable") or not checkpoint.get("save_optim", True):
        return
    changed = [
        f"model.{name} from {model[name]} to {now}"
        for name in _SIZES
        if name in model and (model[name] or 1) != ((now := getattr(config.model, name)) or 1)
    ]
    if changed:
        raise ConfigurationError(
            f"checkpoint.load '{iteration.parent}' was saved with dist_ckpt_optim_fully_reshardable=False, for its own"
            f" layout, but this run changes {', '.join(changed)}: expected the same sizes, or a checkpoint that was saved"
            " with checkpoint.dist_ckpt_optim_fully_reshardable=True; checkpoint.pretrained_checkpoint, with another"
            " folder for the run, takes the weights alone"
        )
