"""What a training of Megatron-Bridge would refuse, found where it is launched, which is without Megatron-Bridge."""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from nemo_skymoe.checkpoint.description import Description
from nemo_skymoe.checkpoint.run_folder import checkpoint_of
from nemo_skymoe.checkpoint.torch_dist.deciding import CHANGES, check_deciding
from nemo_skymoe.checkpoint.torch_dist.model_options import model_options
from nemo_skymoe.checkpoint.torch_dist.options import saved_options
from nemo_skymoe.checkpoint.torch_dist.run_config import RUN_CONFIG
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.durable.errors import CheckpointError
from nemo_skymoe.experiments.catalogue import Chosen
from nemo_skymoe.pipeline.division import check_division


def check_ranks(chosen: Chosen, overrides: Mapping[str, Any]) -> None:
    """Refuse ranks that do not divide the model, and a batch that does not divide among the ranks.

    Args:
        chosen: The training.
        overrides: Options of the model that take the place of the training's.

    Raises:
        ConfigurationError: The message names the options.
    """
    training = chosen.run
    ranks = training.num_nodes * training.num_gpus_per_node
    parallel = training.edp * training.pipeline_parallelism
    if parallel < 1 or ranks < 1 or ranks % parallel:
        raise ConfigurationError(
            f"training has {ranks} ranks, expected a multiple of edp={training.edp} x"
            f" pipeline_parallelism={training.pipeline_parallelism}"
        )
    batch = training.micro_batch_size * (ranks // parallel)
    if batch < 1 or training.global_batch_size % batch:
        raise ConfigurationError(
            f"training.global_batch_size is {training.global_batch_size}, expected a multiple of micro_batch_size="
            f"{training.micro_batch_size} x {ranks // parallel} data-parallel ranks"
        )
    sizes = {
        "tensor_model_parallel_size": training.edp,
        "pipeline_model_parallel_size": training.pipeline_parallelism,
        "pipeline_model_parallel_layout": training.pipeline_layout,
        "num_moe_experts": None,
        "moe_layer_freq": 1,
    }
    check_division(SimpleNamespace(**sizes | _options(chosen) | dict(overrides)))


def check_checkpoints(chosen: Chosen, folder: str, overrides: Mapping[str, Any]) -> None:
    """Refuse to start or to continue as another model than a checkpoint's, if the checkpoint is on this machine.

    Args:
        chosen: The training.
        folder: The folder where the run keeps its checkpoints.
        overrides: Options of the model that take the place of the training's.

    Raises:
        ConfigurationError: The message has every difference with the option that decides.
    """
    wanted = _options(chosen) | dict(overrides)
    for path in filter(None, [folder, chosen.given.resume_path]):
        try:
            checkpoint = checkpoint_of(Path(path))
        except CheckpointError:
            continue  # the training says what is wrong with it
        if (checkpoint / RUN_CONFIG).is_file() and (saved := saved_options(checkpoint)) is not None:
            check_deciding(saved, wanted, wanted.get(CHANGES), checkpoint, "model.{}".format)


def _options(chosen: Chosen) -> dict[str, Any]:
    """Return the options of the model as the front door is going to set them."""
    run = chosen.run
    described = Description(
        run.architecture,
        rope_theta=float(run.rotary_base),
        moe_router_logit_norm_scale=run.logit_norm_scale,
    )
    return model_options(described, run.architecture.vocab_size) | dict(run.model_options)
