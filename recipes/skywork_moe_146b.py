"""`skywork_moe_146b`: the report's 146B model on its cluster, 192 nodes of 8 A800 (appendix B.3).

Nothing here was run at this size.
"""

from dataclasses import replace
from typing import Optional

import lightning.pytorch as pl
import nemo_run as run
from nemo.collections.llm import finetune, pretrain

from nemo_skymoe.experiments.arguments import BATCH, EXPERTS, RATES, Given, GivenFinetuning, with_arguments
from nemo_skymoe.experiments.moe_146b import FINETUNING, LORA, PRETRAINING, RECOMPUTE
from nemo_skymoe.experiments.runs import Finetuning, Pretraining
from nemo_skymoe.nemo.model import SkyworkMoE146BConfig
from nemo_skymoe.recipes import _parts
from nemo_skymoe.recipes._finetune import finetuning, scheme_of
from nemo_skymoe.recipes._pretrain import pretraining

NAME = PRETRAINING.name
CHECKPOINT = "nemo://Skywork/Skywork-MoE-Base"


@run.cli.factory(name=f"{NAME}_model")
def model(
    seq_length: int = PRETRAINING.seq_length,
    rotary_base: int = PRETRAINING.rotary_base,
    expert_capacity_factor: Optional[float] = PRETRAINING.expert_capacity_factor,
) -> run.Config[pl.LightningModule]:
    """Return the model with 146B parameters, of which a token activates 22B."""
    return _parts.moe_model(
        SkyworkMoE146BConfig, expert_capacity_factor, seq_length=seq_length, rotary_base=rotary_base
    )


@run.cli.factory(target=pretrain, name=NAME)
@with_arguments(
    PRETRAINING, *EXPERTS, "pipeline_parallelism", "pipeline_layout", "num_nodes", "num_gpus_per_node", "tokens",
    *BATCH, *RATES, "rotary_base",
)  # fmt: skip
def pretrain_recipe(
    training: Pretraining,
    given: Given,
    pipeline_recompute: Optional[list[list[int]]] = RECOMPUTE,
    transformer_engine: Optional[bool] = None,
    grouped_gemm: Optional[bool] = None,
    permute_fusion: Optional[bool] = None,
    rope_fusion: Optional[bool] = None,
    gradient_accumulation_fusion: Optional[bool] = None,
    communication_overlap: bool = True,
    tensor_parallel_overlap: bool = False,
    grad_reduce_in_fp32: bool = True,
) -> run.Partial:
    """Pretrain with PP 12 x EDP 4 x DP 32; `resume_path` names the upcycled checkpoint to start from.

    Layout and recomputed layers are the planner's (`skymoe plan`). A fusion that is None is on where the machine
    has Transformer Engine or Apex.
    """
    made = _parts.with_fusions(
        model(training.seq_length, training.rotary_base, training.expert_capacity_factor),
        transformer_engine,
        moe_grouped_gemm=grouped_gemm,
        moe_permute_fusion=permute_fusion,
        apply_rope_fusion=rope_fusion,
        gradient_accumulation_fusion=gradient_accumulation_fusion,
    )
    counts = None if pipeline_recompute is None else tuple(map(tuple, pipeline_recompute))
    return pretraining(
        replace(training, pipeline_recompute=counts),
        given,
        made,
        communication_overlap=communication_overlap,
        tensor_parallel_overlap=tensor_parallel_overlap,
        grad_reduce_in_fp32=grad_reduce_in_fp32,
    )


@run.cli.factory(target=finetune, name=NAME)
@with_arguments(LORA, "num_gpus_per_node", "max_steps", *BATCH, of=GivenFinetuning)
def finetune_recipe(
    training: Finetuning,
    given: GivenFinetuning,
    dataset: Optional[str] = None,
    edp: Optional[int] = None,
    pipeline_parallelism: Optional[int] = None,
    pipeline_layout: Optional[str] = None,
    num_nodes: Optional[int] = None,
) -> run.Partial:
    """Finetune by LoRA on one node (PP 8), or with `peft_scheme=none` every parameter on 12 (PP 12 x EDP 4 x DP 2).

    `dataset` is a folder with NeMo's `training.jsonl` and `validation.jsonl`, None SQuAD; `resume_path` defaults to
    what `nemo llm import` makes of Skywork/Skywork-MoE-Base (at the toy scale, to new weights).
    """
    usual = FINETUNING if scheme_of(given) == "none" else LORA
    training = replace(
        training,
        edp=edp or usual.edp,
        pipeline_parallelism=pipeline_parallelism or usual.pipeline_parallelism,
        pipeline_layout=pipeline_layout or usual.pipeline_layout,
        num_nodes=num_nodes or usual.num_nodes,
    )
    given = replace(given, resume_path=given.resume_path or (None if given.scale else CHECKPOINT))
    return finetuning(training, given, model(training.seq_length), dataset=dataset)
