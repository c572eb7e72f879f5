"""`skywork_moe_tiny`: `skywork_tiny` upcycled to 16 experts and trained on with EDP."""

from typing import Optional

import lightning.pytorch as pl
import nemo_run as run
from nemo.collections.llm import finetune, pretrain

from nemo_skymoe.nemo.api import pretrain as skywork_pretrain
from nemo_skymoe.nemo.callbacks import SkyworkMoECallback
from nemo_skymoe.nemo.corpus import corpus_data
from nemo_skymoe.nemo.model import SkyworkMoEModel, SkyworkMoETinyConfig
from nemo_skymoe.recipes import _finetune, _ours
from nemo_skymoe.recipes._common import adam, logger, resume_from, small_trainer
from nemo_skymoe.recipes._data import with_data
from nemo_skymoe.recipes._scale import at_scale

NAME = "skywork_moe_tiny"


@run.cli.factory(name=f"{NAME}_model")
def model(
    seq_length: int = 256, expert_capacity_factor: Optional[float] = _ours.CAPACITY_FACTOR
) -> run.Config[pl.LightningModule]:
    """16 experts, top-2, an MoE in every layer; normalised gate, adaptive auxiliary loss, EDP."""
    return run.Config(
        SkyworkMoEModel,
        config=run.Config(
            SkyworkMoETinyConfig, seq_length=seq_length, moe_expert_capacity_factor=expert_capacity_factor
        ),
    )


@run.cli.factory(target=pretrain, name=NAME)
def pretrain_recipe(
    dir: Optional[str] = "runs",
    name: str = NAME,
    corpus: str = "runs/corpus",
    resume_path: Optional[str] = None,
    scale: Optional[str] = None,
    mixture: Optional[str] = None,
    phases: Optional[str] = None,
    edp: int = 2,
    devices: int = 2,
    max_steps: int = 300,
    seq_length: int = 256,
    global_batch_size: int = 8,
    micro_batch_size: int = 8,
    max_lr: float = 1e-3,
    min_lr: float = 1e-4,
    warmup_steps: int = 20,
    expert_capacity_factor: Optional[float] = _ours.CAPACITY_FACTOR,
    val_check_interval: int = 100,
    limit_val_batches: int = 8,
    data_seed: int = 1,
    similarity_interval: int = 20,
) -> run.Partial:
    """Pretrain with Expert Data Parallelism: the `edp` ranks of a tensor-parallel group share the experts.

    `resume_path` names the checkpoint to start from, as `skymoe demo` upcycles one; None starts from scratch.
    """
    recipe = run.Partial(
        skywork_pretrain,
        model=model(seq_length, expert_capacity_factor),
        data=run.Config(
            corpus_data,
            corpus=corpus,
            seq_length=seq_length,
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
            seed=data_seed,
        ),
        trainer=small_trainer(
            max_steps,
            devices,
            tensor_parallelism=edp,
            expert_parallelism=edp,
            sequence_parallelism=edp > 1,
            val_check_interval=val_check_interval,
            limit_val_batches=limit_val_batches,
            callbacks=[run.Config(SkyworkMoECallback, similarity_interval=similarity_interval)],
        ),
        log=logger(dir, name, save_every_n_steps=max_steps),
        optim=adam(max_lr, min_lr, warmup_steps, max_steps),
        resume=resume_from(resume_path),
    )
    return with_data(at_scale(recipe, scale, corpus), corpus, mixture, phases)


@run.cli.factory(target=finetune, name=NAME)
def finetune_recipe(
    dir: Optional[str] = "runs",
    name: str = f"{NAME}_finetune",
    corpus: str = "runs/corpus",
    resume_path: Optional[str] = None,
    scale: Optional[str] = None,
    peft_scheme: Optional[str] = "lora",
    devices: int = 1,
    max_steps: int = 100,
    seq_length: int = 256,
    global_batch_size: int = 8,
    micro_batch_size: int = 4,
    max_lr: Optional[float] = None,
) -> run.Partial:
    """Finetune on `corpus` by LoRA, or with `peft_scheme=none` every parameter; `resume_path` names the checkpoint."""
    choices = _finetune.Choices(
        dir, name, corpus, resume_path, scale, peft_scheme, max_steps, seq_length, global_batch_size,
        micro_batch_size, max_lr, on_corpus=True,
    )  # fmt: skip
    return _finetune.recipe(model(seq_length), small_trainer(max_steps, devices), choices)
