"""A GPT of 10,000 parameters trained with Megatron-Core alone: any layout, over gloo."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import megatron.core
import torch
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from nemo_skymoe.moe.norm import RMSNorm

VERSION = megatron.core.__version__[:4]
# What the distributed optimizer of each Megatron-Core can write.
FORMATS = {
    "0.14": {"fully_sharded_model_space"},
    "0.15": {"fully_sharded_model_space", "dp_reshardable", "fully_reshardable"},
}.get(VERSION, {"dp_reshardable", "fully_reshardable"})
VOCABULARY, LENGTH, BATCH = 64, 16, 4


@dataclass(frozen=True)
class Case:
    """A layout and an optimizer; `more` goes to Megatron's TransformerConfig."""

    tp: int = 1
    pp: int = 1
    vpp: int | None = None
    ep: int = 1
    experts: int | None = None
    sequence_parallel: bool = False
    distributed: bool = False
    overlap: bool = False
    more: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        changed = {name: value for name, value in vars(self).items() if value != getattr(Case(), name)}
        return "-".join(f"{name}={value}" for name, value in changed.items()) or "default"


@contextlib.contextmanager
def groups(case: Case) -> Iterator[None]:
    """Megatron's process groups for `case`, in a world that is initialised if it is not."""
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(
        case.tp,
        case.pp,
        virtual_pipeline_model_parallel_size=case.vpp,
        expert_model_parallel_size=case.ep,
        expert_tensor_parallel_size=1,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    yield
    parallel_state.destroy_model_parallel()


class Run:
    """Model, optimizer and a stream of data that depends on the step alone."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(1)
        self.config = _config(case)
        ddp = DistributedDataParallelConfig(
            use_distributed_optimizer=case.distributed,
            overlap_grad_reduce=case.overlap,
            overlap_param_gather=case.overlap and case.distributed,
        )
        chunks = range(case.vpp or 1)
        self.chunks: list[Any] = [
            DistributedDataParallel(self.config, ddp, _model(self.config, stage if case.vpp else None))
            for stage in chunks
        ]
        self.config.finalize_model_grads_func = finalize_model_grads
        if case.overlap:
            self.config.no_sync_func = self.chunks[0].no_sync
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=1e-2,
                clip_grad=0.5,
                use_distributed_optimizer=case.distributed,
                overlap_param_gather=ddp.overlap_param_gather,
            ),
            self.chunks,
        )

    def step(self, number: int) -> tuple[float, float]:
        """Train on batch `number`; the mean loss over the batch (on the last stage) and the gradient's norm."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        ranks, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
        batch = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(number))
        mine = batch[rank::ranks]
        losses: Any = get_forward_backward_func()(
            forward_step_func=_forward,
            data_iterator=[iter(mine.split(1)) for _ in self.chunks],
            model=self.chunks,
            num_microbatches=len(mine),
            seq_length=LENGTH,
            micro_batch_size=1,
            forward_only=False,
        )
        stepped: Any = self.optimizer.step()
        succeeded, norm, _ = stepped
        assert succeeded
        loss = torch.tensor([sum(float(loss["loss"]) for loss in losses) / BATCH])
        torch.distributed.all_reduce(loss, group=parallel_state.get_data_parallel_group())
        return loss.item(), float(norm)

    def train(self, *numbers: int) -> list[tuple[float, float]]:
        return [self.step(number) for number in numbers]

    def parameters(self) -> dict[str, torch.Tensor]:
        return {
            f"{index}.{name}": parameter.detach().clone()
            for index, chunk in enumerate(self.chunks)
            for name, parameter in chunk.named_parameters()
        }

    def _model_state(self) -> dict[str, Any]:
        return {f"model{index}": chunk.module.sharded_state_dict() for index, chunk in enumerate(self.chunks)}

    def state(self, loading: bool, sharding: str) -> dict[str, Any]:
        model = self._model_state()
        metadata = {"distrib_optim_sharding_type": sharding}
        optimizer = self.optimizer.sharded_state_dict(dict(model), is_loading=loading, metadata=metadata)
        return {**model, "optimizer": optimizer}

    def save(self, folder: Path, sharding: str) -> None:
        if torch.distributed.get_rank() == 0:
            folder.mkdir()
        torch.distributed.barrier()
        dist_checkpointing.save(self.state(False, sharding), str(folder))

    def load(self, folder: Path, sharding: str) -> None:
        state: Any = dist_checkpointing.load(self.state(True, sharding), str(folder))
        self.load_model_state(state)
        self.optimizer.load_state_dict(state["optimizer"])

    def load_model(self, folder: Path) -> None:
        state: Any = dist_checkpointing.load(self._model_state(), str(folder))
        self.load_model_state(state)
        self.optimizer.reload_model_params()

    def load_model_state(self, state: dict[str, Any]) -> None:
        for index, chunk in enumerate(self.chunks):
            chunk.module.load_state_dict(state[f"model{index}"])


def _config(case: Case) -> TransformerConfig:
    settings: dict[str, Any] = dict(
        num_layers=4,
        hidden_size=16,
        num_attention_heads=2,
        ffn_hidden_size=32,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        tensor_model_parallel_size=case.tp,
        pipeline_model_parallel_size=case.pp,
        virtual_pipeline_model_parallel_size=case.vpp,
        expert_model_parallel_size=case.ep,
        expert_tensor_parallel_size=1,
        num_moe_experts=case.experts,
        moe_aux_loss_coeff=0.0,
        sequence_parallel=case.sequence_parallel,
        pipeline_dtype=torch.float32,
    )
    return TransformerConfig(**{**settings, **case.more})


def _model(config: TransformerConfig, stage: int | None) -> GPTModel:
    layer = get_gpt_layer_local_spec(num_experts=config.num_moe_experts, moe_grouped_gemm=False)
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    layers = get_num_layers_to_build(config, vp_stage=stage)
    where: dict[str, Any] = {"ignore_virtual": stage is None, "vp_stage": stage}
    norm: Any = RMSNorm
    block: Any = TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=norm)
    return GPTModel(
        config,
        block,
        VOCABULARY,
        LENGTH,
        pre_process=parallel_state.is_pipeline_first_stage(**where),
        post_process=parallel_state.is_pipeline_last_stage(**where),
        position_embedding_type="rope",
        vp_stage=stage,
    )


def _forward(data: Iterator[torch.Tensor], model: torch.nn.Module) -> tuple[torch.Tensor, Callable]:
    tokens = next(data)
    mask = torch.ones(1, 1, LENGTH, LENGTH).triu(1).bool()
    output = model(tokens, torch.arange(LENGTH)[None], mask, labels=tokens.roll(-1, 1))

    def loss(output: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        mean = output.mean()
        return mean, {"loss": mean.detach().clone()}  # the schedule divides in place

    return output, loss
