"""Train a small Skywork-MoE model for one step in any layout, and describe it by global parameter names.

Weights and data are functions of their names, so that every layout starts from the same model without
communication. Runs inside the ranks of `run_ranks`.
"""

import itertools
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, clear_aux_losses_tracker
from torch import Tensor

from nemo_skymoe.moe import edp
from nemo_skymoe.moe import router as skywork_router
from nemo_skymoe.moe.collectives import hold
from nemo_skymoe.moe.dispatch_replicated import ReplicatedTokenDispatcher
from nemo_skymoe.moe.layer import SkyworkTransformerConfig, get_skywork_block_spec
from nemo_skymoe.moe.telemetry import reduce_statistics
from nemo_skymoe.patches import cpu_runtime

VOCABULARY, SEQUENCE, EXPERTS, TOPK = 32, 16, 8, 2
MICRO_BATCHES = (2, 1)
EVALUATION_BATCH = 3


@dataclass(frozen=True)
class Case:
    """One layout and what is switched on in it."""

    n: int
    dispatcher: str
    capacity_factor: float | None = None
    scope: str = "rank"
    padded: bool = False
    recompute: str | None = None
    cp: int = 1
    dtype: torch.dtype = torch.float64
    aux_loss_form: str = "switch"
    mutation: str | None = None
    overlap: bool = False
    qwen: bool = False
    """Biases of queries, keys and values, and norms of queries and keys."""
    slices: tuple[int, int] = (1, 1)
    """Of the reference alone: drop within (context, sequence) slices, as the ranks of a layout do."""

    @property
    def name(self) -> str:
        """Readable test id."""
        capacity = "dropless" if self.capacity_factor is None else f"capacity-{self.scope}"
        parts = [
            f"n{self.n}",
            self.dispatcher,
            capacity,
            "padded" if self.padded else "",
            self.recompute or "",
        ]
        parts += [f"cp{self.cp}" if self.cp > 1 else "", self.mutation or ""]
        parts += ["overlap" if self.overlap else "", "qwen" if self.qwen else ""]
        parts += [self.aux_loss_form if self.aux_loss_form != "switch" else "", str(self.dtype)[6:]]
        return "-".join(part for part in parts if part)

    @property
    def split(self) -> bool:
        """Sequence parallelism."""
        return self.n > 1 and self.dispatcher != "replicated"

    @property
    def reference(self) -> "Case":
        """TP = EP = 1, dropping the tokens that this layout drops."""
        slices = (1, 1)
        if self.capacity_factor is not None:
            slices = (self.cp, self.n if self.split and self.scope == "rank" else 1)
        form = self.aux_loss_form
        return Case(
            1,
            "auto",
            self.capacity_factor,
            dtype=self.dtype,
            aux_loss_form=form,
            qwen=self.qwen,
            slices=slices,
        )


@dataclass
class Outcome:
    """What one rank of a layout saw: logits by micro-batch (evaluation last), gradients, where it sits."""

    logits: list[numpy.ndarray]
    gradients: dict[str, numpy.ndarray]
    partition: dict[str, int]
    tp: int
    cp: int
    dropped: float
    """Share of the assignments that the router dropped; of the reference alone, where nothing is run twice."""
    drop_rates: list[float]
    """Of each layer, as telemetry reports it for the training step."""


def run_cases(cases: list[Case]) -> list[Outcome]:
    """All cases on this rank's world, in order; those with the same process groups should follow one another."""
    start_world()
    outcomes: list[Outcome] = []
    for _, alike in itertools.groupby(cases, lambda case: (case.n, case.cp)):
        group = list(alike)
        with layout(group[0]):
            for case in group:
                with mutated(case.mutation), dropping_by_slice(case):
                    outcomes.append(train(case))
    return outcomes


def start_world() -> None:
    """gloo, and softmax in float64 where Megatron would round a float64 model to float32."""
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    cpu_runtime.apply()
    torch.distributed.init_process_group("gloo")
    softmax = torch.softmax

    def exact_softmax(input: Tensor, *args: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> Tensor:
        return softmax(input, *args, dtype=None if input.dtype == torch.float64 else dtype, **kwargs)

    torch.softmax = exact_softmax


@contextmanager
def layout(case: Case) -> Iterator[None]:
    """Process groups of a case; as Megatron starts them, with the generators seeded alike."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=case.n,
        context_parallel_size=case.cp,
        expert_model_parallel_size=case.n,
        expert_tensor_parallel_size=1,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1234)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()


@contextmanager
def mutated(mutation: str | None) -> Iterator[None]:
    """Take one of the replicated dispatcher's corrections away."""
    if mutation is None:
        yield
    elif mutation == "exclude_replicas":
        with mock.patch.object(edp, mutation, lambda router: None):
            yield
    else:
        identity = hold if mutation == "share_tokens" else lambda tensor: tensor
        with mock.patch.object(ReplicatedTokenDispatcher, mutation, lambda self, tensor: identity(tensor)):
            yield


@contextmanager
def dropping_by_slice(case: Case) -> Iterator[None]:
    """Let a rank that holds all tokens drop them as if each slice were another rank's."""
    if case.slices == (1, 1):
        yield
        return
    drop: Callable[..., tuple[Tensor, Tensor]] = skywork_router.apply_router_token_dropping

    def by_slice(probs: Tensor, routing_map: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        batch = probs.shape[0] // SEQUENCE
        contexts, sequences = case.slices
        kept_probs, kept_map = torch.zeros_like(probs), torch.zeros_like(routing_map)
        for context in range(contexts):
            for positions in context_positions(context, contexts).chunk(sequences):
                tokens = (positions[:, None] * batch + torch.arange(batch)).flatten()
                probs_here, map_here = drop(probs[tokens], routing_map[tokens], **kwargs)
                kept_probs = kept_probs.index_put((tokens,), probs_here)
                kept_map[tokens] = map_here
        return kept_probs, kept_map

    with mock.patch.object(skywork_router, "apply_router_token_dropping", by_slice):
        yield


def context_positions(rank: int, size: int) -> Tensor:
    """Positions in the sequence of a context-parallel rank: the i-th piece from both ends, as Megatron deals them."""
    pieces = torch.arange(SEQUENCE).chunk(2 * size)
    return torch.cat([pieces[rank], pieces[2 * size - 1 - rank]]) if size > 1 else torch.arange(SEQUENCE)


def configuration(case: Case, **options: Any) -> SkyworkTransformerConfig:
    """A two-layer model with auxiliary and z-loss on."""
    recompute: dict[str, Any] = {
        None: {},
        "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        "moe": {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
        "core_attn": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    }[case.recompute]
    values: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 16,
        "ffn_hidden_size": 24,
        "num_attention_heads": 4,
        "num_moe_experts": EXPERTS,
        "moe_router_topk": TOPK,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "normalization": "RMSNorm",
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bias_dropout_fusion": False,
        "use_cpu_initialization": True,
        "params_dtype": case.dtype,
        "tensor_model_parallel_size": case.n,
        "expert_model_parallel_size": case.n,
        "expert_tensor_parallel_size": 1,
        "context_parallel_size": case.cp,
        "sequence_parallel": case.split,
        "moe_token_dispatcher_type": "allgather",
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": 0.5,
        "moe_adaptive_aux_loss": False,
        "moe_aux_loss_form": case.aux_loss_form,
        "moe_z_loss_coeff": 0.05,
        "moe_expert_capacity_factor": case.capacity_factor,
        "moe_pad_expert_input_to_capacity": case.padded,
        "moe_edp": True,
        "edp_dispatcher": case.dispatcher,
        "edp_overlap": case.overlap,
        "moe_capacity_scope": case.scope,
        "add_qkv_bias": case.qwen,
        "qk_layernorm": case.qwen,
    }
    return SkyworkTransformerConfig(**{**values, **recompute, **options})


def build(case: Case, **options: Any) -> Any:
    """The model of a case with the weights that its parameters' global names stand for."""
    config = configuration(case, **options)
    spec: Any = get_skywork_block_spec(config)
    if case.cp > 1:
        for layer in spec.layer_specs:
            layer.submodules.self_attention.submodules.core_attention = GatheredAttention
    model = GPTModel(
        config,
        spec,
        VOCABULARY,
        SEQUENCE,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )
    for name, parameter in model.named_parameters():
        # Larger biases would make tokens alike, and leave experts without any.
        size = 0.1 if name.endswith("linear_qkv.bias") else 1.0
        values = size * weight(global_name(name), global_shape(parameter))
        parameter.data.copy_(local_part(parameter, values))
    return model


def train(case: Case) -> Outcome:
    """One step of two micro-batches of unequal size, then an evaluation at a third size."""
    clear_aux_losses_tracker()
    MoEAuxLossAutoScaler.main_loss_backward_scale = torch.tensor(float(case.cp))
    model = build(case)
    ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=False, overlap_grad_reduce=False)
    ddp = DistributedDataParallel(model.config, ddp_config, model)
    ddp.zero_grad_buffer()
    kept = count_assignments(model)
    logits = []
    for index, batch in enumerate(MICRO_BATCHES):
        output = forward(ddp, case, index, batch)
        logits.append(output.detach().numpy())
        # Over context parallelism Megatron averages gradients.
        (case.cp * loss(output, case, index, batch)).backward()
    finalize_model_grads([ddp])
    group: Any = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    statistics = [layer.mlp.router.statistics for layer in model.decoder.layers]
    metrics = reduce_statistics(statistics, group, torch.device("cpu"))
    model.eval()
    with torch.no_grad():
        logits.append(forward(model, case, len(MICRO_BATCHES), EVALUATION_BATCH).numpy())
    assignments = TOPK * SEQUENCE * (sum(MICRO_BATCHES) + EVALUATION_BATCH) * len(model.decoder.layers)
    return Outcome(
        logits,
        {global_name(n): p.main_grad.clone().numpy() for n, p in model.named_parameters()},
        {global_name(n): partition_dimension(p) for n, p in model.named_parameters()},
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_context_parallel_rank(),
        1 - sum(kept) / assignments,
        [layer.drop_rate for layer in metrics],
    )


def count_assignments(model: Any) -> list[int]:
    """A list that grows by the assignments each router call keeps."""
    kept: list[int] = []
    for layer in model.decoder.layers:
        layer.mlp.router.register_forward_hook(lambda _, __, routed: kept.append(int(routed[1].sum())))
    return kept


def forward(model: Any, case: Case, index: int, batch: int) -> Tensor:
    """Logits [batch, local positions, local vocabulary] of the index-th micro-batch."""
    positions = context_positions(parallel_state.get_context_parallel_rank(), case.cp)
    tokens = torch.randint(VOCABULARY, (batch, SEQUENCE), generator=generator(f"tokens {index}"))
    mask = torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1).view(1, 1, SEQUENCE, SEQUENCE)
    return model(tokens[:, positions], positions.expand(batch, -1), mask)


def loss(logits: Tensor, case: Case, index: int, batch: int) -> Tensor:
    """This rank's share of a loss over all positions and the whole vocabulary."""
    positions = context_positions(parallel_state.get_context_parallel_rank(), case.cp)
    target = torch.randn(
        batch, SEQUENCE, VOCABULARY, generator=generator(f"target {index}"), dtype=torch.float64
    )
    rank, size = parallel_state.get_tensor_model_parallel_rank(), case.n
    here = target[:, positions].chunk(size, dim=-1)[rank].to(logits.dtype)
    return (logits * here + logits.square()).sum() / (batch * SEQUENCE)


def generator(name: str) -> torch.Generator:
    """A random generator that depends on a name alone."""
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def weight(name: str, shape: tuple[int, ...]) -> Tensor:
    """The whole parameter of that name, float64."""
    noise = torch.randn(shape, generator=generator(name), dtype=torch.float64)
    return 1 + 0.1 * noise if len(shape) == 1 else 0.3 * noise


def global_name(name: str) -> str:
    """A parameter's name with its expert counted over the whole model."""
    head, found, tail = name.partition("local_experts.")
    if not found:
        return name
    index, _, rest = tail.partition(".")
    here = EXPERTS // parallel_state.get_expert_model_parallel_world_size()
    return f"{head}experts.{int(index) + here * parallel_state.get_expert_model_parallel_rank()}.{rest}"


def partition_dimension(parameter: Any) -> int:
    """Dimension split over the tensor-parallel ranks, -1 for none."""
    whole = not getattr(parameter, "allreduce", True) or not getattr(
        parameter, "tensor_model_parallel", False
    )
    return -1 if whole else parameter.partition_dim


def global_shape(parameter: torch.nn.Parameter) -> tuple[int, ...]:
    """Shape of the whole parameter."""
    shape, dimension = list(parameter.shape), partition_dimension(parameter)
    if dimension >= 0:
        shape[dimension] *= parallel_state.get_tensor_model_parallel_world_size()
    return tuple(shape)


def local_part(parameter: torch.nn.Parameter, whole: Tensor) -> Tensor:
    """This rank's part of a whole parameter."""
    dimension = partition_dimension(parameter)
    if dimension < 0:
        return whole
    size = parallel_state.get_tensor_model_parallel_world_size()
    return whole.chunk(size, dim=dimension)[parallel_state.get_tensor_model_parallel_rank()]


class GatheredAttention(torch.nn.Module):
    """Causal attention under context parallelism without Transformer Engine: every rank gathers keys and values."""

    def __init__(self, config: Any, *_: Any, **__: Any) -> None:
        super().__init__()
        self.config = config

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        """[s, b, heads, d] of this rank's positions to [s, b, heads * d]."""
        group: Any = parallel_state.get_context_parallel_group()
        size, rank = group.size(), group.rank()
        key, value = (
            tensor_parallel.gather_from_sequence_parallel_region(part.contiguous(), group=group)
            for part in (key, value)
        )
        own = context_positions(rank, size)
        others = torch.cat([context_positions(other, size) for other in range(size)])
        scores = torch.einsum("sbhd,tbhd->bhst", query, key) / query.shape[-1] ** 0.5
        scores = scores.masked_fill(others[None, :] > own[:, None], float("-inf"))
        mixed = torch.einsum("bhst,tbhd->sbhd", scores.softmax(dim=-1), value)
        return mixed.flatten(2)
