"""Derive the planner's options from a recipe: its model, batch and parallel sizes."""

from typing import Any

import nemo_run as run

from nemo_skymoe.architecture import Architecture, layer_pattern
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.experiments import choices
from nemo_skymoe.nemo.recipe_check import built, vocabulary_of
from nemo_skymoe.nemo.run_numbers import check_numbers
from nemo_skymoe.recipes._trainer import overlaps_communication

_SIZES = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
)
_EXPERTS = ("num_moe_experts", "moe_router_topk")


def planner_options(recipe: Any) -> dict[str, Any]:
    """Return the options of `skymoe plan` for a recipe, except for the hardware.

    Raises:
        ConfigurationError: The cost model does not count the recipe's model or layout.
    """
    check_numbers(recipe.model.config, recipe.trainer, recipe.data)
    config, strategy, data = built(recipe.model.config, "model"), recipe.trainer.strategy, recipe.data
    sizes = {name: getattr(config, name) for name in _SIZES}
    sizes["ffn_hidden_size"] = config.ffn_hidden_size
    sizes["vocab_size"] = config.vocab_size or vocabulary_of(data) or choices.VOCABULARY
    if config.share_embeddings_and_output_weights:
        sizes["tied_embeddings"] = True
    capacity: dict[str, Any] = {}
    if config.num_moe_experts:
        sizes |= {name: getattr(config, name) for name in _EXPERTS}
        sizes |= _ffn_sizes(config)
        capacity = {
            "expert_parallel": strategy.expert_model_parallel_size,
            "capacity_factor": config.moe_expert_capacity_factor,
            "pad_to_capacity": config.moe_pad_expert_input_to_capacity,
        }
    _check_planned(config, strategy)
    return {
        "model": run.Config(Architecture, **{name: size for name, size in sizes.items() if size is not None}),
        "num_gpus": recipe.trainer.num_nodes * recipe.trainer.devices,
        "tensor_parallel": strategy.tensor_model_parallel_size,
        "context_parallel": strategy.context_parallel_size or 1,
        "pipeline_parallel": strategy.pipeline_model_parallel_size,
        "virtual_pipeline": strategy.virtual_pipeline_model_parallel_size or 1,
        "sequence_parallel": strategy.sequence_parallel,
        "seq_length": config.seq_length,
        "global_batch_size": data.global_batch_size,
        "micro_batch_size": data.micro_batch_size,
        "overlap_grad_reduce": overlaps_communication(recipe.trainer),
        "gradient_bytes": 4 if getattr(recipe.trainer.plugins, "grad_reduce_in_fp32", True) else 2,
        "distributed_optimizer": strategy.ddp.use_distributed_optimizer,
        **capacity,
    }


def _ffn_sizes(config: Any) -> dict[str, Any]:
    experts = config.moe_ffn_hidden_size or config.ffn_hidden_size
    pattern = layer_pattern(config.moe_layer_freq, config.num_layers)
    if all(pattern):
        return {"ffn_hidden_size": experts}
    return {
        "ffn_hidden_size": config.ffn_hidden_size,
        "moe_ffn_hidden_size": experts,
        "moe_layer_freq": pattern,
    }


def _check_planned(config: Any, strategy: Any) -> None:
    counted: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "expert_tensor_parallel_size": (strategy.expert_tensor_parallel_size, (None, 1)),
    }
    if config.num_moe_experts:
        counted["moe_shared_expert_intermediate_size"] = (
            config.moe_shared_expert_intermediate_size,
            (None, 0),
        )
    for name, (value, known) in counted.items():
        if value not in known:
            raise ConfigurationError(
                f"{name} is {value}, expected {known[-1]} for a plan: no other is counted"
            )
