"""The real Megatron model of a description, for measuring its tensors and for computing with it on one rank."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from nemo_skymoe import gpus
from nemo_skymoe.architecture import Architecture
from nemo_skymoe.checkpoint import rope
from nemo_skymoe.checkpoint.description import Description
from nemo_skymoe.moe.layer import SkyworkTransformerConfig, get_skywork_block_spec
from nemo_skymoe.moe.rotary import scale_rotary_embedding
from nemo_skymoe.patches import cpu_runtime
from nemo_skymoe.rotary_options import RotaryOptions


@dataclass
class _Config(RotaryOptions, SkyworkTransformerConfig):
    """Megatron's attention takes YaRN's concentration factor from the configuration."""


@contextmanager
def one_rank() -> Iterator[None]:
    """Create Megatron's process groups of a world of one, on the CPU runtime without CUDA, or use existing ones."""
    cpu_runtime.apply()
    if torch.distributed.is_initialized():
        yield
        return
    store = torch.distributed.HashStore()  # type: ignore[attr-defined]
    torch.distributed.init_process_group(gpus.backend(), store=store, rank=0, world_size=1)
    try:
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(0)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def gpt_model(
    description: Description, padded_vocab_size: int, layer_spec: str = "local", *, stacked: bool = True
) -> GPTModel:
    """Return this rank's part of the model as NeMo would build it, in float32, with undefined weights, not dropping.

    Args:
        description: The model's description.
        padded_vocab_size: Rows of embedding and head.
        layer_spec: "local", or "te" where Transformer Engine is installed.
        stacked: Whether its checkpoints have one tensor for all layers.
    """
    architecture = description.architecture
    scaling = rope.megatron_options(description.rope_scaling)
    interpolation = scaling.pop("seq_len_interpolation_factor")
    config = _Config(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_hidden_size,
        num_attention_heads=architecture.num_attention_heads,
        num_query_groups=architecture.query_groups,
        kv_channels=architecture.head_size,
        add_qkv_bias=architecture.add_qkv_bias,
        qk_layernorm=architecture.qk_layernorm,
        layernorm_epsilon=description.rms_norm_eps,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        hetereogenous_dist_checkpoint=not stacked,
        use_cpu_initialization=True,
        perform_initialization=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        persist_layer_norm=False,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        pipeline_dtype=torch.float32,
        **scaling,
        **(_moe_options(description, layer_spec) if architecture.num_moe_experts else {}),
    )
    model = GPTModel(
        config,
        cast(Any, get_skywork_block_spec(config, transformer_engine=layer_spec == "te")),
        padded_vocab_size,
        description.max_position_embeddings,
        position_embedding_type="rope",
        rotary_base=cast(int, description.rope_theta),
        seq_len_interpolation_factor=interpolation,
        share_embeddings_and_output_weights=architecture.tied_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    )
    scale_rotary_embedding(model, config)
    return model


def _layers(architecture: Architecture) -> dict[str, Any]:
    """Return the options that say which layers are MoE layers, or nothing if all are alike.

    Megatron names the tensors layer by layer if it is given any list at all.
    """
    if not architecture.layers_differ:
        return {}
    return {
        "moe_layer_freq": [int(moe) for moe in architecture.moe_layers],
        "moe_ffn_hidden_size": architecture.expert_ffn_hidden_size,
    }


def _moe_options(description: Description, layer_spec: str) -> dict[str, Any]:
    return {
        "num_moe_experts": description.architecture.num_moe_experts,
        "moe_router_topk": description.architecture.moe_router_topk,
        **_layers(description.architecture),
        "moe_router_dtype": "fp32",
        "moe_router_logit_norm_scale": description.moe_router_logit_norm_scale,
        "moe_router_logit_norm_correction": description.moe_router_logit_norm_correction,
        "moe_router_load_balancing_type": "none",
        "moe_adaptive_aux_loss": False,
        "moe_router_telemetry": False,
        "moe_grouped_gemm": layer_spec == "te",
        "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
        "expert_tensor_parallel_size": parallel_state.get_expert_tensor_parallel_world_size(),
    }
