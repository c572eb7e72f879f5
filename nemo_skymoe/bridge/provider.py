"""Providers: Bridge's configuration of a GPT model with the options and layers of Skywork-MoE.

Bridge 0.6 warns that providers will give way to `GPTModelConfig` with a builder. Its conversion of Hugging Face models,
its recipes and its adapters know only providers so far, so this is one. What is ours is in `SkyworkOptions` and in the
layer spec, which both forms take.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from nemo_skymoe import gpus
from nemo_skymoe.architecture import Architecture
from nemo_skymoe.config import ConfigurationError, SkyworkOptions
from nemo_skymoe.dispatchers import megatron_dispatcher
from nemo_skymoe.moe.layer import get_skywork_block_spec, have_transformer_engine
from nemo_skymoe.moe.rotary import scale_rotary_embedding
from nemo_skymoe.patches import expert_parallel_warning
from nemo_skymoe.pipeline.apply import apply_layout, apply_recompute
from nemo_skymoe.pipeline.written_plan import read_plan
from nemo_skymoe.rotary_options import RotaryOptions

_TE = have_transformer_engine()


def skywork_layer_spec(config: Any, vp_stage: int | None = None) -> Any:
    """Return the layer spec when Bridge builds a model. It is a module-level function so that it can be serialised."""
    return get_skywork_block_spec(config, vp_stage)


class _FinalizedProvider(GPTModelProvider):
    """Bridge's provider, whose `__post_init__` does what Bridge puts off until `finalize`."""

    def __post_init__(self) -> None:
        GPTModelProvider.finalize(self)


@dataclass
class SkyworkProvider(SkyworkOptions, RotaryOptions, _FinalizedProvider):
    """The architecture of Skywork-13B as Bridge's provider: untied head, RoPE, RMSNorm, SwiGLU and no biases.

    With `num_moe_experts` it is a Skywork-MoE. Features that need Transformer Engine or a GPU are off if these are
    absent, and only then. Nothing is checked before `finalize`, which Bridge calls once all overrides are in.
    """

    train_only_ffn: bool = False
    """Whether to train nothing but the weights of the MLPs (appendix C.2)."""
    pipeline_recompute: Any = None
    """`[stage][virtual stage]` is the number of layers of that chunk, from its first, that are recomputed in full. It
    belongs to a `pipeline_model_parallel_layout`. None leaves recomputation as the other options say."""

    pipeline_plan: str | None = None
    """A file of `skymoe plan --output`, in place of layout and recomputation, which become those of the file."""

    unpadded_vocab_size: int | None = None
    """Tokens of the vocabulary, where `vocab_size` counts rows of embedding and head that no token refers to. A
    conversion leaves these rows out."""

    transformer_layer_spec: Callable[..., Any] = skywork_layer_spec
    normalization: str = "RMSNorm"
    layernorm_epsilon: float = 1e-6
    activation_func: Callable[..., Any] = torch.nn.functional.silu
    gated_linear_unit: bool = True
    add_bias_linear: bool = False
    add_qkv_bias: bool = False
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    position_embedding_type: Any = "rope"
    share_embeddings_and_output_weights: bool = False
    init_method_std: float = 0.02

    moe_router_topk: int = 2
    moe_router_load_balancing_type: Any = "aux_loss"
    moe_router_dtype: str | None = "fp32"
    moe_aux_loss_coeff: Any = 1e-2
    moe_token_dispatcher_type: str = field(default_factory=megatron_dispatcher)
    moe_grouped_gemm: bool = _TE
    moe_permute_fusion: bool = _TE

    transformer_impl: str = "transformer_engine" if _TE else "local"
    use_cpu_initialization: bool = field(default_factory=gpus.absent)
    persist_layer_norm: bool = _TE
    apply_rope_fusion: bool = _TE
    masked_softmax_fusion: bool = field(default_factory=gpus.softmax_kernels)
    bias_activation_fusion: bool = field(default_factory=gpus.in_use)
    bias_dropout_fusion: bool = field(default_factory=gpus.in_use)
    cross_entropy_loss_fusion: bool = field(default_factory=gpus.in_use)

    def __post_init__(self) -> None:
        """Check nothing yet: Bridge sets further options before it calls `finalize`."""

    def finalize(self) -> None:
        """Check the options, and compute what follows from them. Bridge may call it again.

        Raises:
            ConfigurationError: A value cannot work. The message names the option and what was expected.
        """
        expert_parallel_warning.apply()
        self._read_plan()
        self._apply_layout()
        SkyworkOptions.__post_init__(self)

    def _read_plan(self) -> None:
        if self.pipeline_plan is None:
            return
        for name in ("pipeline_model_parallel_layout", "pipeline_recompute"):
            if getattr(self, name) is not None:
                raise ConfigurationError(
                    f"{name} is {getattr(self, name)!r} and pipeline_plan '{self.pipeline_plan}', expected one of them"
                )
        self.pipeline_model_parallel_layout, self.pipeline_recompute = read_plan(self.pipeline_plan)
        self.pipeline_plan = None  # a checkpoint says what the plan said

    def _apply_layout(self) -> None:
        layout, recompute = self.pipeline_model_parallel_layout, self.pipeline_recompute
        if recompute is not None and not _is_plan(recompute):
            raise ConfigurationError(
                f"pipeline_recompute is {recompute!r}, expected a list of each stage's recomputed layers by virtual stage"
            )
        if isinstance(layout, PipelineParallelLayerLayout):  # Bridge finalises more than once
            layout = layout.input_data
        if layout is None:
            if recompute is not None:
                raise ConfigurationError(
                    "pipeline_recompute says what each stage recomputes, but pipeline_model_parallel_layout is None:"
                    " expected the layout that it belongs to"
                )
        elif isinstance(layout, str):
            apply_layout(self, layout, recompute)

    def provide(self, *args: Any, **kwargs: Any) -> Any:
        """Return one chunk of the model, with what is not trained frozen before DDP and the optimizer see it."""
        model = super().provide(*args, **kwargs)
        scale_rotary_embedding(model, self)
        if self.train_only_ffn:
            for name, parameter in model.named_parameters():
                # Transformer Engine keeps the norm before the MLP inside the MLP.
                parameter.requires_grad_(".mlp." in name and "layer_norm" not in name)
        return model

    def provide_distributed_model(self, *args: Any, **kwargs: Any) -> list[Any]:
        """Return this rank's chunks as Bridge makes them, each of which recomputes the layers that the plan says."""
        model = super().provide_distributed_model(*args, **kwargs)
        if self.pipeline_recompute is not None:
            apply_recompute(model, self.pipeline_recompute)
        return model


def _is_plan(value: Any) -> bool:
    rows = value if isinstance(value, list | tuple) else [None]
    return all(isinstance(row, list | tuple) and all(type(count) is int for count in row) for row in rows)


def provider_of(architecture: Architecture, **options: Any) -> SkyworkProvider:
    """Return a provider of a model with these sizes.

    Args:
        architecture: The sizes of the model.
        options: Further fields of `SkyworkProvider`, which take precedence.
    """
    sizes = architecture.megatron_sizes() | {
        "vocab_size": architecture.vocab_size,
        "share_embeddings_and_output_weights": architecture.tied_embeddings,
    }
    if architecture.num_moe_experts is not None:
        frequency = architecture.moe_layer_freq
        sizes |= {
            "num_moe_experts": architecture.num_moe_experts,
            "moe_router_topk": architecture.moe_router_topk,
            "moe_ffn_hidden_size": architecture.expert_ffn_hidden_size,
            "moe_layer_freq": frequency if isinstance(frequency, int) else list(frequency),
            "moe_edp": True,
        }
    return SkyworkProvider(**{**sizes, **options})
