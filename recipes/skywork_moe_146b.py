"""`skywork_moe_146b`: the report's 146B model on its cluster, 192 nodes of 8 A800 (appendix B.3).

From the report: the architecture (Table 2), PP 12, EDP 4, DP 32 with ZeRO-1, sequence length 8192, the gate and
the coefficients. Ours, where it is silent: capacity factor, batch, learning rates (those of Skywork-13B's last
stage), warm-up, and the pipeline layout. Nothing here was run at this size.
"""

from typing import Optional

import lightning.pytorch as pl
import nemo_run as run
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from nemo import lightning as nl
from nemo.collections.llm import MockDataModule, pretrain
from nemo.collections.llm.recipes.precision.mixed_precision import bf16_mixed
from nemo.lightning.pytorch.callbacks import GarbageCollectionCallback

from nemo_skymoe.nemo.api import pretrain as skywork_pretrain
from nemo_skymoe.nemo.callbacks import SkyworkMoECallback
from nemo_skymoe.nemo.model import SkyworkMoE146BConfig, SkyworkMoEModel
from nemo_skymoe.recipes._common import adam_with_cosine, logger, resume_from

NAME = "skywork_moe_146b"
LAYOUT = "Et*4|(t*5|)*4(t*4|)*6t*4L"
"""52 layers on 12 stages: 4, 5, 5, 5, 5, 4, ...; the first and the last share with embedding and head."""


@run.cli.factory(name=f"{NAME}_model")
def model(expert_capacity_factor: Optional[float] = 1.25) -> run.Config[pl.LightningModule]:
    """146B parameters, 22B of them active for a token."""
    return run.Config(
        SkyworkMoEModel,
        config=run.Config(SkyworkMoE146BConfig, moe_expert_capacity_factor=expert_capacity_factor),
    )


def trainer(
    edp: int,
    pipeline_parallelism: int,
    pipeline_layout: Optional[str],
    num_nodes: int,
    num_gpus_per_node: int,
    max_steps: int,
) -> run.Config[nl.Trainer]:
    """bf16, distributed optimizer, overlapped gradient reduction; the node's NVLink carries EDP."""
    strategy = run.Config(
        nl.MegatronStrategy,
        tensor_model_parallel_size=edp,
        expert_model_parallel_size=edp,
        expert_tensor_parallel_size=1,
        sequence_parallel=True,
        pipeline_model_parallel_size=pipeline_parallelism,
        pipeline_model_parallel_layout=pipeline_layout,
        pipeline_dtype=torch.bfloat16,
        gradient_as_bucket_view=True,
        ckpt_async_save=True,
        ckpt_parallel_load=True,
        ddp=run.Config(
            DistributedDataParallelConfig,
            use_distributed_optimizer=True,
            check_for_nan_in_grad=True,
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=True,
            overlap_param_gather=True,
        ),
    )
    return run.Config(
        nl.Trainer,
        accelerator="gpu",
        devices=num_gpus_per_node,
        num_nodes=num_nodes,
        max_steps=max_steps,
        limit_val_batches=32,
        val_check_interval=1000,
        log_every_n_steps=10,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        plugins=bf16_mixed(),
        callbacks=[
            run.Config(SkyworkMoECallback, similarity_interval=1000),
            run.Config(GarbageCollectionCallback, gc_interval_train=100, gc_interval_val=100),
        ],
        strategy=strategy,
    )


@run.cli.factory(target=pretrain, name=NAME)
def pretrain_recipe(
    dir: Optional[str] = None,
    name: str = NAME,
    resume_path: Optional[str] = None,
    edp: int = 4,
    pipeline_parallelism: int = 12,
    pipeline_layout: Optional[str] = LAYOUT,
    num_nodes: int = 192,
    num_gpus_per_node: int = 8,
    max_steps: int = 60_000,
    seq_length: int = 8192,
    global_batch_size: int = 2048,
    micro_batch_size: int = 1,
    max_lr: float = 6e-5,
    min_lr: float = 6e-6,
    warmup_steps: int = 1000,
    expert_capacity_factor: Optional[float] = 1.25,
) -> run.Partial:
    """Pretrain with PP x EDP x DP; `resume_path` names the upcycled checkpoint to start from.

    Replace `data`, which is NeMo's mock, by a `PreTrainingDataModule` on your corpus.
    """
    return run.Partial(
        skywork_pretrain,
        model=model(expert_capacity_factor),
        data=run.Config(
            MockDataModule,
            seq_length=seq_length,
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
        ),
        trainer=trainer(edp, pipeline_parallelism, pipeline_layout, num_nodes, num_gpus_per_node, max_steps),
        log=logger(dir, name, save_every_n_steps=1000),
        optim=adam_with_cosine(max_lr, min_lr, warmup_steps, max_steps),
        resume=resume_from(resume_path),
    )
