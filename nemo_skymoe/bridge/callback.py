"""The callback that runs and logs the adaptive auxiliary loss in a training of Bridge."""

import logging
from typing import Any

from megatron.bridge.training.callbacks import Callback, CallbackContext

from nemo_skymoe.bridge.checkpoint import coefficients_of
from nemo_skymoe.moe.controller import AuxLossController
from nemo_skymoe.moe.scalars import check_logging, over_the_pipeline, router_scalars, similarity_scalars

logger = logging.getLogger(__name__)


class SkyworkMoECallback(Callback):
    """Keeps the per-layer coefficients in step with the optimizer, and logs every router to Bridge's loggers.

    The names are those of the NeMo callback: `moe/<metric>_layer_<global number>` for `telemetry.LayerMetrics`,
    `aux_loss_coefficient` and, less often, `expert_similarity`. Bridge itself logs Megatron's MoE losses.
    `SkyworkCheckpointManager` keeps the coefficients in checkpoints.

    Args:
        log_interval: Optimizer steps between two log entries, 0 for never; None follows Bridge's
            `logger.tensorboard_log_interval`.
        similarity_interval: Optimizer steps between two measurements of expert similarity; 0 for never.
        histogram: Whether to log the share of assignments of every expert too.
        warm_start: Coefficients of a run that starts from another's weights: "reset" begins at the initial value, "keep"
            takes those of the checkpoint. A resumed run always continues them.

    Raises:
        ConfigurationError: An argument has none of these values.
    """

    def __init__(
        self,
        log_interval: int | None = None,
        similarity_interval: int = 100,
        histogram: bool = False,
        warm_start: str = "reset",
    ) -> None:
        check_logging(log_interval, similarity_interval, warm_start)
        self.log_interval = log_interval
        self.similarity_interval = similarity_interval
        self.histogram = histogram
        self.warm_start = warm_start
        self._controller: AuxLossController | None = None

    def on_train_start(self, context: CallbackContext) -> None:
        """Attach a controller to the model and the optimizer, with the coefficients that Bridge has loaded by now."""
        controller = AuxLossController(context.model)
        coefficients = coefficients_of(context.state)
        if coefficients.restored is not None:
            controller.load_state_dict(coefficients.restored)
        controller.attach(context.optimizer)
        self._controller = coefficients.controller = controller
        self._log(context, context.state.train_state.step, similarity_scalars(context.model))

    def on_train_step_end(self, context: CallbackContext) -> None:
        """Log the step that was just committed. Bridge counts it only afterwards."""
        assert self._controller is not None
        config: Any = context.state.cfg
        step, interval = context.state.train_state.step + 1, self.log_interval
        interval = config.logger.tensorboard_log_interval if interval is None else interval
        scalars: dict[str, float] = {}
        if interval and step % interval == 0:
            scalars |= router_scalars(self._controller, self.histogram)
        if self.similarity_interval and step % self.similarity_interval == 0:
            scalars |= similarity_scalars(context.model)
        self._log(context, step, scalars)

    def _log(self, context: CallbackContext, step: int, local: dict[str, float]) -> None:
        """Collect the values of all pipeline stages, and log them on the rank that has the loggers."""
        scalars, state = over_the_pipeline(local), context.state
        if not scalars:
            return
        if state.tensorboard_logger is not None:
            for name, value in scalars.items():
                state.tensorboard_logger.add_scalar(name, value, step)
        if state.wandb_logger is not None:
            state.wandb_logger.log(scalars, step)
        for other in (state.mlflow_logger, state.comet_logger):
            if other is not None:
                other.log_metrics(scalars, step=step)


def with_callback(callbacks: Any, config: Any) -> list[Callback]:
    """Return the callbacks of a training of `config`, with one of ours if it is a Skywork-MoE and none is among them."""
    callbacks = list(callbacks)
    if getattr(config, "num_moe_experts", None) and not any(
        isinstance(callback, SkyworkMoECallback) for callback in callbacks
    ):
        callbacks.append(SkyworkMoECallback())
    return callbacks
