"""Lightning callback that runs, saves and logs the adaptive auxiliary loss in a NeMo training."""

from typing import Any

import lightning.pytorch as pl
import torch
from megatron.core import parallel_state
from nemo.utils import logging

from nemo_skymoe.moe.controller import AuxLossController
from nemo_skymoe.moe.similarity import expert_similarity
from nemo_skymoe.moe.telemetry import METRICS


class SkyworkMoECallback(pl.Callback):
    """Keep the per-layer coefficients in step with the optimizer, in checkpoints, and everything in the logs.

    Logged as `moe/<metric>_layer_<global number>` for every metric of `telemetry.LayerMetrics`, for
    `aux_loss_coefficient` and, less often, `expert_similarity`, from whichever pipeline stage has the layer.

    Args:
        log_interval: Optimizer steps between two log entries; None follows the trainer's `log_every_n_steps`.
        similarity_interval: Optimizer steps between two measurements of expert similarity; 0 for never.
    """

    def __init__(self, log_interval: int | None = None, similarity_interval: int = 100) -> None:
        self.log_interval = log_interval
        self.similarity_interval = similarity_interval
        self._controller: AuxLossController | None = None
        self._restored: dict[str, Any] | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Attach to the model and optimizer that NeMo has built by now."""
        chunks: Any = trainer.model
        controller = AuxLossController([chunk.module for chunk in chunks])
        if self._restored is not None:
            controller.load_state_dict(self._restored)
        elif trainer.ckpt_path is not None and controller.adaptive:
            logging.warning(
                "The checkpoint has no auxiliary-loss coefficients: every MoE layer starts at"
                f" {controller.coefficients.initial}."
            )
        controller.attach(_megatron_optimizer(trainer))
        self._controller = controller
        self._log_similarity(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        """Log the step that was just committed."""
        step, interval = trainer.global_step, self.log_interval or getattr(trainer, "log_every_n_steps", 50)
        if step % interval == 0:
            self._log_metrics(trainer)
        if self.similarity_interval and step % self.similarity_interval == 0:
            self._log_similarity(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Coefficients of all layers by global number; every rank calls this when a checkpoint is saved."""
        return {} if self._controller is None else self._controller.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until the model exists."""
        self._restored = state_dict or None

    def _log_metrics(self, trainer: pl.Trainer) -> None:
        controller = self._controller
        assert controller is not None
        local = {
            f"moe/aux_loss_coefficient_layer_{n}": v for n, v in controller.coefficient_by_layer().items()
        }
        for layer, metrics in controller.metrics.items():
            local |= {f"moe/{name}_layer_{layer}": getattr(metrics, name) for name in METRICS}
        _log(trainer, local)

    def _log_similarity(self, trainer: pl.Trainer) -> None:
        assert self._controller is not None
        chunks: Any = trainer.model
        similarity = expert_similarity([chunk.module for chunk in chunks])
        _log(trainer, {f"moe/expert_similarity_layer_{layer}": value for layer, value in similarity.items()})


def _log(trainer: pl.Trainer, local: dict[str, float]) -> None:
    """Collect the pipeline stages' values where the loggers are."""
    group: Any = parallel_state.get_pipeline_model_parallel_group()
    gathered: list[Any] = [local]
    if group.size() > 1:
        gathered = [None] * group.size()
        torch.distributed.all_gather_object(gathered, local, group=group)
    if trainer.is_global_zero:
        merged = {name: value for part in gathered for name, value in part.items()}
        for logger in trainer.loggers:
            logger.log_metrics(merged, step=trainer.global_step)


def _megatron_optimizer(trainer: pl.Trainer) -> Any:
    """The Megatron optimizer inside NeMo's wrapper, which drops the success flag of a step."""
    return getattr(trainer.optimizers[0], "mcore_optimizer")  # noqa: B009
