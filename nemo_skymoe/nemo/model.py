"""NeMo model and configuration classes. They never move, because checkpoints name them by their module's path."""
# No `from __future__ import annotations`: NeMo-Run and NeMo's serialisation read these annotations.

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Optional

import torch
from megatron.core.transformer.spec_utils import ModuleSpec
from nemo.collections.llm.gpt.model.base import GPTModel
from nemo.collections.llm.gpt.model.llama import LlamaConfig
from nemo.collections.llm.utils import Config
from nemo.lightning import OptimizerModule
from torch import nn

from nemo_skymoe import gpus
from nemo_skymoe.architecture import SKYWORK_13B, SKYWORK_MOE_146B
from nemo_skymoe.config import SkyworkOptions
from nemo_skymoe.dispatchers import megatron_dispatcher
from nemo_skymoe.experiments import demonstration, dense_13b, figure_1, figure_7, figure_8, moe_146b
from nemo_skymoe.experiments.demonstration import SKYWORK_TINY
from nemo_skymoe.experiments.figure_1 import SKYWORK_300M, SKYWORK_MOE_300M_X8
from nemo_skymoe.experiments.figure_7 import SKYWORK_MOE_1P8B
from nemo_skymoe.experiments.figure_8 import SKYWORK_1P3B, SKYWORK_MOE_1P3B_X8
from nemo_skymoe.moe.batch_padding import on_this_context_rank, padding_of
from nemo_skymoe.moe.controller import find_routers
from nemo_skymoe.moe.layer import get_skywork_block_spec, have_transformer_engine
from nemo_skymoe.moe.padding import padding_told
from nemo_skymoe.moe.rotary import scale_rotary_embedding
from nemo_skymoe.moe.router import SkyworkRouter
from nemo_skymoe.nemo.connectors import connect
from nemo_skymoe.nemo.padding import Remembering
from nemo_skymoe.patches import expert_parallel_warning
from nemo_skymoe.rotary_options import RotaryOptions

_TE = have_transformer_engine()
_PADDING = "routers_padding_mask"


def skywork_layer_spec(config: Any, vp_stage: Optional[int] = None) -> Any:
    """Return the layer spec when NeMo builds a model. This is a module-level function so that recipes serialise."""
    return get_skywork_block_spec(config, vp_stage)


def skywork_local_layer_spec(config: Any, vp_stage: Optional[int] = None) -> Any:
    """Return the layer spec of Megatron's own modules, whether Transformer Engine is installed or not."""
    return get_skywork_block_spec(config, vp_stage, transformer_engine=False)


@dataclass
class SkyworkConfig(RotaryOptions, LlamaConfig):
    """The architecture of Skywork-13B: a Llama with untied head, RoPE, RMSNorm, SwiGLU and no biases.

    Features that need Transformer Engine or a GPU are off if these are absent, and only then.
    """

    train_only_ffn: bool = False
    """Whether to train nothing but the weights of the MLPs (appendix C.2). Models that are trained like this from one
    checkpoint have everything else in common, norms included. An MoE that takes its experts from them can share it."""
    differs_from_checkpoint: Optional[list[str]] = None
    """The options in which the model is another on purpose than the checkpoint that it starts from, as in
    `SkyworkOptions`."""

    transformer_layer_spec: ModuleSpec | Callable[..., Any] = skywork_layer_spec
    layernorm_epsilon: float = 1e-6
    init_method_std: float = 0.02
    use_cpu_initialization: bool = field(default_factory=gpus.absent)
    persist_layer_norm: bool = _TE
    apply_rope_fusion: bool = _TE
    masked_softmax_fusion: bool = field(default_factory=gpus.softmax_kernels)
    bias_activation_fusion: bool = field(default_factory=gpus.in_use)
    bias_dropout_fusion: bool = field(default_factory=gpus.in_use)
    cross_entropy_loss_fusion: bool = field(default_factory=gpus.in_use)

    # NeMo (lightning/io/mixin.py) captures the arguments of a class from its first use on, and takes the mark that it has
    # done so from the base too: after a base, a class would be captured no more, and the further chunks of a virtual
    # pipeline would be built without the parallel sizes.
    __wrapped_init__ = False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.__wrapped_init__ = False

    def configure_model(self, *args: Any, **kwargs: Any) -> Any:
        """Return NeMo's model of this pipeline stage, with the rotary embedding scaled."""
        model = super().configure_model(*args, **kwargs)
        scale_rotary_embedding(model, self)
        return model


@dataclass
class SkyworkMoEDefaults(SkyworkOptions):
    """A mixin that makes a dense configuration a Skywork-MoE with 16 experts, two per token (Table 2).

    The experts have the dense MLP's size. The mixin has none of Megatron's fields, so it goes in front of any dense
    configuration and leaves its sizes alone.
    """

    num_moe_experts: Optional[int] = SKYWORK_MOE_146B.num_moe_experts
    moe_router_topk: int = SKYWORK_MOE_146B.moe_router_topk
    moe_router_load_balancing_type: str = "aux_loss"
    moe_router_dtype: Optional[str] = "fp32"
    moe_aux_loss_coeff: float = 1e-2
    moe_token_dispatcher_type: str = field(default_factory=megatron_dispatcher)
    moe_grouped_gemm: bool = _TE
    moe_permute_fusion: bool = _TE
    moe_edp: bool = True

    def __post_init__(self) -> None:
        expert_parallel_warning.apply()
        super().__post_init__()


@dataclass
class SkyworkMoEConfig(SkyworkMoEDefaults, SkyworkConfig):
    """A Skywork-MoE whose sizes are the caller's."""


@dataclass
class Skywork13BConfig(SkyworkConfig):
    """Skywork-13B (arXiv 2310.19341), dense, at its vocabulary of 65,519 padded to 65,536."""

    num_layers: int = SKYWORK_13B.num_layers
    hidden_size: int = SKYWORK_13B.hidden_size
    ffn_hidden_size: int = SKYWORK_13B.ffn_hidden_size
    num_attention_heads: int = SKYWORK_13B.num_attention_heads
    seq_length: int = dense_13b.PRETRAINING.seq_length
    rotary_base: int = dense_13b.PRETRAINING.rotary_base


@dataclass
class SkyworkMoE146BConfig(SkyworkMoEDefaults, Skywork13BConfig):
    """Skywork-MoE (Table 2): Skywork-13B with 16 experts in every layer, native sequence length 8192."""

    seq_length: int = moe_146b.PRETRAINING.seq_length


@dataclass
class Skywork300MConfig(SkyworkConfig):
    """Figure 1's dense model of 0.3B parameters; 343M with both embeddings of 65,536 rows."""

    num_layers: int = SKYWORK_300M.num_layers
    hidden_size: int = SKYWORK_300M.hidden_size
    ffn_hidden_size: int = SKYWORK_300M.ffn_hidden_size
    num_attention_heads: int = SKYWORK_300M.num_attention_heads
    seq_length: int = figure_1.DENSE.seq_length


@dataclass
class SkyworkMoE300MX8Config(SkyworkMoEDefaults, Skywork300MConfig):
    """Figure 1's MoE: the 0.3B dense model with 8 experts in every layer."""

    num_moe_experts: Optional[int] = SKYWORK_MOE_300M_X8.num_moe_experts


@dataclass
class SkyworkMoE2p5BConfig(SkyworkMoEDefaults, Skywork300MConfig):
    """Figure 3's MoE of 2.5B parameters, 16 experts; 2.46B without embeddings."""


@dataclass
class SkyworkMoE1p8BConfig(SkyworkMoEDefaults, SkyworkConfig):
    """Figure 7's MoE of 1.8B parameters, 32 experts, 150M active; 1.84B and 142M without embeddings."""

    num_layers: int = SKYWORK_MOE_1P8B.num_layers
    hidden_size: int = SKYWORK_MOE_1P8B.hidden_size
    ffn_hidden_size: int = SKYWORK_MOE_1P8B.ffn_hidden_size
    num_attention_heads: int = SKYWORK_MOE_1P8B.num_attention_heads
    seq_length: int = figure_7.MOE.seq_length
    num_moe_experts: Optional[int] = SKYWORK_MOE_1P8B.num_moe_experts


@dataclass
class Skywork1p3BConfig(SkyworkConfig):
    """Figure 8's dense model of 1.3B parameters; 1.35B with one embedding of 65,536 rows."""

    num_layers: int = SKYWORK_1P3B.num_layers
    hidden_size: int = SKYWORK_1P3B.hidden_size
    ffn_hidden_size: int = SKYWORK_1P3B.ffn_hidden_size
    num_attention_heads: int = SKYWORK_1P3B.num_attention_heads
    seq_length: int = figure_8.DENSE.seq_length


@dataclass
class SkyworkMoE1p3BX8Config(SkyworkMoEDefaults, Skywork1p3BConfig):
    """Figure 8's MoE: the 1.3B dense model with 8 experts in every layer."""

    num_moe_experts: Optional[int] = SKYWORK_MOE_1P3B_X8.num_moe_experts


@dataclass
class SkyworkTinyConfig(SkyworkConfig):
    """Skywork-13B's architecture at about 2M parameters, for a laptop."""

    num_layers: int = SKYWORK_TINY.num_layers
    hidden_size: int = SKYWORK_TINY.hidden_size
    ffn_hidden_size: int = SKYWORK_TINY.ffn_hidden_size
    num_attention_heads: int = SKYWORK_TINY.num_attention_heads
    seq_length: int = demonstration.DENSE.seq_length


@dataclass
class SkyworkMoETinyConfig(SkyworkMoEDefaults, SkyworkTinyConfig):
    """`SkyworkTinyConfig` upcycled: 16 experts, top-2, an MoE in every layer."""

    moe_expert_capacity_factor: Optional[float] = demonstration.MOE.expert_capacity_factor


class SkyworkModel(GPTModel):
    """A NeMo GPT model whose configuration is a `SkyworkConfig`."""

    tells_padding = True
    """True because the routers of an MoE are told which positions of a batch are padding."""

    def __init__(
        self,
        config: Annotated[Optional[SkyworkConfig], Config[SkyworkConfig]] = None,
        optim: Optional[OptimizerModule] = None,
        tokenizer: Optional[Any] = None,
        model_transform: Optional[Callable[[nn.Module], nn.Module]] = None,
    ):
        super().__init__(
            config or SkyworkConfig(), optim=optim, tokenizer=tokenizer, model_transform=model_transform
        )

    def configure_model(self, vp_stage: Optional[int] = None) -> None:
        """Build this pipeline stage's part, and freeze what is not trained before DDP and the optimizer see it."""
        super().configure_model(vp_stage)
        if getattr(self.config, "train_only_ffn", False):
            for name, parameter in self.module.named_parameters():
                # Transformer Engine keeps the norm before the MLP inside the MLP.
                parameter.requires_grad_(".mlp." in name and "layer_norm" not in name)

    def data_step(self, dataloader_iter: Iterator[Any]) -> dict[str, torch.Tensor]:
        """Return NeMo's batch and, for an MoE, which of its positions are padding."""
        batches = Remembering(dataloader_iter)
        step: Any = super().data_step(batches)
        if self._routers and isinstance(step, dict):
            step[_PADDING] = on_this_context_rank(padding_of(batches.last), self._routers[0].weight.device)
        return step

    def forward_step(self, batch: Any) -> torch.Tensor:
        """Run NeMo's forward pass, with routers that know the batch's padding."""
        with padding_told(self._routers, batch.get(_PADDING) if isinstance(batch, dict) else None):
            return super().forward_step(batch)

    @functools.cached_property
    def _routers(self) -> list[SkyworkRouter]:
        return list(find_routers([self.module]).values())


class SkyworkMoEModel(SkyworkModel):
    """A NeMo GPT model whose configuration is a `SkyworkMoEConfig`."""

    def __init__(
        self,
        config: Annotated[Optional[SkyworkConfig], Config[SkyworkMoEConfig]] = None,
        optim: Optional[OptimizerModule] = None,
        tokenizer: Optional[Any] = None,
        model_transform: Optional[Callable[[nn.Module], nn.Module]] = None,
    ):
        super().__init__(
            config or SkyworkMoEConfig(), optim=optim, tokenizer=tokenizer, model_transform=model_transform
        )


for _model in (SkyworkModel, SkyworkMoEModel):
    connect(_model)
