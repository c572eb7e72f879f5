"""`skywork_300m` and `skywork_moe_300m_x8`: Figure 1, upcycling against training from scratch (section 3)."""

from typing import Optional

import lightning.pytorch as pl
import nemo_run as run
from nemo.collections.llm import pretrain

from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.nemo.api import pretrain as skywork_pretrain
from nemo_skymoe.nemo.model import (
    Skywork300MConfig,
    SkyworkModel,
    SkyworkMoE300MX8Config,
    SkyworkMoEModel,
)
from nemo_skymoe.recipes import _common, _ours, _report
from nemo_skymoe.recipes._data import with_data
from nemo_skymoe.recipes._scale import at_scale

NAME = "skywork_300m"
MOE = "skywork_moe_300m_x8"
SAVED_TOKENS = 10e9
"""Between two checkpoints of the dense run, all of which are kept: two of them are upcycled."""


@run.cli.factory(name=f"{NAME}_model")
def model(seq_length: int = _ours.SMALL_SEQUENCE) -> run.Config[pl.LightningModule]:
    """The dense model."""
    return run.Config(SkyworkModel, config=run.Config(Skywork300MConfig, seq_length=seq_length))


@run.cli.factory(name=f"{MOE}_model")
def moe_model(
    seq_length: int = _ours.SMALL_SEQUENCE,
    expert_capacity_factor: Optional[float] = _ours.CAPACITY_FACTOR,
) -> run.Config[pl.LightningModule]:
    """The same with 8 experts in every layer."""
    config = run.Config(
        SkyworkMoE300MX8Config, seq_length=seq_length, moe_expert_capacity_factor=expert_capacity_factor
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
    num_nodes: int = _ours.SMALL_NODES,
    num_gpus_per_node: int = 8,
    tokens: float = _report.DENSE_300M_TOKENS,
    seq_length: int = _ours.SMALL_SEQUENCE,
    global_batch_size: int = _ours.SMALL_BATCH,
    micro_batch_size: int = _ours.SMALL_MICRO_BATCH,
    max_lr: float = _report.DENSE_300M_MAX_LR,
    min_lr: float = _report.DENSE_300M_MIN_LR,
    warmup_steps: int = _ours.WARMUP_STEPS,
) -> run.Partial:
    """Pretrain the dense model that is upcycled, keeping a checkpoint every 10B tokens."""
    max_steps = _common.steps(tokens, seq_length, global_batch_size)
    save = _common.steps(SAVED_TOKENS, seq_length, global_batch_size)
    recipe = run.Partial(
        skywork_pretrain,
        model=model(seq_length),
        data=_common.data(corpus, seq_length, global_batch_size, micro_batch_size),
        trainer=_common.trainer(max_steps, num_nodes, num_gpus_per_node),
        log=_common.logger(dir, name, save, keep=-1),
        optim=_common.adam(max_lr, min_lr, warmup_steps, max_steps),
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
    start: str = "scratch",
    budget: str = "100b",
    edp: int = 1,
    num_nodes: int = _ours.SMALL_NODES,
    num_gpus_per_node: int = 8,
    seq_length: int = _ours.SMALL_SEQUENCE,
    global_batch_size: int = _ours.SMALL_BATCH,
    micro_batch_size: int = _ours.SMALL_MICRO_BATCH,
    expert_capacity_factor: Optional[float] = _ours.CAPACITY_FACTOR,
    similarity_interval: int = _ours.SIMILARITY_INTERVAL,
) -> run.Partial:
    """Pretrain the MoE from `start` (scratch, 100b, 300b, 300b_high_lr) for `budget` (100b, 300b) tokens.

    The name says both. But from scratch, `resume_path` names the dense checkpoint of that age, upcycled.
    """
    chosen = _report.MOE_300M_STARTS[_report.one_of("start", start, _report.MOE_300M_STARTS)]
    tokens = _report.MOE_300M_BUDGETS[_report.one_of("budget", budget, _report.MOE_300M_BUDGETS)]
    if (resume_path is None) != (chosen.checkpoint == ""):
        expected = f"{chosen.checkpoint}, upcycled" if chosen.checkpoint else "none"
        raise ConfigurationError(f"resume_path is {resume_path} with start={start}, expected {expected}")
    max_steps = _common.steps(tokens, seq_length, global_batch_size)
    warmup = _ours.UPCYCLED_WARMUP_STEPS if chosen.checkpoint else _ours.WARMUP_STEPS
    recipe = run.Partial(
        skywork_pretrain,
        model=moe_model(seq_length, expert_capacity_factor),
        data=_common.data(corpus, seq_length, global_batch_size, micro_batch_size),
        trainer=_common.trainer(
            max_steps, num_nodes, num_gpus_per_node, edp, callbacks=_common.moe_callbacks(similarity_interval)
        ),
        log=_common.logger(dir, name or f"{MOE}_{start}_{budget}", save_every_n_steps=1000),
        optim=_common.adam(chosen.max_lr, _report.MOE_300M_MIN_LR, warmup, max_steps, chosen.shape),
        resume=_common.resume_from(resume_path),
    )
    return with_data(at_scale(recipe, scale, corpus), corpus, mixture, phases)
