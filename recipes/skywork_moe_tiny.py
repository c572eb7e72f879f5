"""`skywork_moe_tiny`: `skywork_tiny` upcycled to 16 experts and trained on with EDP."""

from typing import Optional

import lightning.pytorch as pl
import nemo_run as run
from nemo.collections.llm import pretrain

from nemo_skymoe.nemo.api import pretrain as skywork_pretrain
from nemo_skymoe.nemo.callbacks import SkyworkMoECallback
from nemo_skymoe.nemo.corpus import corpus_data
from nemo_skymoe.nemo.model import SkyworkMoEModel, SkyworkMoETinyConfig
from nemo_skymoe.recipes._common import adam_with_cosine, logger, resume_from, small_trainer

NAME = "skywork_moe_tiny"


@run.cli.factory(name=f"{NAME}_model")
def model(expert_capacity_factor: Optional[float] = 1.25) -> run.Config[pl.LightningModule]:
    """16 experts, top-2, an MoE in every layer; normalised gate, adaptive auxiliary loss, EDP."""
    return run.Config(
        SkyworkMoEModel,
        config=run.Config(SkyworkMoETinyConfig, moe_expert_capacity_factor=expert_capacity_factor),
    )


@run.cli.factory(target=pretrain, name=NAME)
def pretrain_recipe(
    dir: Optional[str] = "runs",
    name: str = NAME,
    corpus: str = "runs/corpus",
    resume_path: Optional[str] = None,
    edp: int = 2,
    devices: int = 2,
    max_steps: int = 300,
    seq_length: int = 256,
    global_batch_size: int = 8,
    micro_batch_size: int = 8,
    max_lr: float = 1e-3,
    min_lr: float = 1e-4,
    warmup_steps: int = 20,
    expert_capacity_factor: Optional[float] = 1.25,
    val_check_interval: int = 100,
    limit_val_batches: int = 8,
    data_seed: int = 1,
    similarity_interval: int = 20,
) -> run.Partial:
    """Pretrain with Expert Data Parallelism: the `edp` ranks of a tensor-parallel group share the experts.

    `resume_path` names the checkpoint to start from, as `skymoe demo` upcycles one; None starts from scratch.
    """
    return run.Partial(
        skywork_pretrain,
        model=model(expert_capacity_factor),
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
        optim=adam_with_cosine(max_lr, min_lr, warmup_steps, max_steps),
        resume=resume_from(resume_path),
    )
