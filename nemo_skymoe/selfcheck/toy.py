"""A small Skywork-MoE: its loss and every gradient, on the device and on the CPU."""

from typing import Any, cast

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from nemo_skymoe import gpus
from nemo_skymoe.moe.layer import SkyworkTransformerConfig, get_skywork_block_spec
from nemo_skymoe.selfcheck.finding import Finding, agreement
from nemo_skymoe.selfcheck.world import EXPERTS, TOPK, drawn, fill, relative, world

VOCABULARY, LENGTH, BATCH = 96, 32, 2
BOUND = 1e-10
LOSS = "loss"


def compare(cpu: dict[str, Tensor], device: dict[str, Tensor]) -> list[Finding]:
    """Return the verdict on the float64 model, whose values came from both."""
    differences = {name: relative(device[name], cpu[name]) for name in cpu}
    loss = differences.pop(LOSS)
    worst = max(differences, key=lambda name: differences[name])
    return [
        agreement("loss of a toy MoE in float64, device against CPU", loss, BOUND),
        agreement(f"its {len(differences)} gradients, the worst of {worst}", differences[worst], BOUND),
    ]


def values() -> dict[str, Tensor]:
    """Return the loss and the gradients by parameter of the model in float64, on this process's device."""
    with world():
        model = toy(torch.float64)
        return {LOSS: loss_of(model).detach().cpu()} | {
            name: cast(Tensor, parameter.grad).cpu() for name, parameter in model.named_parameters()
        }


def toy(dtype: torch.dtype, **options: Any) -> GPTModel:
    """Return the model on this process's device, with weights that follow from their names."""
    config = SkyworkTransformerConfig(
        num_layers=2,
        hidden_size=64,
        ffn_hidden_size=96,
        num_attention_heads=4,
        num_query_groups=2,
        num_moe_experts=EXPERTS,
        moe_router_topk=TOPK,
        moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=1e-2,
        moe_expert_capacity_factor=1.25,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        use_cpu_initialization=True,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        **options,
    )
    model = GPTModel(
        config,
        cast(Any, get_skywork_block_spec(config, transformer_engine=False)),
        VOCABULARY,
        LENGTH,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    ).to(gpus.device())
    fill(model)
    return model


def loss_of(model: GPTModel) -> Tensor:
    """Return the model's cross-entropy on fixed tokens, after its backward pass."""
    tokens = (drawn("tokens", (BATCH, LENGTH + 1)).abs() * 1e6).long() % VOCABULARY
    positions = torch.arange(LENGTH, device=tokens.device).expand(BATCH, LENGTH)
    logits = model(tokens[:, :-1], positions, attention_mask=None)
    # Megatron's own cross-entropy computes in float32.
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    return loss
