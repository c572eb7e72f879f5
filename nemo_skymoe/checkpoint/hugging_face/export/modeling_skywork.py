"""Skywork-13B and Skywork-MoE (arXiv 2406.06563) in transformers: Llama, with experts where the configuration has any.

An MoE that was made of a Qwen has Qwen's attention.

Shape suffixes: T tokens, H hidden, E experts, K experts a token.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaForCausalLM, LlamaModel

from .configuration_skywork import SkyworkConfig

# Rows of gating logits that differ less than this count as equal.
_FLAT = 1e-6


class SkyworkExpert(nn.Module):
    """A SwiGLU MLP under Mixtral's names: w1 is the gate, w3 the linear branch, w2 the way down."""

    def __init__(self, config: SkyworkConfig):
        super().__init__()
        hidden, ffn = config.hidden_size, config.moe_intermediate_size or config.intermediate_size
        self.w1 = nn.Linear(hidden, ffn, bias=False)
        self.w2 = nn.Linear(ffn, hidden, bias=False)
        self.w3 = nn.Linear(hidden, ffn, bias=False)

    def forward(self, x_TH: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x_TH)) * self.w3(x_TH))


def normalize_gating_logits(logits_TE: Tensor, std: float) -> Tensor:
    """Mean zero and sample standard deviation `std` for every token (eq. 6); equal logits become zeros."""
    # In float64, where the square of every float32 is a number.
    centred = logits_TE.double() - logits_TE[..., :1]
    centred = centred - centred.mean(dim=-1, keepdim=True)
    freedom = max(logits_TE.shape[-1] - 1, 1)
    found_T1 = torch.linalg.vector_norm(centred, dim=-1, keepdim=True) * freedom**-0.5
    return (centred * (std / found_T1).masked_fill(found_T1 <= _FLAT, 0.0)).to(logits_TE.dtype)


class SkyworkSparseMoE(nn.Module):
    """Every token to its top-k experts, weighted by the softmax over those k; nothing is ever dropped."""

    def __init__(self, config: SkyworkConfig):
        super().__init__()
        self.topk = config.num_experts_per_tok
        self.norm_std = config.moe_gate_norm_std if config.moe_use_logits_norm else None
        self.gate = nn.Linear(config.hidden_size, config.experts_per_layer, bias=False)
        self.experts = nn.ModuleList(SkyworkExpert(config) for _ in range(config.experts_per_layer))

    def route(self, x_TH: Tensor) -> tuple[Tensor, Tensor]:
        """Weights [T, K] in float32 or wider, and which experts [T, K]."""
        dtype = torch.promote_types(x_TH.dtype, torch.float32)
        with torch.autocast(x_TH.device.type, enabled=False):
            logits_TE = F.linear(x_TH.to(dtype), self.gate.weight.to(dtype))
            if self.norm_std is not None:
                logits_TE = normalize_gating_logits(logits_TE, self.norm_std)
            top_TK, experts_TK = logits_TE.topk(self.topk, dim=-1)
            # A softmax over the top k is a softmax over all, divided by the sum of its top k.
            return top_TK.softmax(dim=-1), experts_TK

    def forward(self, hidden_states: Tensor) -> Tensor:
        x_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        weights_TK, experts_TK = self.route(x_TH)
        output_TH = torch.zeros_like(x_TH, dtype=weights_TK.dtype)
        for index in experts_TK.unique().tolist():
            tokens, places = torch.where(experts_TK == index)
            result = self.experts[index](x_TH[tokens])
            output_TH.index_add_(0, tokens, result * weights_TK[tokens, places, None])
        return output_TH.to(hidden_states.dtype).view_as(hidden_states)


def attention_with_options(config: SkyworkConfig, layer_idx: int) -> nn.Module:
    """Llama's attention, or Qwen3's, which has norms of queries and keys; with biases where the configuration says so."""
    if config.qk_layernorm:
        from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention as Attention
    else:
        from transformers.models.llama.modeling_llama import LlamaAttention as Attention
    attention: nn.Module = Attention(config, layer_idx)  # type: ignore[arg-type]
    if config.add_qkv_bias:
        for name in ("q_proj", "k_proj", "v_proj"):
            matrix = getattr(attention, name)
            setattr(attention, name, nn.Linear(matrix.in_features, matrix.out_features, bias=True))
    return attention


class SkyworkDecoderLayer(LlamaDecoderLayer):
    """Llama's layer, whose attention may have biases, and norms of queries and keys."""

    def __init__(self, config: SkyworkConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        if config.add_qkv_bias or config.qk_layernorm:
            self.self_attn = attention_with_options(config, layer_idx)


class SkyworkMoELayer(SkyworkDecoderLayer):
    """The same layer with the experts in place of its MLP."""

    def __init__(self, config: SkyworkConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        del self._modules["mlp"]
        self.block_sparse_moe = SkyworkSparseMoE(config)

    @property
    def mlp(self) -> SkyworkSparseMoE:
        """What the inherited forward pass calls."""
        return self.block_sparse_moe


class SkyworkModel(LlamaModel):
    """The decoder without its output layer."""

    config_class = SkyworkConfig
    _no_split_modules: ClassVar[list[str]] = ["LlamaDecoderLayer", "SkyworkDecoderLayer", "SkyworkMoELayer"]
    # Which experts a token meets is known only while it runs.
    _can_compile_fullgraph = False

    def __init__(self, config: SkyworkConfig):
        super().__init__(config)
        layers = range(config.num_hidden_layers)
        dense = set(config.mlp_only_layers or () if config.experts_per_layer else layers)
        self.layers = nn.ModuleList(
            (SkyworkDecoderLayer if i in dense else SkyworkMoELayer)(config, i) for i in layers
        )
        self.post_init()


class SkyworkForCausalLM(LlamaForCausalLM):
    """Dense or MoE, as `config.num_experts` says."""

    config_class = SkyworkConfig
    _no_split_modules: ClassVar[list[str]] = SkyworkModel._no_split_modules
    _can_compile_fullgraph = False

    def __init__(self, config: SkyworkConfig):
        super().__init__(config)
        self.model = SkyworkModel(config)
        self.post_init()
