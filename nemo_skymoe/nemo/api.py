"""`pretrain` and `finetune` run NeMo's own functions after checking the training and curing the platform's defects."""
# No `from __future__ import annotations`: NeMo-Run reads these signatures.

import logging as python_logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional, Union

import lightning.pytorch as pl
from nemo.collections import llm
from nemo.lightning import AutoResume, NeMoLogger, OptimizerModule, Trainer
from nemo.lightning.pytorch.callbacks import PEFT, ModelTransform
from nemo.utils import logging

from nemo_skymoe.checkpoint.torch_dist.pickle_check import check_loaded
from nemo_skymoe.config import SkyworkOptions
from nemo_skymoe.doctor import require_supported
from nemo_skymoe.nemo import checks
from nemo_skymoe.nemo.callbacks import SkyworkMoECallback
from nemo_skymoe.nemo.pipeline import PipelinePlan
from nemo_skymoe.nemo.schedule_length import ScheduleOfThisRun
from nemo_skymoe.patches import (
    checked_context,
    lora_without_te,
    nemo_cpu,
    optimizer_arguments,
    tensorstore_import,
)


def pretrain(
    model: pl.LightningModule,
    data: pl.LightningDataModule,
    trainer: Trainer,
    log: Optional[NeMoLogger] = None,
    resume: Optional[AutoResume] = None,
    optim: Optional[OptimizerModule] = None,
    pipeline: Optional[PipelinePlan] = None,
) -> Path:
    """Pretrain with NeMo, as `nemo.collections.llm.pretrain` does, and with a pipeline plan if one is given.

    Without CUDA the function applies the CPU runtime first. It gives a Skywork-MoE model the callback that runs its
    adaptive auxiliary loss, unless the trainer has one already.

    Raises:
        ConfigurationError: The versions do not work together, the parallel sizes do not divide the ranks or the
            experts, the plan does not fit them, or the checkpoint to start from is missing or of another architecture.
    """
    _prepare(model, data, trainer, resume, optim, pipeline)
    _add_controller(model, trainer)
    checks.warn_of_own_checkpoint(resume, log)
    return llm.pretrain(model=model, data=data, trainer=trainer, log=log, resume=resume, optim=optim)


def finetune(
    model: pl.LightningModule,
    data: pl.LightningDataModule,
    trainer: Trainer,
    log: Optional[NeMoLogger] = None,
    resume: Optional[AutoResume] = None,
    optim: Optional[OptimizerModule] = None,
    peft: Optional[Union[PEFT, ModelTransform, Callable]] = None,
    tokenizer: Optional[Any] = "model",
    pipeline: Optional[PipelinePlan] = None,
) -> Path:
    """Finetune with NeMo, as `nemo.collections.llm.finetune` does, and with a pipeline plan if one is given.

    Under `peft` the routers are frozen with everything else, and nothing balances their load.

    Raises:
        ConfigurationError: For the same reasons as `pretrain`; or because `peft` targets the router, or experts that
            are spread over ranks.
    """
    _prepare(model, data, trainer, resume, optim, pipeline, peft)
    if peft is None:
        _add_controller(model, trainer)
    return llm.finetune(
        model=model,
        data=data,
        trainer=trainer,
        log=log,
        resume=resume,
        optim=optim,
        peft=peft,
        tokenizer=tokenizer,
    )


def _prepare(
    model: Any,
    data: Any,
    trainer: Any,
    resume: Any,
    optim: Any,
    pipeline: Optional[PipelinePlan],
    peft: Any = None,
) -> None:
    require_supported(nemo=True)
    log_through_nemo()
    nemo_cpu.apply()
    optimizer_arguments.apply()
    tensorstore_import.apply()
    checked_context.apply(check_loaded)
    config = getattr(model, "config", None)
    if peft is not None:
        lora_without_te.apply()
    started = os.environ.get("WORLD_SIZE")
    checks.check_training(
        model, trainer, optim, pipeline, peft, data, started=None if started is None else int(started)
    )
    checks.check_warm_start(resume, config, checks.vocabulary_of(data))
    checks.check_what_is_unpickled(resume, trainer, data)
    trainer.callbacks.append(ScheduleOfThisRun(checks.optimizer_of(model, optim)))
    if config is not None:
        logging.info(
            f"rotary_base is {config.rotary_base} at seq_length {config.seq_length}: expected the base that the"
            " weights to start from were trained with"
        )


def _add_controller(model: Any, trainer: Any) -> None:
    if isinstance(getattr(model, "config", None), SkyworkOptions) and not any(
        isinstance(callback, SkyworkMoECallback) for callback in trainer.callbacks
    ):
        trainer.callbacks.append(SkyworkMoECallback())


class _ToNemo(python_logging.Handler):
    def emit(self, record: python_logging.LogRecord) -> None:
        say = logging.warning if record.levelno >= python_logging.WARNING else logging.info
        say(self.format(record))


def log_through_nemo() -> None:
    """Let NeMo's log carry the messages of this package, such as the dispatcher that was chosen."""
    logger = python_logging.getLogger("nemo_skymoe")
    if not logger.handlers:
        logger.addHandler(_ToNemo())
        logger.setLevel(python_logging.INFO)
        logger.propagate = False
