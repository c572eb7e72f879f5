"""The FLOPs of one token: those of the model, by which MFU is counted, and those that a GPU carries out.

A matrix product takes 2 FLOPs per weight and token forward, and 4 backward. MFU counts attention over the full square
of the sequence, as Megatron-LM, PaLM and arXiv 2310.19341 do (its Table 10 gives 94.1 GFLOP per token for Skywork-13B,
and we count 93.1). FlashAttention carries out the causal half of the square, and computes the scores once more in the
backward pass.
"""

from dataclasses import dataclass

from nemo_skymoe.architecture import Architecture

FORMULA = "6 x (activated matrix weights, output layer included, embedding not) + 12 x layers x seq_length x attention width"
PADDED_FORMULA = FORMULA + ", with experts x capacity_factor"


@dataclass(frozen=True)
class TokenFlops:
    """FLOPs of one token in forward and backward, over all layers."""

    attention_projections: float
    attention_core: float
    experts: float
    router: float
    output_layer: float

    @property
    def total(self) -> float:
        """Sum of all parts."""
        return sum(vars(self).values())


def model_flops(model: Architecture, seq_length: int, capacity: float = 1.0) -> TokenFlops:
    """Count the forward and backward FLOPs of one token, without recomputation and with experts computed `capacity`
    times.

    They are 157.9e9 for Skywork-MoE at sequence length 8192, and 93.1e9 for Skywork-13B at 4096. The MLP of a dense
    layer counts as its expert.
    """
    width = model.num_attention_heads * model.head_size
    computed = [layer.moe_router_topk * capacity if layer.num_moe_experts else 1.0 for layer in model.layers]
    return TokenFlops(
        attention_projections=6.0 * model.num_layers * model.attention_parameters,
        attention_core=12.0 * model.num_layers * width * seq_length,
        experts=sum(
            6.0 * layer.expert_parameters * experts
            for layer, experts in zip(model.layers, computed, strict=True)
        ),
        router=sum(6.0 * layer.router_parameters for layer in model.layers),
        output_layer=6.0 * model.vocab_size * model.hidden_size,
    )


def causal_attention_flops(model: Architecture, seq_length: int) -> tuple[float, float]:
    """Count one token's attention in one layer, (forward, backward): 2 and 5 products over half of the square."""
    product = model.num_attention_heads * model.head_size * seq_length
    return 2.0 * product, 5.0 * product
