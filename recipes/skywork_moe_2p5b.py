"""`skywork_moe_2p5b`: Figure 3, gating-logit normalisation off and at three scales (section 4.1)."""

from typing import Optional

import lightning.pytorch as pl
import nemo_run as run
from nemo.collections.llm import pretrain

from nemo_skymoe.nemo.api import pretrain as skywork_pretrain
from nemo_skymoe.nemo.model import SkyworkMoE2p5BConfig, SkyworkMoEModel
from nemo_skymoe.recipes import _common, _ours, _report
from nemo_skymoe.recipes._data import with_data
from nemo_skymoe.recipes._scale import at_scale

NAME = "skywork_moe_2p5b"


@run.cli.factory(name=f"{NAME}_model")
def model(
    normalisation: str = "1",
    seq_length: int = _ours.SMALL_SEQUENCE,
    expert_capacity_factor: Optional[float] = _ours.CAPACITY_FACTOR,
) -> run.Config[pl.LightningModule]:
    """16 experts; `normalisation` is lambda of eq. (6): off, 0.5, 1 or 2."""
    scales = _report.LOGIT_NORM_SCALES
    config = run.Config(
        SkyworkMoE2p5BConfig,
        seq_length=seq_length,
        moe_router_logit_norm_scale=scales[_report.one_of("normalisation", normalisation, scales)],
        moe_expert_capacity_factor=expert_capacity_factor,
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
    normalisation: str = "1",
    edp: int = 1,
    num_nodes: int = _ours.SMALL_NODES,
    num_gpus_per_node: int = 8,
    tokens: float = _report.MOE_2P5B_TOKENS,
    seq_length: int = _ours.SMALL_SEQUENCE,
    global_batch_size: int = _ours.SMALL_BATCH,
    micro_batch_size: int = _ours.SMALL_MICRO_BATCH,
    max_lr: float = _ours.MOE_2P5B_MAX_LR,
    min_lr: float = _ours.MOE_2P5B_MIN_LR,
    warmup_steps: int = _ours.WARMUP_STEPS,
    expert_capacity_factor: Optional[float] = _ours.CAPACITY_FACTOR,
    similarity_interval: int = _ours.SIMILARITY_INTERVAL,
) -> run.Partial:
    """Pretrain from scratch with `normalisation` off, 0.5, 1 or 2; the name says which."""
    max_steps = _common.steps(tokens, seq_length, global_batch_size)
    recipe = run.Partial(
        skywork_pretrain,
        model=model(normalisation, seq_length, expert_capacity_factor),
        data=_common.data(corpus, seq_length, global_batch_size, micro_batch_size),
        trainer=_common.trainer(
            max_steps, num_nodes, num_gpus_per_node, edp, callbacks=_common.moe_callbacks(similarity_interval)
        ),
        log=_common.logger(dir, name or f"{NAME}_norm_{normalisation}", save_every_n_steps=1000),
        optim=_common.adam(max_lr, min_lr, warmup_steps, max_steps),
        resume=_common.resume_from(resume_path),
    )
    return with_data(at_scale(recipe, scale, corpus), corpus, mixture, phases)
