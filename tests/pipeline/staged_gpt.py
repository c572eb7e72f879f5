"""A GPT on any pipeline layout: what it computed, and how often each of its layers ran to do so.

Weights and tokens are functions of their names (tests/moe/worlds.py), so that every layout trains the same model.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker
from torch import Tensor

from nemo_skymoe.moe.controller import AuxLossController, find_routers
from nemo_skymoe.moe.layer import get_skywork_block_spec
from nemo_skymoe.pipeline.apply import apply_layout, apply_recompute
from tests.moe.worlds import (
    Layout,
    configuration,
    generator,
    global_shape,
    groups,
    local_part,
    parameters,
    weight,
)

LAYERS, VOCABULARY, LENGTH, BATCH, MICRO_BATCHES, STEPS = 6, 32, 16, 2, 4, 2
DENSE: dict[str, Any] = {"num_moe_experts": None}
# Drops tokens; coefficients that the drop rate moves from step to step.
MOE: dict[str, Any] = {
    "moe_expert_capacity_factor": 1.0,
    "moe_adaptive_aux_loss": True,
    "moe_adaptive_aux_loss_smoothing": 0.5,
    "moe_adaptive_aux_loss_maximum": 1.0,
    "moe_z_loss_coeff": 0.1,
}


@dataclass(frozen=True)
class Case:
    """A model on a plan; `more` goes to the configuration, once the layout is on it. None: one stage."""

    layout: str | None = None
    recompute: list[list[int]] | None = None
    moe: bool = True
    edp: int = 1
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def stages(self) -> tuple[int, int | None]:
        """Pipeline-parallel size, and virtual stages if the layout has more than one."""
        if self.layout is None or self.recompute is None:
            return 1, None
        virtual = len(self.recompute[0])
        return len(self.recompute), virtual if virtual > 1 else None


@dataclass
class Found:
    """What the ranks of a world saw, merged. Layers by global number; a chunk is (stage, virtual stage)."""

    losses: list[list[float]] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    sums: list[dict[int, list[float]]] = field(default_factory=list)
    """What the routers had added up, and Megatron's own log of their losses, when the step's gradients were there."""
    metrics: list[dict[int, Any]] = field(default_factory=list)
    coefficients: list[dict[int, float]] = field(default_factory=list)
    layers: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    calls: dict[int, float] = field(default_factory=dict)
    """Forward passes a micro-batch."""
    embedding: set[tuple[int, int]] = field(default_factory=set)
    head: set[tuple[int, int]] = field(default_factory=set)


def train(case: Case) -> Found:
    """Two optimizer steps of `case` in this world; the same on every rank."""
    with groups(mesh(case)):
        return Run(case).train()


def mesh(case: Case) -> Layout:
    pp, vpp = case.stages
    return Layout(tp=case.edp, ep=case.edp, pp=pp, vpp=vpp)


class Run:
    """This rank's chunks of a model under a plan, as `apply_layout` and `apply_recompute` make them."""

    def __init__(self, case: Case) -> None:
        self.config = model_config(case)
        if case.layout is not None:
            apply_layout(self.config, case.layout, case.recompute)
        for option, value in case.more.items():
            setattr(self.config, option, value)
        stages = self.config.virtual_pipeline_model_parallel_size
        self.models = [build(self.config, number if stages else None) for number in range(stages or 1)]
        self.parameters = parameters(self.models)
        for name, parameter in self.parameters.items():
            parameter.data.copy_(local_part(name, parameter, weight(name, global_shape(name, parameter))))
        ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=False, overlap_grad_reduce=False)
        self.chunks: list[Any] = [DistributedDataParallel(self.config, ddp, model) for model in self.models]
        if case.recompute is not None:
            apply_recompute(self.chunks, case.recompute)
        self.sums: dict[int, list[float]] = {}
        self.config.finalize_model_grads_func = self.finalize
        self.controller = AuxLossController(self.models) if case.moe else None
        if self.controller is not None:
            self.controller.attach(self)
        self.calls: Counter[int] = Counter()
        for model in self.models:
            for layer in model.decoder.layers:
                layer.register_forward_hook(lambda layer, *_: self.calls.update([layer.layer_number]))

    def train(self) -> Found:
        found, stage = Found(), parallel_state.get_pipeline_model_parallel_rank()
        for number in range(STEPS):
            found.losses.append(self.forward_and_backward(number))
            found.gradients.append(self.gradients())
            found.sums.append(dict(self.sums))
            self.step()
            if self.controller is not None:
                found.metrics.append(self.controller.metrics)
                found.coefficients.append(self.controller.coefficient_by_layer())
        for virtual, model in enumerate(self.models):
            found.layers[stage, virtual] = [layer.layer_number for layer in model.decoder.layers]
            names = {name for name, _ in model.named_parameters()}
            found.embedding |= {(stage, virtual) for name in names if name.startswith("embedding.")}
            found.head |= {(stage, virtual) for name in names if name.startswith("output_layer.")}
        found.calls = {layer: calls / (STEPS * MICRO_BATCHES) for layer, calls in self.calls.items()}
        return merge(found)

    def forward_and_backward(self, number: int) -> list[float]:
        """Gradients into `main_grad`; the losses by micro-batch, on the last stage."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        names = [f"{number} {micro_batch}" for micro_batch in range(MICRO_BATCHES)]
        losses = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=[iter(names) for _ in self.chunks],
            model=self.chunks,
            num_microbatches=MICRO_BATCHES,
            seq_length=LENGTH,
            micro_batch_size=BATCH,
            forward_only=False,
        )
        return [float(loss["loss"]) for loss in losses]

    def finalize(self, *args: Any, **kwargs: Any) -> None:
        """Megatron's, and a look at the routers before the controller takes their sums."""
        finalize_model_grads(*args, **kwargs)
        logged = get_moe_layer_wise_logging_tracker()
        for number, router in find_routers(self.models).items():
            seen: Any = router.statistics
            seen._add_up(router.weight.device)
            sums = [seen.micro_batches, *seen._sums.tolist()]
            self.sums[number] = sums + [float(log["values"][number - 1]) for log in logged.values()]

    def gradients(self) -> dict[str, Any]:
        """By global name and rank of the tensor-parallel group; arrays, which pickle without shared memory."""
        rank = parallel_state.get_tensor_model_parallel_rank()
        return {f"{name} {rank}": p.main_grad.numpy().copy() for name, p in self.parameters.items()}

    def step(self) -> tuple[bool, float, int]:
        """Plain gradient descent, under the interface of Megatron's optimizers."""
        for parameter in self.parameters.values():
            parameter.data.sub_(parameter.main_grad, alpha=0.1)
        return True, 0.0, 0


def model_config(case: Case) -> Any:
    """float32, with attention and rotary positions; MoE layers and adaptive auxiliary loss with `moe`."""
    settings = {
        "num_layers": LAYERS,
        "params_dtype": torch.float32,
        "pipeline_dtype": torch.float32,
        "moe_token_dispatcher_type": "allgather",
        **(MOE if case.moe else DENSE),
        **case.more,
    }
    return configuration(replace(mesh(case), vpp=None), moe_edp=case.edp > 1, **settings)


def build(config: Any, stage: int | None) -> Any:
    """One (virtual) stage of a Llama with untied head, dense or MoE by its configuration."""
    where: dict[str, Any] = {"ignore_virtual": False, "vp_stage": stage}
    spec: Any = get_skywork_block_spec(config, stage)
    return GPTModel(
        config,
        spec,
        VOCABULARY,
        LENGTH,
        pre_process=parallel_state.is_pipeline_first_stage(**where),
        post_process=parallel_state.is_pipeline_last_stage(**where),
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
        vp_stage=stage,
    )


def forward(names: Iterator[str], model: torch.nn.Module) -> tuple[Tensor, Callable[..., Any]]:
    tokens = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=generator(next(names)))
    mask = torch.ones(1, 1, LENGTH, LENGTH).triu(1).bool()
    output = model(tokens, torch.arange(LENGTH)[None], mask, labels=tokens.roll(-1, 1))

    def loss(output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        mean = output.mean()
        return mean, {"loss": mean.detach().clone()}  # the schedule divides in place

    return output, loss


def merge(found: Found) -> Found:
    """The stages' findings as one, on every rank."""
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, found)
    whole = Found(losses=parts[-1].losses)
    for name in ("gradients", "sums", "metrics", "coefficients"):
        steps = zip(*(getattr(part, name) for part in parts), strict=True)
        setattr(whole, name, [{key: value for part in step for key, value in part.items()} for step in steps])
    whole.gradients = [{n: torch.from_numpy(g) for n, g in step.items()} for step in whole.gradients]
    for part in parts:
        whole.layers |= part.layers
        whole.calls |= part.calls
        whole.embedding |= part.embedding
        whole.head |= part.head
    return whole
