"""Configuration of Skywork-13B and Skywork-MoE: Llama's, and the experts' where there are any."""

from transformers import LlamaConfig


class SkyworkConfig(LlamaConfig):
    """Llama's options, and those of the experts (arXiv 2406.06563).

    Args:
        num_experts: Experts of an MoE layer, as a list of one number as the release writes it; None is a dense model.
        num_experts_per_tok: Experts that each token is sent to.
        moe_use_logits_norm: Normalise every token's gating logits before the softmax.
        moe_gate_norm_std: The standard deviation that they have afterwards.
        mlp_only_layers: Layers that are dense, counted from 0; None is an MoE in every layer.
        moe_intermediate_size: Size of an expert; None is that of a dense layer's MLP, `intermediate_size`.
        add_qkv_bias: Give the projections to queries, keys and values a bias, as in Qwen2.
        qk_layernorm: Normalise every head's queries and keys after their projection, as in Qwen3.
    """

    model_type = "skywork"

    def __init__(
        self,
        num_experts=None,
        num_experts_per_tok=2,
        moe_use_logits_norm=True,
        moe_gate_norm_std=1.0,
        mlp_only_layers=None,
        moe_intermediate_size=None,
        add_qkv_bias=False,
        qk_layernorm=False,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.moe_use_logits_norm = moe_use_logits_norm
        self.moe_gate_norm_std = moe_gate_norm_std
        self.mlp_only_layers = mlp_only_layers
        self.moe_intermediate_size = moe_intermediate_size
        self.add_qkv_bias = add_qkv_bias
        self.qk_layernorm = qk_layernorm
        if qk_layernorm:  # Qwen3's attention looks for the kind of its layer
            self.layer_types = ["full_attention"] * self.num_hidden_layers

    @property
    def experts_per_layer(self) -> int:
        """0 for a dense model."""
        counts = self.num_experts if isinstance(self.num_experts, list) else [self.num_experts]
        if len(set(counts)) != 1:
            raise ValueError(f"num_experts is {self.num_experts!r}, expected the same number in every layer")
        return counts[0] or 0
