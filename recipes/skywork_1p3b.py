"""`skywork_1p3b` and `skywork_moe_1p3b_x8`: Figure 8, experts from one or from four dense models (appendix C.2)."""

from typing import Optional

import lightning.pytorch as pl
import nemo_run as run
from nemo.collections.llm import pretrain

from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.nemo.api import pretrain as skywork_pretrain
from nemo_skymoe.nemo.model import (
    Skywork1p3BConfig,
    SkyworkModel,
    SkyworkMoE1p3BX8Config,
    SkyworkMoEModel,
)
from nemo_skymoe.recipes import _common, _ours, _report
from nemo_skymoe.recipes._data import with_data
from nemo_skymoe.recipes._scale import at_scale

NAME = "skywork_1p3b"
MOE = "skywork_moe_1p3b_x8"


@run.cli.factory(name=f"{NAME}_model")
def model(
    seq_length: int = _ours.SMALL_SEQUENCE, train_only_ffn: bool = False
) -> run.Config[pl.LightningModule]:
    """The dense model; with `train_only_ffn` nothing but its MLPs' weights is trained."""
    config = run.Config(Skywork1p3BConfig, seq_length=seq_length, train_only_ffn=train_only_ffn)
    return run.Config(SkyworkModel, config=config)


@run.cli.factory(name=f"{MOE}_model")
def moe_model(
    seq_length: int = _ours.SMALL_SEQUENCE,
    expert_capacity_factor: Optional[float] = _ours.CAPACITY_FACTOR,
) -> run.Config[pl.LightningModule]:
    """The same with 8 experts in every layer."""
    config = run.Config(
        SkyworkMoE1p3BX8Config, seq_length=seq_length, moe_expert_capacity_factor=expert_capacity_factor
    )
    return run.Config(SkyworkMoEModel, config=config)


@run.cli.factory(target=pretrain, name=NAME)
def pretrain_recipe(
    dir: Optional[str] = "runs",
    name: Optional[str] = None,
    corpus: Optional[str] = None,
    resume_path: Optional[str] = None,
    scale: Optional[str] = None,
    mixture: Optional[str] = None,
    phases: Optional[str] = None,
    train_only_ffn: bool = False,
    num_nodes: int = _ours.SMALL_NODES,
    num_gpus_per_node: int = 8,
    tokens: Optional[float] = None,
    seq_length: int = _ours.SMALL_SEQUENCE,
    global_batch_size: int = _ours.SMALL_BATCH,
    micro_batch_size: int = _ours.MICRO_BATCH_1P3B,
    max_lr: Optional[float] = None,
    min_lr: Optional[float] = None,
    warmup_steps: Optional[int] = None,
) -> run.Partial:
    """Pretrain the dense model; with `train_only_ffn` continue it from `resume_path` on one domain, its FFNs alone.

    The domain is the corpus. Unless they are given, tokens and learning rates follow `train_only_ffn`.
    """
    if train_only_ffn and resume_path is None:
        raise ConfigurationError(
            "resume_path is None with train_only_ffn, expected a checkpoint of skywork_1p3b"
        )
    if train_only_ffn:
        budget, peak, final, warmup = (
            _report.FFN_ONLY_TOKENS,
            _ours.FFN_ONLY_LR,
            _ours.FFN_ONLY_LR,
            _ours.UPCYCLED_WARMUP_STEPS,
        )
    else:
        budget, peak, final, warmup = (
            _ours.DENSE_1P3B_TOKENS,
            _ours.DENSE_1P3B_MAX_LR,
            _ours.DENSE_1P3B_MIN_LR,
            _ours.WARMUP_STEPS,
        )
    max_steps = _common.steps(tokens or budget, seq_length, global_batch_size)
    recipe = run.Partial(
        skywork_pretrain,
        model=model(seq_length, train_only_ffn),
        data=_common.data(corpus, seq_length, global_batch_size, micro_batch_size),
        trainer=_common.trainer(max_steps, num_nodes, num_gpus_per_node),
        log=_common.logger(dir, name or (f"{NAME}_ffn" if train_only_ffn else NAME), save_every_n_steps=1000),
        optim=_common.adam(
            max_lr or peak,
            final if min_lr is None else min_lr,
            warmup if warmup_steps is None else warmup_steps,
            max_steps,
        ),
        resume=_common.resume_from(resume_path),
    )
    return with_data(at_scale(recipe, scale, corpus), corpus, mixture, phases)


@run.cli.factory(target=pretrain, name=MOE)
def moe_pretrain_recipe(
    dir: Optional[str] = "runs",
    name: Optional[str] = None,
    corpus: Optional[str] = None,
    resume_path: Optional[str] = None,
    scale: Optional[str] = None,
    mixture: Optional[str] = None,
    phases: Optional[str] = None,
    sources: int = 1,
    edp: int = _ours.MOE_1P3B_EDP,
    num_nodes: int = _ours.SMALL_NODES,
    num_gpus_per_node: int = 8,
    tokens: float = _report.MOE_1P3B_TOKENS,
    seq_length: int = _ours.SMALL_SEQUENCE,
    global_batch_size: int = _ours.SMALL_BATCH,
    micro_batch_size: int = _ours.MICRO_BATCH_1P3B,
    max_lr: float = _ours.MOE_1P3B_MAX_LR,
    min_lr: float = _ours.MOE_1P3B_MIN_LR,
    warmup_steps: int = _ours.UPCYCLED_WARMUP_STEPS,
    expert_capacity_factor: Optional[float] = _ours.CAPACITY_FACTOR,
    similarity_interval: int = _ours.SIMILARITY_INTERVAL,
) -> run.Partial:
    """Pretrain the MoE that `resume_path` was upcycled to from one dense model, or from four.

    Four: three experts each of a Chinese and an English model, one of code and one of the base (`skymoe upcycle`
    takes them); `sources` names the run.
    """
    if sources not in (1, 4):
        raise ConfigurationError(f"sources is {sources}, expected 1 or 4")
    max_steps = _common.steps(tokens, seq_length, global_batch_size)
    recipe = run.Partial(
        skywork_pretrain,
        model=moe_model(seq_length, expert_capacity_factor),
        data=_common.data(corpus, seq_length, global_batch_size, micro_batch_size),
        trainer=_common.trainer(
            max_steps, num_nodes, num_gpus_per_node, edp, callbacks=_common.moe_callbacks(similarity_interval)
        ),
        log=_common.logger(dir, name or f"{MOE}_{sources}_sources", save_every_n_steps=1000),
        optim=_common.adam(max_lr, min_lr, warmup_steps, max_steps),
        resume=_common.resume_from(resume_path),
    )
    return with_data(at_scale(recipe, scale, corpus), corpus, mixture, phases)
