"""The Lightning callback that runs, saves and logs the adaptive auxiliary loss in a NeMo training."""
# No `from __future__ import annotations`: NeMo-Run reads these signatures.

import logging
from pathlib import Path
from typing import Any, Optional

import lightning.pytorch as pl
import torch
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.transformer.moe.moe_utils import clear_aux_losses_tracker, track_moe_metrics

from nemo_skymoe.checkpoint.torch_dist.common_state import read_common_state
from nemo_skymoe.moe.controller import AuxLossController
from nemo_skymoe.moe.scalars import check_logging, over_the_pipeline, router_scalars, similarity_scalars

logger = logging.getLogger(__name__)

_LOSSES = {
    "aux_loss": "load_balancing_loss",
    "seq_aux_loss": "seq_load_balancing_loss",
    "global_aux_loss": "global_load_balancing_loss",
}


class SkyworkMoECallback(pl.Callback):
    """Keeps the per-layer coefficients in step with the optimizer and in checkpoints, and logs every router.

    The pipeline stage that has a layer logs it, as `moe/<metric>_layer_<global number>`. The metrics are those of
    `telemetry.LayerMetrics` (in dropless training the drop rate is `virtual_drop_rate`), `aux_loss_coefficient` and,
    less often, `expert_similarity`. With `histogram` the callback also logs `moe/load_layer_<n>_expert_<e>`. It logs
    the mean over layers of Megatron's own MoE losses under their names (`load_balancing_loss`, `z_loss`), because
    NeMo's strategy has that switched off.

    Args:
        log_interval: Optimizer steps between two log entries, 0 for never; None follows the trainer's
            `log_every_n_steps`.
        similarity_interval: Optimizer steps between two measurements of expert similarity; 0 for never.
        histogram: Whether to log the share of assignments of every expert too.
        warm_start: Coefficients of a run that starts from another's weights (`nl.RestoreConfig`): "reset" begins at the
            initial value, "keep" takes those of the checkpoint. A resumed run always continues them.

    Raises:
        ConfigurationError: An argument has none of these values.
    """

    def __init__(
        self,
        log_interval: Optional[int] = None,
        similarity_interval: int = 100,
        histogram: bool = False,
        warm_start: str = "reset",
    ) -> None:
        check_logging(log_interval, similarity_interval, warm_start)
        self.log_interval = log_interval
        self.similarity_interval = similarity_interval
        self.histogram = histogram
        self.warm_start = warm_start
        self._controller: Optional[AuxLossController] = None
        self._restored: dict[str, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Attach a controller to the model and the optimizer, which NeMo has built by now."""
        chunks: Any = trainer.model
        controller = AuxLossController([chunk.module for chunk in chunks])
        restore: Any = getattr(trainer.strategy, "restore_config", None)
        if trainer.ckpt_path is not None:
            controller.load_state_dict(self._restored)
        elif restore is not None and self.warm_start == "keep":
            controller.load_state_dict(self._saved_state(Path(restore.path)))
        controller.attach(_megatron_optimizer(trainer))
        self._controller = controller
        if not getattr(pl_module, "tells_padding", False):
            logger.warning(
                f"{type(pl_module).__name__} does not tell its routers what is padding, which then counts in the drop"
                " rate and the coefficients: expected a SkyworkMoEModel where batches are padded"
            )
        self._log_similarity(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        """Log the step that was just committed."""
        step, interval = trainer.global_step, self.log_interval
        interval = getattr(trainer, "log_every_n_steps", 50) if interval is None else interval
        if interval and step % interval == 0:
            self._log_metrics(trainer)
            self._log_losses(trainer)
        clear_aux_losses_tracker()
        if self.similarity_interval and step % self.similarity_interval == 0:
            self._log_similarity(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return the coefficients of all layers by global number. Every rank calls this when a checkpoint is saved."""
        return {} if self._controller is None else self._controller.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until the model exists."""
        self._restored = state_dict

    def _saved_state(self, checkpoint: Path) -> dict[str, Any]:
        state: Any = read_common_state(checkpoint)
        for key in ("callbacks", self.state_key):
            state = state.get(key, {}) if isinstance(state, dict) else {}
        return state if isinstance(state, dict) else {}

    def _log_metrics(self, trainer: pl.Trainer) -> None:
        assert self._controller is not None
        _log(trainer, router_scalars(self._controller, self.histogram))

    def _log_losses(self, trainer: pl.Trainer) -> None:
        assert self._controller is not None
        config = self._controller.config
        kinds = config.moe_router_load_balancing_type
        names = [_LOSSES[kind] for kind in ([kinds] if isinstance(kinds, str) else kinds) if kind in _LOSSES]
        names += ["z_loss"] if config.moe_z_loss_coeff is not None else []
        losses: dict[str, torch.Tensor] = {}
        # Every rank asks for the losses by name: a stage without an MoE layer has to take part in the reductions.
        track_moe_metrics(
            loss_scale=1.0 / (get_num_microbatches() or 1),
            iteration=trainer.global_step,
            writer=None,
            total_loss_dict=losses,
            force_initialize=True,
            track_names=names,
            num_layers=config.num_layers,
            moe_layer_freq=config.moe_layer_freq,
        )
        _log(trainer, {name: float(losses[name]) for name in names})

    def _log_similarity(self, trainer: pl.Trainer) -> None:
        chunks: Any = trainer.model
        _log(trainer, similarity_scalars([chunk.module for chunk in chunks]))


def _log(trainer: pl.Trainer, local: dict[str, float]) -> None:
    """Collect the values of all pipeline stages, and log them on the rank that has the loggers."""
    merged = over_the_pipeline(local)
    if trainer.is_global_zero:
        for logger in trainer.loggers:
            logger.log_metrics(merged, step=trainer.global_step)


def _megatron_optimizer(trainer: pl.Trainer) -> Any:
    """Return the Megatron optimizer inside NeMo's wrapper, which drops the success flag of a step."""
    return getattr(trainer.optimizers[0], "mcore_optimizer")  # noqa: B009
