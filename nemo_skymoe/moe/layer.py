"""The MoE layer and the layer specs that put it into a Megatron-Core GPT model."""

import importlib.util
import warnings
from dataclasses import dataclass
from typing import Any, cast

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from nemo_skymoe.config import SkyworkOptions
from nemo_skymoe.moe import edp
from nemo_skymoe.moe.norm import RMSNorm
from nemo_skymoe.moe.router import SkyworkRouter
from nemo_skymoe.patches import expert_parallel_warning, router_without_te


@dataclass
class SkyworkTransformerConfig(SkyworkOptions, TransformerConfig):
    """Megatron's `TransformerConfig` with the options of Skywork-MoE, for use without NeMo."""

    def __post_init__(self) -> None:
        expert_parallel_warning.apply()
        super().__post_init__()


class SkyworkMoELayer(MoELayer):
    """Megatron's MoE layer with the Skywork router; under EDP with our dispatcher, its process groups checked."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        router_without_te.apply()
        super().__init__(config, *args, **kwargs)
        if not isinstance(self.router, SkyworkRouter):
            self.router = SkyworkRouter.adopt(self.router)
        if cast(SkyworkOptions, config).moe_edp:
            edp.install(self)


def have_transformer_engine() -> bool:
    """Whether Transformer Engine is installed."""
    return importlib.util.find_spec("transformer_engine") is not None


def get_skywork_moe_layer_spec(config: TransformerConfig) -> ModuleSpec:
    """One transformer layer: Transformer Engine's where it is installed, else Megatron's local one.

    With `config.num_moe_experts` its MLP is a `SkyworkMoELayer`; without, it is the dense layer of Skywork-13B.
    """
    if have_transformer_engine():
        spec = get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_moe_experts,
            moe_grouped_gemm=config.moe_grouped_gemm,
            qk_layernorm=config.qk_layernorm,
        )
    else:
        spec = get_gpt_layer_local_spec(
            num_experts=config.num_moe_experts,
            moe_grouped_gemm=config.moe_grouped_gemm,
            qk_layernorm=config.qk_layernorm,
        )
    submodules = cast(Any, spec.submodules)
    if not have_transformer_engine() and config.normalization == "RMSNorm":
        submodules.input_layernorm = submodules.pre_mlp_layernorm = RMSNorm
    if config.num_moe_experts:
        submodules.mlp.module = SkyworkMoELayer
    return spec


def get_skywork_block_spec(
    config: TransformerConfig, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """This pipeline stage's layers and the final norm; what `GPTModel(transformer_layer_spec=...)` takes.

    Megatron's default final norm refuses sequence parallelism where Transformer Engine is absent.
    """
    layer_spec = get_skywork_moe_layer_spec(config)
    if have_transformer_engine():
        from megatron.core.extensions.transformer_engine import TENorm

        norm: Any = TENorm
    else:
        norm = RMSNorm
    num_layers = get_num_layers_to_build(config, vp_stage)
    # Megatron warns of every MLP class it does not know, once a layer.
    warnings.filterwarnings("ignore", message="Unknown MLP type")
    return TransformerBlockSubmodules(layer_specs=[layer_spec] * num_layers, layer_norm=norm)
