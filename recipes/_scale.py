"""The argument `scale=` trains any recipe on CPU ranks: "toy" shows that it works, "miniature" learns something."""

from typing import Any, Optional

import nemo_run as run
import torch
from nemo import lightning as nl

from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.experiments.runs import steps as steps_of
from nemo_skymoe.experiments.scales import SCALES, Scale
from nemo_skymoe.recipes import _parts

CORPUS = "runs/corpus"


def at_scale(recipe: Any, scale: Optional[str], corpus: Optional[str] = None) -> Any:
    """Return `recipe` itself or, at a scale of `SCALES`, a smaller one.

    Width, depth, sequence, batch, vocabulary, steps and devices are smaller. Model-parallel sizes shrink with the
    devices: EDP to at most as many ranks, or else the pipeline to as many stages; otherwise the ranks are
    data-parallel. Learning rates stay. The vocabulary is that of the corpus in the folder `corpus`, by default
    `runs/corpus`.

    Raises:
        ConfigurationError: There is no such scale.
    """
    if scale is None:
        return recipe
    if scale not in SCALES:
        raise ConfigurationError(
            f"scale is {scale!r}, expected {' or '.join(SCALES)}, or nothing for the size of the report"
        )
    sizes = SCALES[scale]
    config = recipe.model.config
    config.num_layers, config.hidden_size = sizes.layers, sizes.hidden_size
    config.ffn_hidden_size, config.num_attention_heads = sizes.ffn_hidden_size, sizes.heads
    config.seq_length = sizes.seq_length
    _shrink_steps(recipe, sizes)
    recipe.data = _parts.data(
        corpus or CORPUS,
        seq_length=sizes.seq_length,
        global_batch_size=sizes.batch,
        micro_batch_size=sizes.batch // sizes.ranks,
    )
    _shrink_devices(recipe, sizes.ranks)
    if sizes.float32:
        recipe.trainer.plugins = run.Config(nl.MegatronMixedPrecision, precision="32", autocast_enabled=False)
        recipe.trainer.strategy.pipeline_dtype = torch.float32
    return recipe


def _shrink_steps(recipe: Any, sizes: Scale) -> None:
    trainer, schedule, before = recipe.trainer, recipe.optim.lr_scheduler, recipe.trainer.max_steps
    steps = sizes.steps
    if sizes.token_share:
        tokens = before * recipe.data.seq_length * recipe.data.global_batch_size
        steps = steps_of(tokens * sizes.token_share, sizes.seq_length, sizes.batch)

    def shrunk(count: int, least: int) -> int:
        return min(count, max(least, round(count * steps / before)))

    trainer.max_steps = steps
    trainer.val_check_interval = max(1, steps // sizes.validations)
    trainer.limit_val_batches, trainer.log_every_n_steps = sizes.validation_batches, sizes.log_interval
    saved = recipe.log.ckpt.every_n_train_steps
    recipe.log.ckpt.every_n_train_steps = shrunk(saved, 1) if sizes.token_share else steps
    schedule.warmup_steps = min(shrunk(schedule.warmup_steps, sizes.least_warmup), steps // 4)
    schedule.max_steps, schedule.decay_steps = steps, shrunk(schedule.decay_steps, 1)


def _shrink_devices(recipe: Any, ranks: int) -> None:
    recipe.trainer.num_nodes, recipe.trainer.devices = 1, ranks
    strategy = recipe.trainer.strategy
    edp = min(ranks, strategy.tensor_model_parallel_size)
    strategy.tensor_model_parallel_size = strategy.expert_model_parallel_size = edp
    strategy.sequence_parallel = strategy.sequence_parallel and edp > 1
    if strategy.pipeline_model_parallel_size > 1:
        strategy.pipeline_model_parallel_size = ranks // edp
    if getattr(recipe, "pipeline", None) is not None:
        recipe.pipeline = None  # a plan is for so many layers and stages
