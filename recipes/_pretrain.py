"""A pretraining recipe, made of a training in plain values and of a user's arguments."""

from typing import Any

import lightning.pytorch as pl
import nemo_run as run

from nemo_skymoe.experiments.arguments import Given
from nemo_skymoe.experiments.runs import Demonstration, Pretraining
from nemo_skymoe.nemo.api import pretrain
from nemo_skymoe.nemo.callbacks import SkyworkMoECallback
from nemo_skymoe.nemo.corpus import corpus_data
from nemo_skymoe.nemo.pipeline import PipelinePlan
from nemo_skymoe.recipes import _parts
from nemo_skymoe.recipes._data import with_data
from nemo_skymoe.recipes._scale import scaled
from nemo_skymoe.recipes._trainer import Callbacks, trainer_of


def pretraining(
    training: Pretraining | Demonstration,
    given: Given,
    model: Any,
    callbacks: Callbacks = (),
    **overlap: bool,
) -> run.Partial:
    """Make the recipe.

    Args:
        training: The sizes, and the name of the run unless another is given.
        given: The arguments that a user gives to any recipe.
        model: NeMo-Run's configuration of the model.
        callbacks: Callbacks after the one that runs an MoE's adaptive coefficients and logs its router.
        overlap: Options of `_trainer.cluster_trainer`.

    Raises:
        ConfigurationError: A value makes no sense. The message names it.
    """
    made = run.Partial(
        pretrain,
        model=model,
        data=_data(training, given),
        trainer=trainer_of(training, [*_moe_callbacks(training), *callbacks], **overlap),
        log=_parts.logger(
            given.dir,
            given.name or training.name,
            save_every_n_steps=training.save_interval,
            keep=training.kept_checkpoints,
        ),
        optim=_parts.adam(
            max_lr=training.max_lr,
            min_lr=training.min_lr,
            warmup_steps=training.warmup_steps,
            max_steps=training.max_steps,
            shape=training.lr_shape,
            decay_steps=training.decay_steps,
            expert_lr_multiplier=training.expert_lr_multiplier,
        ),
        resume=_parts.resume_from(given.resume_path),
    )
    if training.pipeline_layout is not None:
        recompute = training.pipeline_recompute
        counts = None if recompute is None else [list(stage) for stage in recompute]
        made.pipeline = run.Config(PipelinePlan, layout=training.pipeline_layout, recompute=counts)
    return with_data(
        scaled(made, training, given.scale, given.corpus), given.corpus, given.mixture, given.phases
    )


def _data(training: Pretraining | Demonstration, given: Given) -> Any:
    sizes: dict[str, Any] = {
        "seq_length": training.seq_length,
        "global_batch_size": training.global_batch_size,
        "micro_batch_size": training.micro_batch_size,
        "seed": training.data_seed,
    }
    if isinstance(training, Demonstration):
        return run.Config(corpus_data, corpus=given.corpus, **sizes)
    return _parts.data(given.corpus, vocab_size=training.architecture.vocab_size, **sizes)


def _moe_callbacks(training: Pretraining | Demonstration) -> list[run.Config[pl.Callback]]:
    if training.architecture.num_moe_experts is None:
        return []
    return [run.Config(SkyworkMoECallback, similarity_interval=training.similarity_interval)]
