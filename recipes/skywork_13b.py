"""`skywork_13b`: Skywork-13B (arXiv 2310.19341), the dense model that the report upcycles."""

from typing import Optional

import lightning.pytorch as pl
import nemo_run as run
from nemo.collections.llm import finetune, pretrain

from nemo_skymoe.nemo.api import pretrain as skywork_pretrain
from nemo_skymoe.nemo.model import Skywork13BConfig, SkyworkModel
from nemo_skymoe.recipes import _common, _finetune, _ours, _report
from nemo_skymoe.recipes._data import with_data
from nemo_skymoe.recipes._scale import at_scale

NAME = "skywork_13b"
CHECKPOINT = "nemo://Skywork/Skywork-13B-base"


@run.cli.factory(name=f"{NAME}_model")
def model(
    seq_length: int = _report.SKYWORK_13B_SEQUENCE, rotary_base: int = _report.SKYWORK_13B_ROTARY_BASE
) -> run.Config[pl.LightningModule]:
    """13.85B parameters at its vocabulary of 65,519."""
    return run.Config(
        SkyworkModel, config=run.Config(Skywork13BConfig, seq_length=seq_length, rotary_base=rotary_base)
    )


@run.cli.factory(target=pretrain, name=NAME)
def pretrain_recipe(
    dir: Optional[str] = "runs",
    name: str = NAME,
    corpus: Optional[str] = None,
    resume_path: Optional[str] = None,
    scale: Optional[str] = None,
    mixture: Optional[str] = None,
    phases: Optional[str] = None,
    pipeline_parallelism: int = _report.SKYWORK_13B_PIPELINE,
    num_nodes: int = _report.SKYWORK_13B_NODES,
    num_gpus_per_node: int = 8,
    tokens: float = _report.SKYWORK_13B_TOKENS,
    seq_length: int = _report.SKYWORK_13B_SEQUENCE,
    global_batch_size: int = _report.SKYWORK_13B_BATCH,
    micro_batch_size: int = 1,
    max_lr: float = _report.SKYWORK_13B_MAX_LR,
    min_lr: float = _report.SKYWORK_13B_MIN_LR,
    warmup_steps: int = _ours.WARMUP_STEPS,
    rotary_base: int = _report.SKYWORK_13B_ROTARY_BASE,
    transformer_engine: Optional[bool] = None,
    rope_fusion: Optional[bool] = None,
    gradient_accumulation_fusion: Optional[bool] = None,
    communication_overlap: bool = True,
) -> run.Partial:
    """Pretrain with DP 256 x PP 2 and ZeRO-1 on 512 GPUs; a fusion that is None is on where the machine has it."""
    max_steps = _common.steps(tokens, seq_length, global_batch_size)
    recipe = run.Partial(
        skywork_pretrain,
        model=model(seq_length, rotary_base),
        data=_common.data(
            corpus, seq_length, global_batch_size, micro_batch_size, _report.SKYWORK_13B_VOCABULARY
        ),
        trainer=_common.trainer(
            max_steps,
            num_nodes,
            num_gpus_per_node,
            pipeline_parallelism=pipeline_parallelism,
            communication_overlap=communication_overlap,
        ),
        log=_common.logger(dir, name, save_every_n_steps=1000),
        optim=_common.adam(max_lr, min_lr, warmup_steps, max_steps),
        resume=_common.resume_from(resume_path),
    )
    _common.set_fusions(
        recipe.model.config,
        transformer_engine,
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
    pipeline_parallelism: int = 2,
    num_nodes: int = 1,
    num_gpus_per_node: int = 8,
    max_steps: int = 1000,
    seq_length: int = _ours.FINETUNE_SEQUENCE,
    global_batch_size: int = _ours.FINETUNE_BATCH,
    micro_batch_size: int = 1,
    max_lr: Optional[float] = None,
) -> run.Partial:
    """Finetune by LoRA, or with `peft_scheme=none` every parameter.

    `dataset` is a folder with NeMo's `training.jsonl` and `validation.jsonl`, None SQuAD; `resume_path` defaults to
    what `nemo llm import` makes of Skywork/Skywork-13B-base (at the toy scale, to new weights).
    """
    parallel = _common.trainer(
        max_steps, num_nodes, num_gpus_per_node, pipeline_parallelism=pipeline_parallelism
    )
    choices = _finetune.Choices(
        dir, name, dataset, resume_path or (None if scale else CHECKPOINT), scale, peft_scheme, max_steps,
        seq_length, global_batch_size, micro_batch_size, max_lr,
    )  # fmt: skip
    return _finetune.recipe(model(seq_length), parallel, choices)
