"""The configuration of a pretraining."""

from pathlib import Path
from typing import Any

from megatron.bridge.training.config import ConfigContainer

from nemo_skymoe.bridge.data import CorpusConfig, tokenizer_of
from nemo_skymoe.bridge.recipes import _parts
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.data.mixture import parse
from nemo_skymoe.experiments.arguments import Given
from nemo_skymoe.experiments.catalogue import Chosen
from nemo_skymoe.experiments.phases import read_phases
from nemo_skymoe.experiments.rates import check_rates


def pretraining(chosen: Chosen) -> ConfigContainer:
    """Make the configuration.

    Raises:
        ConfigurationError: A value makes no sense. The message names it.
    """
    run: Any = chosen.run
    given: Any = chosen.given
    _check_data(given, chosen.corpus)
    check_rates(run.max_lr, run.min_lr, run.expert_lr_multiplier)
    made = _parts.container(
        run,
        given.dir,
        given.resume_path,
        model=_parts.model(run, pipeline_recompute=_listed(run.pipeline_recompute)),
        optimizer=_parts.adam(run.max_lr, run.min_lr),
        scheduler=_parts.schedule(run, run.lr_shape),
        optimizer_config_override_provider=_parts.expert_rate(run.expert_lr_multiplier),
        **_data(run, chosen.corpus, given.mixture),
    )
    if given.phases is not None:
        _set_phases(made, Path(given.phases))
    return made


def _check_data(given: Given, corpus: str | None) -> None:
    if corpus is None and (given.mixture is not None or given.phases is not None):
        raise ConfigurationError("corpus is None, expected the folder with the domains of mixture or phases")
    if given.mixture is not None and given.phases is not None:
        raise ConfigurationError(
            f"mixture is '{given.mixture}', expected none beside phases, which have their own"
        )


def _listed(counts: tuple[tuple[int, ...], ...] | None) -> list[list[int]] | None:
    return None if counts is None else [list(stage) for stage in counts]


def _data(run: Any, corpus: str | None, mixture: str | None) -> dict[str, Any]:
    if corpus is None:
        return _parts.random_tokens(run, run.data_seed)
    dataset = CorpusConfig(
        corpus=corpus,
        seq_length=run.seq_length,
        random_seed=run.data_seed,
        mixtures=None if mixture is None else [str(parse(mixture))],
    )
    return {"dataset": dataset, "tokenizer": tokenizer_of(Path(corpus))}


def _set_phases(made: ConfigContainer, file: Path) -> None:
    """Replace tokens, mixture and learning rates by those of the phases in a file. All of them are one run."""
    dataset: Any = made.dataset
    train: Any = made.train
    phases = read_phases(file)
    schedules = [phase.schedule(dataset.seq_length * train.global_batch_size) for phase in phases]
    dataset.mixtures = [phase.mixture for phase in phases]
    dataset.steps = [schedule.max_steps for schedule in schedules]
    train.train_iters = sum(dataset.steps)
    made.validation.eval_interval = min(made.validation.eval_interval or 0, train.train_iters)
    made.optimizer.lr, made.optimizer.min_lr = phases[0].max_lr, phases[0].min_lr
    scheduler: Any = made.scheduler
    scheduler.lr_warmup_iters = scheduler.lr_final_decay_iters = 0
    scheduler.lr_phases = [
        {**vars(schedule), "peak": phase.max_lr / phases[0].max_lr}
        for phase, schedule in zip(phases, schedules, strict=True)
    ]
