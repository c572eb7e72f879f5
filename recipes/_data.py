"""The arguments `mixture=` and `phases=` of pretraining recipes: a mixture of domains, or several phases.

The report trains like this in section 5.
"""

from pathlib import Path
from typing import Any, Optional

import nemo_run as run

from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.data.mixture import parse
from nemo_skymoe.experiments.phases import Phase, read_phases
from nemo_skymoe.nemo.learning_rate import LearningRateSchedule
from nemo_skymoe.nemo.mixture import mixture_data
from nemo_skymoe.nemo.training_phases import PhasedLearningRate


def with_data(recipe: Any, corpus: Optional[str], mixture: Optional[str], phases: Optional[str]) -> Any:
    """Return `recipe` itself, or with the `mixture` of domains in the folder `corpus`, or with the `phases` of a file.

    Phases replace the recipe's tokens, mixture and learning rates. All of them are one run: optimizer, adaptive
    coefficients and the position in each domain carry over. The run resumes inside any phase, and a finished run takes
    further phases.

    Raises:
        ConfigurationError: A mixture or a file makes no sense, both are given, or there is no `corpus` to take them
            from.
    """
    if mixture is None and phases is None:
        return recipe
    if corpus is None:
        raise ConfigurationError("corpus is None, expected the folder with the domains of mixture or phases")
    if mixture is not None and phases is not None:
        raise ConfigurationError(f"mixture is '{mixture}', expected none beside phases, which have their own")
    options = ("seq_length", "global_batch_size", "micro_batch_size", "seed")
    kept = {name: value for name in options if (value := getattr(recipe.data, name, None)) is not None}
    recipe.data = run.Config(mixture_data, corpus=corpus, **kept)
    if phases is None:
        recipe.data.mixtures = [str(parse(mixture or ""))]
        return recipe
    return _in_phases(recipe, Path(phases))


def _in_phases(recipe: Any, file: Path) -> Any:
    phases = read_phases(file)
    tokens_per_step = recipe.data.seq_length * recipe.data.global_batch_size
    steps = [phase.steps(tokens_per_step) for phase in phases]
    recipe.data.mixtures, recipe.data.steps = [phase.mixture for phase in phases], steps
    recipe.trainer.max_steps = sum(steps)
    recipe.trainer.val_check_interval = min(recipe.trainer.val_check_interval, sum(steps))
    recipe.optim.config.lr, recipe.optim.config.min_lr = phases[0].max_lr, phases[0].min_lr
    recipe.optim.lr_scheduler = run.Config(
        PhasedLearningRate,
        phases=[_schedule(phase, tokens_per_step) for phase in phases],
        peaks=[phase.max_lr / phases[0].max_lr for phase in phases],
    )
    return recipe


def _schedule(phase: Phase, tokens_per_step: int) -> Any:
    values = phase.schedule(tokens_per_step)
    return run.Config(
        LearningRateSchedule,
        shape=values.shape,
        warmup_steps=values.warmup_steps,
        max_steps=values.max_steps,
        final_fraction=values.final_fraction,
    )
