"""A stack of MoE layers in any parallel layout: what it computed, by global name and in full size, on every rank.

Weights and tokens are functions of their names, so that every layout holds the same model and the same data. There
is no attention: nothing else depends on how tokens are spread over ranks.
"""

import functools
import importlib
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, get_moe_layer_wise_logging_tracker
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from nemo_skymoe.moe.layer import SkyworkTransformerConfig, get_skywork_block_spec
from nemo_skymoe.moe.router import SkyworkRouter
from nemo_skymoe.patches import cpu_runtime, router_without_te
from nemo_skymoe.ranks import run_ranks

moe_logging: Any = None
with suppress(ImportError):
    moe_logging = importlib.import_module("megatron.core.transformer.moe.moe_logging")

VOCABULARY, LENGTH, BATCH = 32, 16, 2


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel dimensions; data parallelism takes the ranks that are left."""

    tp: int = 1
    cp: int = 1
    ep: int = 1
    pp: int = 1
    vpp: int | None = None
    etp: int | None = None
    sp: bool | None = None

    @property
    def experts_tp(self) -> int:
        """Ranks that an expert is split over; whole experts, unless said otherwise or experts are not spread."""
        return self.etp or (self.tp if self.ep == 1 else 1)

    @property
    def sequence_parallel(self) -> bool:
        """On with tensor parallelism unless said otherwise."""
        return self.tp > 1 if self.sp is None else self.sp

    def __str__(self) -> str:
        return "-".join(f"{name}{size}" for name, size in vars(self).items() if size not in (None, 1)) or "dp"


def logged_losses() -> dict[str, Tensor]:
    """Megatron's sums of the losses by name, [layers] each."""
    entries = get_moe_layer_wise_logging_tracker().items()
    return {name: entry["values"] for name, entry in entries}


def forget_logged_losses() -> None:
    """Empty Megatron's record of the losses. From megatron-core 0.18 its dictionary is only a copy."""
    if moe_logging is None:
        get_moe_layer_wise_logging_tracker().clear()
    else:
        moe_logging.destroy_moe_metrics_tracker()


def on_ranks(world_size: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a test in a world of its own; its assertions hold on every rank."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def run(*args: Any, **kwargs: Any) -> None:
            run_ranks(in_world, world_size, functools.partial(test, *args, **kwargs))

        return run

    return decorate


def in_world(function: Callable[..., Any], *args: Any) -> Any:
    """Call `function` on this rank of a gloo world."""
    cpu_runtime.apply()
    torch.distributed.init_process_group("gloo")
    return function(*args)


@contextmanager
def groups(layout: Layout = Layout()) -> Iterator[None]:
    """Megatron's process groups and a clean slate of its global state."""
    scaler: Any = MoEAuxLossAutoScaler
    scaler.main_loss_backward_scale = None
    forget_logged_losses()
    parallel_state.initialize_model_parallel(
        layout.tp,
        layout.pp,
        layout.vpp,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.experts_tp,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        # Megatron forgets its groups without ending them, and each has threads.
        for group in list(torch.distributed.distributed_c10d._world.pg_map):
            if group is not torch.distributed.group.WORLD:
                torch.distributed.destroy_process_group(group)


def configuration(
    layout: Layout = Layout(),
    config_class: type[SkyworkTransformerConfig] = SkyworkTransformerConfig,
    **options: Any,
) -> SkyworkTransformerConfig:
    """Two layers of eight experts, top-2, in float64."""
    values: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 16,
        "ffn_hidden_size": 24,
        "num_attention_heads": 4,
        "num_moe_experts": 8,
        "moe_router_topk": 2,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": 0.5,
        "moe_adaptive_aux_loss": False,
        "moe_token_dispatcher_type": "alltoall",
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "normalization": "RMSNorm",
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bias_dropout_fusion": False,
        "use_cpu_initialization": True,
        "params_dtype": torch.float64,
        "pipeline_dtype": torch.float64,
        "tensor_model_parallel_size": layout.tp,
        "context_parallel_size": layout.cp,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.experts_tp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vpp,
        "sequence_parallel": layout.sequence_parallel,
    }
    return config_class(**{**values, **options})


def spreads_key_value_heads() -> bool:
    """Whether the installed Megatron-Core lets tensor-parallel ranks have one key-value head between them."""
    sizes: dict[str, Any] = {
        "num_attention_heads": 2,
        "num_query_groups": 1,
        "tensor_model_parallel_size": 2,
    }
    try:
        TransformerConfig(num_layers=1, hidden_size=8, **sizes)
    except ValueError:
        return False
    return True


def build(config: SkyworkTransformerConfig, make: Callable[..., GPTModel] | None = None) -> list[GPTModel]:
    """This rank's model chunks, one a virtual pipeline stage, with the weights that their global names stand for."""
    stages = config.virtual_pipeline_model_parallel_size
    chunks = [(make or model_chunk)(config, stage if stages else None) for stage in range(stages or 1)]
    for name, parameter in parameters(chunks).items():
        parameter.data.copy_(local_part(name, parameter, weight(name, global_shape(name, parameter))))
    return chunks


def model_chunk(config: SkyworkTransformerConfig, stage: int | None = None) -> GPTModel:
    """One (virtual) pipeline stage as Megatron initialises it."""
    spec: Any = get_skywork_block_spec(config, stage)
    for layer in spec.layer_specs or ():
        submodules: Any = layer.submodules
        submodules.input_layernorm = submodules.self_attention = IdentityOp
        submodules.self_attn_bda = IdentityFuncOp
    return GPTModel(
        config,
        spec,
        VOCABULARY,
        LENGTH,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
        position_embedding_type="none",
        share_embeddings_and_output_weights=False,
        vp_stage=stage,
    )


def fresh_router(config: SkyworkTransformerConfig, router_class: type[TopKRouter] = SkyworkRouter) -> Any:
    """A router without a layer around it, as it is initialised."""
    router_without_te.apply()
    if hasattr(moe_utils, "get_default_pg_collection"):
        router: Any = router_class(config, pg_collection=moe_utils.get_default_pg_collection())
    else:  # Megatron 0.14
        old: Any = moe_utils
        make: Any = router_class
        router = make(config, model_comm_pgs=old.get_default_model_comm_pgs())
    router.set_layer_number(1)
    return router


def make_router(config: SkyworkTransformerConfig, router_class: type[TopKRouter] = SkyworkRouter) -> Any:
    """A router with the weights that its parameters' names stand for."""
    router = fresh_router(config, router_class)
    for name, parameter in router.named_parameters():
        parameter.data.copy_(weight(name, tuple(parameter.shape)))
    return router


class Training:
    """Micro-batches through Megatron's schedule: batch i is the same in every layout."""

    config_class: type[SkyworkTransformerConfig] = SkyworkTransformerConfig
    make_chunk: Callable[..., GPTModel] | None = None
    mask: Tensor | None = None

    def __init__(self, layout: Layout = Layout(), micro_batches: int = 2, **options: Any) -> None:
        self.config = configuration(layout, self.config_class, **options)
        self.chunks = build(self.config, self.make_chunk)
        ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=False, overlap_grad_reduce=False)
        self.wrapped: list[Any] = [DistributedDataParallel(self.config, ddp, chunk) for chunk in self.chunks]
        self.config.finalize_model_grads_func = finalize_model_grads
        self.micro_batches = micro_batches

    def run(self, step: int = 0, forward_only: bool = False) -> None:
        """Forward and backward; gradients are in `main_grad` afterwards."""
        for chunk in self.wrapped:
            chunk.zero_grad_buffer()
        ranks, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
        names = [f"{step} {number}" for number in range(self.micro_batches)][rank::ranks]
        get_forward_backward_func()(
            forward_step_func=self._forward,
            data_iterator=[iter(names) for _ in self.wrapped],
            model=self.wrapped,
            num_microbatches=len(names),
            seq_length=LENGTH,
            micro_batch_size=BATCH,
            forward_only=forward_only,
        )

    def _forward(self, names: Iterator[str], model: Any) -> tuple[Tensor, Callable[..., Any]]:
        positions = context_positions()
        tokens = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=generator(next(names)))[:, positions]
        output = model(tokens, positions.expand(BATCH, -1), self.mask)

        def loss(logits: Tensor) -> tuple[Any, ...]:
            # Random weights on the logits; the mean over the micro-batch's tokens or their sum.
            target = weight("target", (LENGTH, BATCH, VOCABULARY))[positions].transpose(0, 1)
            whole = tensor_parallel.gather_from_tensor_model_parallel_region(logits)
            total = (whole * target + whole.square()).sum()
            if self.config.calculate_per_token_loss:
                return total, torch.tensor(tokens.numel(), dtype=torch.int), {}
            return total / (BATCH * LENGTH), {}

        return output, loss

    def gradients(self) -> dict[str, Tensor]:
        """The gradient of every trained parameter in full size by its global name, on every rank."""
        parts: list[Any] = [None] * torch.distributed.get_world_size()
        local = {
            name: (rank_within(name), partition(name, parameter), parameter.main_grad.numpy().copy())
            for name, parameter in parameters(self.chunks).items()
            if parameter.requires_grad
        }
        torch.distributed.all_gather_object(parts, local)
        whole: dict[str, dict[int, Any]] = {}
        for part in parts:
            for name, (rank, dimension, gradient) in part.items():
                whole.setdefault(name, {})[rank if dimension >= 0 else 0] = (
                    dimension,
                    torch.from_numpy(gradient),
                )
        return {
            name: joined(name, by_rank[0][0], [by_rank[rank][1] for rank in sorted(by_rank)])
            for name, by_rank in whole.items()
        }


def relative_errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """|g - g1| / |g1| of every parameter; both must have the same ones."""
    assert found.keys() == expected.keys()
    return {name: float((found[name] - whole).norm() / whole.norm()) for name, whole in expected.items()}


def context_positions() -> Tensor:
    """Positions of this rank in the sequence: Megatron deals the i-th piece from both ends."""
    rank, size = parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size()
    pieces = torch.arange(LENGTH).chunk(2 * size)
    return torch.cat([pieces[rank], pieces[2 * size - 1 - rank]]) if size > 1 else torch.arange(LENGTH)


def generator(name: str) -> torch.Generator:
    """A random generator that depends on a name alone."""
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def weight(name: str, shape: tuple[int, ...]) -> Tensor:
    """The whole parameter of that name, float64."""
    noise = torch.randn(shape, generator=generator(name), dtype=torch.float64)
    return 1 + 0.1 * noise if len(shape) == 1 else 0.3 * noise


def parameters(chunks: list[GPTModel]) -> dict[str, Any]:
    """This rank's parameters by global name: layers and experts counted over the whole model."""
    named: dict[str, Any] = {}
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            parts = name.split(".")
            if "layers" in parts:
                place = parts.index("layers") + 1
                parts[place] = str(chunk.decoder.layers[int(parts[place])].layer_number)
            if "local_experts" in parts:
                place = parts.index("local_experts") + 1
                experts: Any = chunk.config.num_moe_experts
                count = experts // parallel_state.get_expert_model_parallel_world_size()
                first = count * parallel_state.get_expert_model_parallel_rank()
                parts[place] = str(first + int(parts[place]))
            named[".".join(parts)] = parameter
    return named


def rank_within(name: str) -> Any:
    """This rank's place among those that a parameter of that name is split over."""
    if ".local_experts." in name:
        return parallel_state.get_expert_tensor_parallel_rank()
    return parallel_state.get_tensor_model_parallel_rank()


def size_within(name: str) -> Any:
    """How many ranks a parameter of that name is split over, if it is."""
    if ".local_experts." in name:
        return parallel_state.get_expert_tensor_parallel_world_size()
    return parallel_state.get_tensor_model_parallel_world_size()


def partition(name: str, parameter: Any) -> int:
    """Dimension that is split over ranks, -1 for none."""
    split = getattr(parameter, "tensor_model_parallel", False) and size_within(name) > 1
    return parameter.partition_dim if split else -1


def pieces_of(name: str) -> int:
    """A gated linear unit's two halves are split one by one; what an adapter makes of its input has no halves."""
    return 2 if "linear_fc1" in name and ".adapter.linear_in" not in name else 1


def joined(name: str, dimension: int, parts: list[Tensor]) -> Tensor:
    """The whole parameter of its parts in the order of the ranks."""
    if dimension < 0:
        return parts[0]
    halves = [part.chunk(pieces_of(name), dim=dimension) for part in parts]
    return torch.cat([half[i] for i in range(pieces_of(name)) for half in halves], dim=dimension)


def global_shape(name: str, parameter: Any) -> tuple[int, ...]:
    """Shape of the whole parameter."""
    shape, dimension = list(parameter.shape), partition(name, parameter)
    if dimension >= 0:
        shape[dimension] *= size_within(name)
    return tuple(shape)


def local_part(name: str, parameter: Any, whole: Tensor) -> Tensor:
    """This rank's part of a whole parameter."""
    if (dimension := partition(name, parameter)) < 0:
        return whole
    halves = whole.chunk(pieces_of(name), dim=dimension)
    mine = [half.chunk(size_within(name), dim=dimension)[rank_within(name)] for half in halves]
    return torch.cat(mine, dim=dimension)
