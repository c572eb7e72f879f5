"""Check that the parallel sizes divide a model's heads, MLPs and layers, which Megatron finds out when it builds the model."""

from typing import Any

from nemo_skymoe.config import ConfigurationError


def check_division(config: Any) -> None:
    """Refuse tensor-parallel ranks that do not divide a layer, and pipeline stages that do not divide the layers.

    Several ranks may have one key-value head between them in Megatron-Core 0.16 and later. Before, Megatron's own
    configuration refuses this. A pipeline's layout says by itself which layers are where, and is checked where it is
    applied.

    Args:
        config: Any object with the options of Megatron's model and its parallel sizes.

    Raises:
        ConfigurationError: The message names both options.
    """
    tensor = config.tensor_model_parallel_size
    heads = config.num_attention_heads
    split = {"num_attention_heads": heads}
    experts = config.num_moe_experts
    if not experts or config.moe_layer_freq not in (1, [1] * config.num_layers):
        split["ffn_hidden_size"] = config.ffn_hidden_size
    for option, size in split.items():
        if size % tensor:
            raise ConfigurationError(
                f"{option} is {size}, expected a multiple of tensor_model_parallel_size = {tensor}"
            )
    groups = config.num_query_groups or heads
    if groups % tensor and tensor % groups:
        raise ConfigurationError(
            f"num_query_groups is {groups}, expected a multiple or a divisor of tensor_model_parallel_size = {tensor}"
        )
    _check_stages(config)


def _check_stages(config: Any) -> None:
    stages = config.pipeline_model_parallel_size
    told = ("pipeline_model_parallel_layout", "pipeline_plan")
    if stages == 1 or any(getattr(config, option, None) is not None for option in told):
        return
    layers, left = config.num_layers, stages
    counted = "num_layers"
    for option in ("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split"):
        if getattr(config, option, False):
            layers, counted = layers + 1, f"{counted} with {option}"
    for option in ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"):
        if (own := getattr(config, option, None)) is not None:
            layers, left, counted = layers - own, left - 1, f"{counted} without {option}"
    chunks = left * (getattr(config, "virtual_pipeline_model_parallel_size", None) or 1)
    if layers < chunks or (chunks and layers % chunks):
        raise ConfigurationError(
            f"{counted} is {layers}, expected a multiple of the {chunks} chunks of pipeline_model_parallel_size ="
            f" {stages}, or a pipeline_model_parallel_layout"
        )
