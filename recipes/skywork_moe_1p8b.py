"""`skywork_moe_1p8b`: Figure 7, the experts' learning rate (appendix C.1)."""

from typing import Optional

import lightning.pytorch as pl
import nemo_run as run
from lightning.pytorch.callbacks import LearningRateMonitor
from nemo.collections.llm import pretrain

from nemo_skymoe.nemo.api import pretrain as skywork_pretrain
from nemo_skymoe.nemo.model import SkyworkMoE1p8BConfig, SkyworkMoEModel
from nemo_skymoe.recipes import _common, _ours, _report
from nemo_skymoe.recipes._data import with_data
from nemo_skymoe.recipes._scale import at_scale

NAME = "skywork_moe_1p8b"


@run.cli.factory(name=f"{NAME}_model")
def model(
    seq_length: int = _ours.SMALL_SEQUENCE,
    expert_capacity_factor: Optional[float] = _ours.CAPACITY_FACTOR,
) -> run.Config[pl.LightningModule]:
    """32 experts, top-2."""
    config = run.Config(
        SkyworkMoE1p8BConfig, seq_length=seq_length, moe_expert_capacity_factor=expert_capacity_factor
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
    learning_rates: str = "baseline",
    max_lr: Optional[float] = None,
    expert_lr_multiplier: Optional[float] = None,
    edp: int = 1,
    num_nodes: int = _ours.SMALL_NODES,
    num_gpus_per_node: int = 8,
    tokens: float = _report.MOE_1P8B_TOKENS,
    decay_tokens: float = _report.MOE_1P8B_DECAY_TOKENS,
    seq_length: int = _ours.SMALL_SEQUENCE,
    global_batch_size: int = _ours.SMALL_BATCH,
    micro_batch_size: int = _ours.SMALL_MICRO_BATCH,
    warmup_steps: int = _ours.WARMUP_STEPS,
    expert_capacity_factor: Optional[float] = _ours.CAPACITY_FACTOR,
    similarity_interval: int = _ours.SIMILARITY_INTERVAL,
) -> run.Partial:
    """Pretrain from scratch at `learning_rates` baseline (6e-3), expert (experts at 1.5e-3) or all (1.5e-3).

    Linear to 10% in `tokens` tokens, then in `decay_tokens` to zero, in one run; `max_lr` and
    `expert_lr_multiplier` override the setting's.
    """
    rates = _report.MOE_1P8B_RATES[_report.one_of("learning_rates", learning_rates, _report.MOE_1P8B_RATES)]
    peak = max_lr or rates.max_lr
    multiplier = rates.expert_lr_multiplier if expert_lr_multiplier is None else expert_lr_multiplier
    decay_steps = _common.steps(decay_tokens, seq_length, global_batch_size)
    max_steps = _common.steps(tokens, seq_length, global_batch_size) + decay_steps
    # NeMo logs the learning rate of one group of parameters.
    every_group = run.Config(LearningRateMonitor, logging_interval="step")
    callbacks = [*_common.moe_callbacks(similarity_interval), every_group]
    recipe = run.Partial(
        skywork_pretrain,
        model=model(seq_length, expert_capacity_factor),
        data=_common.data(corpus, seq_length, global_batch_size, micro_batch_size),
        trainer=_common.trainer(max_steps, num_nodes, num_gpus_per_node, edp, callbacks=callbacks),
        log=_common.logger(dir, name or f"{NAME}_{learning_rates}", save_every_n_steps=1000),
        optim=_common.adam(
            peak,
            _report.MOE_1P8B_FINAL_FRACTION * peak,
            warmup_steps,
            max_steps,
            "linear",
            decay_steps,
            multiplier,
        ),
        resume=_common.resume_from(resume_path),
    )
    return with_data(at_scale(recipe, scale, corpus), corpus, mixture, phases)
