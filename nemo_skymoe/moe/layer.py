"""The MoE layer and the layer specs that put it into a Megatron-Core GPT model."""

import functools
import logging
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar, cast

from megatron.core.models.gpt.gpt_layer_specs import (
    HAVE_TE,
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import transformer_layer
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.token_dispatcher import MoEAllGatherTokenDispatcher
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from nemo_skymoe.config import ConfigurationError, SkyworkOptions
from nemo_skymoe.moe import edp
from nemo_skymoe.moe.adoption import adopt
from nemo_skymoe.moe.capacity import with_capacity_in_reach
from nemo_skymoe.moe.dispatcher import EdpTokenDispatcher
from nemo_skymoe.moe.mesh import check_group_sizes
from nemo_skymoe.moe.norm import RMSNorm
from nemo_skymoe.moe.router import SkyworkRouter
from nemo_skymoe.patches import (
    context_parallel_aux_loss,
    either_layers,
    expert_parallel_warning,
    router_without_te,
)


@dataclass
class SkyworkTransformerConfig(SkyworkOptions, TransformerConfig):
    """Megatron's `TransformerConfig` with the options of Skywork-MoE, for use without NeMo."""

    def __post_init__(self) -> None:
        expert_parallel_warning.apply()
        super().__post_init__()


class SkyworkMoELayer(MoELayer):
    """Megatron's MoE layer with the Skywork router and, under `moe_edp`, one of our dispatchers.

    A subclass of the layer selects another router or dispatcher by naming its class. The constructor checks that the
    process groups are those that the configuration describes.

    Attributes:
        router_class: The class of the layer's router.
        dispatcher_class: The class of the layer's dispatcher under `moe_edp`; None for the one that `edp_dispatcher`
            names.

    Raises:
        ConfigurationError: The process groups, the router or the dispatcher do not fit the configuration.
    """

    router_class: ClassVar[type[SkyworkRouter]] = SkyworkRouter
    dispatcher_class: ClassVar[type[EdpTokenDispatcher] | None] = None

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        router_without_te.apply()
        context_parallel_aux_loss.apply()
        super().__init__(with_capacity_in_reach(config), *args, **kwargs)
        if type(self.router) is not self.router_class:
            self.router = self.router_class.adopt(self.router)
        check_group_sizes(
            config,
            tensor_model_parallel_size=self.attn_tp_group,
            context_parallel_size=self.router.cp_group,
            expert_model_parallel_size=self.ep_group,
            expert_tensor_parallel_size=cast(Any, self.token_dispatcher).tp_group,
        )
        self._check_gathered_tokens()
        if cast(SkyworkOptions, config).moe_edp:
            edp.install(self, self.dispatcher_class)
        elif self.dispatcher_class is not None:
            raise ConfigurationError(
                f"moe_edp is False, expected True with the dispatcher_class {self.dispatcher_class.__name__} of"
                f" {type(self).__name__}: it dispatches over the tensor-parallel group"
            )
        elif type(self.token_dispatcher) is MoEAllGatherTokenDispatcher:
            self.token_dispatcher = adopt(self.token_dispatcher, StockAllGatherTokenDispatcher)

    def _check_gathered_tokens(self) -> None:
        """Refuse Megatron 0.14's all-gather with shared experts, which overwrite the buffer of the gathered tokens."""
        config: Any = self.config
        shares_buffer = config.sequence_parallel and self.use_shared_expert
        after_dispatch = not hasattr(MoELayer, "shared_experts_compute")
        stock = type(self.token_dispatcher) is MoEAllGatherTokenDispatcher and not config.moe_edp
        if shares_buffer and after_dispatch and stock:
            raise ConfigurationError(
                "moe_token_dispatcher_type is 'allgather' with moe_shared_expert_intermediate_size and"
                " sequence_parallel=True, with which Megatron-Core 0.14 overwrites the gathered tokens; expected"
                " 'alltoall', or moe_edp=True"
            )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run Megatron's forward pass, after refusing a layout that cannot train with a message of our own."""
        if self.training:
            cast(SkyworkOptions, self.config).check_training()
        return super().forward(*args, **kwargs)


class StockAllGatherTokenDispatcher(MoEAllGatherTokenDispatcher):
    """Megatron's dispatcher, except that it combines in the model's dtype instead of the router weights' float32."""

    def token_combine(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Sum [T, H] over the ranks to this rank's [t, H]. Megatron takes the dtype of the sum from `local_probs`."""
        self.local_probs = self.local_probs.to(hidden_states.dtype)
        return super().token_combine(hidden_states, *args, **kwargs)


def have_transformer_engine() -> bool:
    """Say whether Megatron-Core could import Transformer Engine, and can make layers of it."""
    return HAVE_TE


def get_skywork_moe_layer_spec(
    config: TransformerConfig, moe_layer: type[SkyworkMoELayer] = SkyworkMoELayer
) -> ModuleSpec:
    """Make the spec of one transformer layer, for `GPTModel(transformer_layer_spec=...)` if all layers are alike.

    The layer is Transformer Engine's if that can be imported, else Megatron's local one. If `config.num_moe_experts` is
    set, its MLP is a `moe_layer`; otherwise it is the dense layer of Skywork-13B.

    Args:
        config: The model's configuration.
        moe_layer: `SkyworkMoELayer`, or a subclass with another router or dispatcher.

    Raises:
        ConfigurationError: Sequence parallelism is on without Transformer Engine. It needs another final norm, which
            the spec of one layer cannot bring.
    """
    if config.sequence_parallel and not have_transformer_engine():
        raise ConfigurationError(
            "sequence_parallel=True without Transformer Engine needs a final norm that supports it, which a spec of one"
            " layer does not bring: expected get_skywork_block_spec instead of get_skywork_moe_layer_spec"
        )
    either_layers.apply()
    get_spec = get_gpt_layer_local_spec
    if have_transformer_engine():
        get_spec = get_gpt_layer_with_transformer_engine_spec
    spec = get_spec(
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=config.moe_grouped_gemm,
        qk_layernorm=config.qk_layernorm,
    )
    _adapt(spec, config, have_transformer_engine(), moe_layer)
    return spec


def get_skywork_block_spec(
    config: TransformerConfig,
    vp_stage: int | None = None,
    transformer_engine: bool | None = None,
    moe_layer: type[SkyworkMoELayer] = SkyworkMoELayer,
) -> TransformerBlockSubmodules:
    """Make the specs of this pipeline stage's layers and of the final norm, for `GPTModel(transformer_layer_spec=...)`.

    `config.moe_layer_freq` says which layers are MoE layers.

    Args:
        config: The model's configuration.
        vp_stage: The virtual pipeline stage; None without virtual stages.
        transformer_engine: Whether to use Transformer Engine's layers; None uses them if it can be imported.
        moe_layer: `SkyworkMoELayer`, or a subclass with another router or dispatcher.

    Raises:
        ConfigurationError: The configuration needs a norm that exists only with Transformer Engine.
    """
    if transformer_engine is None:
        transformer_engine = have_transformer_engine()
    either_layers.apply()
    logging.getLogger(transformer_layer.__name__).addFilter(_not_about_the_mlp)
    spec = get_gpt_decoder_block_spec(config, transformer_engine, vp_stage=vp_stage)
    for layer_spec in spec.layer_specs or ():
        _adapt(layer_spec, config, transformer_engine, moe_layer)
    if _needs_local_norm(config, transformer_engine):
        spec.layer_norm = cast(Any, RMSNorm)
    return spec


def _adapt(
    spec: ModuleSpec, config: TransformerConfig, transformer_engine: bool, moe_layer: type[SkyworkMoELayer]
) -> None:
    """Put the Skywork classes into one of Megatron's layer specs, which layers may share."""
    submodules = cast(Any, spec.submodules)
    if not transformer_engine:
        _check_softmax(config)
    if _needs_local_norm(config, transformer_engine):
        submodules.input_layernorm = submodules.pre_mlp_layernorm = RMSNorm
        attention = submodules.self_attention.submodules
        if config.qk_layernorm and hasattr(attention, "k_layernorm"):
            attention.q_layernorm = attention.k_layernorm = RMSNorm
    mlp = submodules.mlp
    if isinstance(mlp, functools.partial):  # megatron-core 0.18 names the class to build instead of a spec
        if mlp.func is MoELayer:
            submodules.mlp = functools.partial(moe_layer, *mlp.args, **mlp.keywords)
    elif mlp.module is MoELayer:
        mlp.module = moe_layer


def _check_softmax(config: TransformerConfig) -> None:
    """Refuse a fusion that Megatron's own attention asks Apex for, in the middle of the first step."""
    if not config.masked_softmax_fusion or not (config.bf16 or config.fp16):
        return
    if find_spec("scaled_masked_softmax_cuda") is None:
        raise ConfigurationError(
            "masked_softmax_fusion is True, expected False: without Transformer Engine it needs Apex's kernels"
            " (scaled_masked_softmax_cuda), which are not installed"
        )


def _not_about_the_mlp(record: logging.LogRecord) -> bool:
    """Filter out Megatron's warning about MLP classes that it does not know, which it gives once per layer."""
    return "Unknown MLP type" not in record.getMessage()


def _needs_local_norm(config: TransformerConfig, transformer_engine: bool) -> bool:
    """Say whether our norm has to replace Megatron's, which refuses sequence parallelism without Transformer Engine."""
    if transformer_engine:
        return False
    if config.layernorm_zero_centered_gamma:
        raise ConfigurationError(
            "layernorm_zero_centered_gamma=True needs Transformer Engine, expected False without it"
        )
    if config.sequence_parallel and config.normalization != "RMSNorm":
        raise ConfigurationError(
            f"normalization is {config.normalization!r} with sequence_parallel=True, which needs Transformer Engine;"
            " expected 'RMSNorm' without it"
        )
    return config.normalization == "RMSNorm"
