"""`skywork_moe_146b`: the report's 146B model on its cluster, 192 nodes of 8 A800 (appendix B.3).

Nothing here was run at this size.
"""

from typing import Optional

import lightning.pytorch as pl
import nemo_run as run
from nemo.collections.llm import finetune, pretrain

from nemo_skymoe.nemo.api import pretrain as skywork_pretrain
from nemo_skymoe.nemo.model import SkyworkMoE146BConfig, SkyworkMoEModel
from nemo_skymoe.nemo.pipeline import PipelinePlan
from nemo_skymoe.recipes import _common, _finetune, _ours, _report
from nemo_skymoe.recipes._data import with_data
from nemo_skymoe.recipes._scale import at_scale

NAME = "skywork_moe_146b"
CHECKPOINT = "nemo://Skywork/Skywork-MoE-Base"
LAYOUT, RECOMPUTE = "Et*5|(t*5|)*3(t*4|)*7t*4L", [[0]] * 12
"""What the planner (`nemo_skymoe.pipeline.plan`) makes of this model on A800-80G; a test asks it again."""
LORA_LAYOUT = "Et*6|(t*7|)*4(t*6|)*2t*6L"
"""52 layers on one node, fewer beside the embedding and the head."""


@run.cli.factory(name=f"{NAME}_model")
def model(
    seq_length: int = _report.MOE_SEQUENCE,
    rotary_base: int = _ours.MOE_146B_ROTARY_BASE,
    expert_capacity_factor: Optional[float] = _ours.CAPACITY_FACTOR,
) -> run.Config[pl.LightningModule]:
    """146B parameters, 22B of them active for a token."""
    config = run.Config(
        SkyworkMoE146BConfig,
        seq_length=seq_length,
        rotary_base=rotary_base,
        moe_expert_capacity_factor=expert_capacity_factor,
    )
    return run.Config(SkyworkMoEModel, config=config)


@run.cli.factory(target=pretrain, name=NAME)
def pretrain_recipe(
    dir: Optional[str] = "runs",
    name: str = NAME,
    corpus: Optional[str] = None,
    resume_path: Optional[str] = None,
    scale: Optional[str] = None,
    mixture: Optional[str] = None,
    phases: Optional[str] = None,
    edp: int = _report.MOE_146B_EDP,
    pipeline_parallelism: int = _report.MOE_146B_PIPELINE,
    pipeline_layout: Optional[str] = LAYOUT,
    pipeline_recompute: Optional[list[list[int]]] = RECOMPUTE,
    num_nodes: int = _report.MOE_146B_NODES,
    num_gpus_per_node: int = 8,
    tokens: float = _ours.MOE_146B_TOKENS,
    seq_length: int = _report.MOE_SEQUENCE,
    global_batch_size: int = _ours.MOE_146B_BATCH,
    micro_batch_size: int = 1,
    max_lr: float = _ours.MOE_146B_MAX_LR,
    min_lr: float = _ours.MOE_146B_MIN_LR,
    warmup_steps: int = _ours.UPCYCLED_WARMUP_STEPS,
    rotary_base: int = _ours.MOE_146B_ROTARY_BASE,
    expert_capacity_factor: Optional[float] = _ours.CAPACITY_FACTOR,
    similarity_interval: int = _ours.SIMILARITY_INTERVAL,
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
    max_steps = _common.steps(tokens, seq_length, global_batch_size)
    recipe = run.Partial(
        skywork_pretrain,
        model=model(seq_length, rotary_base, expert_capacity_factor),
        data=_common.data(corpus, seq_length, global_batch_size, micro_batch_size),
        trainer=_common.trainer(
            max_steps,
            num_nodes,
            num_gpus_per_node,
            edp,
            pipeline_parallelism,
            callbacks=_common.moe_callbacks(similarity_interval),
            communication_overlap=communication_overlap,
            tensor_parallel_overlap=tensor_parallel_overlap,
            grad_reduce_in_fp32=grad_reduce_in_fp32,
        ),
        log=_common.logger(dir, name, save_every_n_steps=1000),
        optim=_common.adam(max_lr, min_lr, warmup_steps, max_steps),
        resume=_common.resume_from(resume_path),
    )
    if pipeline_layout is not None:
        recipe.pipeline = run.Config(PipelinePlan, layout=pipeline_layout, recompute=pipeline_recompute)
    _common.set_fusions(
        recipe.model.config,
        transformer_engine,
        moe_grouped_gemm=grouped_gemm,
        moe_permute_fusion=permute_fusion,
        apply_rope_fusion=rope_fusion,
        gradient_accumulation_fusion=gradient_accumulation_fusion,
    )
    return with_data(at_scale(recipe, scale, corpus), corpus, mixture, phases)


@run.cli.factory(target=finetune, name=NAME)
def finetune_recipe(
    dir: Optional[str] = "runs",
    name: str = f"{NAME}_finetune",
    dataset: Optional[str] = None,
    resume_path: Optional[str] = None,
    scale: Optional[str] = None,
    peft_scheme: Optional[str] = "lora",
    edp: Optional[int] = None,
    pipeline_parallelism: Optional[int] = None,
    pipeline_layout: Optional[str] = None,
    num_nodes: Optional[int] = None,
    num_gpus_per_node: int = 8,
    max_steps: int = 1000,
    seq_length: int = _ours.FINETUNE_SEQUENCE,
    global_batch_size: int = _ours.FINETUNE_BATCH,
    micro_batch_size: int = 1,
    max_lr: Optional[float] = None,
) -> run.Partial:
    """Finetune by LoRA on one node (PP 8), or with `peft_scheme=none` every parameter on 12 (PP 12 x EDP 4 x DP 2).

    `dataset` is a folder with NeMo's `training.jsonl` and `validation.jsonl`, None SQuAD; `resume_path` defaults to
    what `nemo llm import` makes of Skywork/Skywork-MoE-Base (at the toy scale, to new weights).
    """
    everything = (peft_scheme or "none").lower() == "none"
    nodes, stages, ranks, layout = (12, 12, 4, LAYOUT) if everything else (1, 8, 1, LORA_LAYOUT)
    parallel = _common.trainer(
        max_steps, num_nodes or nodes, num_gpus_per_node, edp or ranks, pipeline_parallelism or stages
    )
    choices = _finetune.Choices(
        dir, name, dataset, resume_path or (None if scale else CHECKPOINT), scale, peft_scheme, max_steps,
        seq_length, global_batch_size, micro_batch_size, max_lr,
    )  # fmt: skip
    return _finetune.recipe(model(seq_length), parallel, choices, pipeline_layout or layout)
