"""The argument `scale=` trains any recipe on CPU ranks: "toy" shows that it works, "miniature" learns something."""

from typing import Any, Optional

import nemo_run as run
import torch
from nemo import lightning as nl

from nemo_skymoe.experiments.scales import CORPUS, at_scale
from nemo_skymoe.recipes import _parts
from nemo_skymoe.recipes._trainer import Training


def scaled(recipe: Any, training: Training, scale: Optional[str], corpus: Optional[str] = None) -> Any:
    """Return `recipe` itself or, at a scale of `experiments.scales`, with the values that its training has there.

    The vocabulary is that of the corpus in the folder `corpus`, by default `runs/corpus`.

    Raises:
        ConfigurationError: There is no such scale.
    """
    if scale is None:
        return recipe
    chosen: Any = training
    small = at_scale(chosen, scale)
    _set_model(recipe.model.config, small)
    _set_steps(recipe, small)
    recipe.data = _parts.data(
        corpus or CORPUS,
        seq_length=small.seq_length,
        global_batch_size=small.global_batch_size,
        micro_batch_size=small.micro_batch_size,
        seed=getattr(small, "data_seed", 1),
    )
    _set_devices(recipe, small)
    if small.precision == "32":
        recipe.trainer.plugins = run.Config(nl.MegatronMixedPrecision, precision="32", autocast_enabled=False)
        recipe.trainer.strategy.pipeline_dtype = torch.float32
    return recipe


def _set_model(config: Any, small: Training) -> None:
    sizes = small.architecture
    config.num_layers, config.hidden_size = sizes.num_layers, sizes.hidden_size
    config.ffn_hidden_size, config.num_attention_heads = sizes.ffn_hidden_size, sizes.num_attention_heads
    config.seq_length = small.seq_length


def _set_steps(recipe: Any, small: Training) -> None:
    trainer, schedule = recipe.trainer, recipe.optim.lr_scheduler
    trainer.max_steps, trainer.val_check_interval = small.max_steps, small.val_check_interval
    trainer.limit_val_batches, trainer.log_every_n_steps = small.limit_val_batches, small.log_interval
    recipe.log.ckpt.every_n_train_steps = small.save_interval
    schedule.warmup_steps, schedule.max_steps = small.warmup_steps, small.max_steps
    schedule.decay_steps = small.decay_steps


def _set_devices(recipe: Any, small: Training) -> None:
    recipe.trainer.num_nodes, recipe.trainer.devices = small.num_nodes, small.num_gpus_per_node
    strategy = recipe.trainer.strategy
    strategy.tensor_model_parallel_size = strategy.expert_model_parallel_size = small.edp
    strategy.sequence_parallel = strategy.sequence_parallel and small.edp > 1
    if strategy.pipeline_model_parallel_size > 1:
        strategy.pipeline_model_parallel_size = small.pipeline_parallelism
    if getattr(recipe, "pipeline", None) is not None:
        recipe.pipeline = None  # a plan is for so many layers and stages
