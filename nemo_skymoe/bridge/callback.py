"""The callback that runs and logs the adaptive auxiliary loss in a training of Bridge."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron.bridge.training.callbacks import Callback, CallbackContext
from megatron.bridge.training.config import ConfigContainer

from nemo_skymoe.bridge.checkpoint import KEY, coefficients_of, manager_name
from nemo_skymoe.bridge.logger import SkyworkLoggerConfig
from nemo_skymoe.checkpoint.run_folder import checkpoint_of
from nemo_skymoe.checkpoint.torch_dist.common_state import read_common_state
from nemo_skymoe.config import ConfigurationError, SkyworkOptions
from nemo_skymoe.moe.controller import AuxLossController
from nemo_skymoe.moe.scalars import check_logging, over_the_pipeline, router_scalars, similarity_scalars


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
        _check_saved(context.state.cfg, controller)
        if coefficients.restored is not None:
            controller.load_state_dict(coefficients.restored)
        elif (step := context.state.train_state.step) or self.warm_start == "keep":
            controller.load_state_dict(_saved_state(context.state.cfg, step))
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


def _check_saved(config: Any, controller: AuxLossController) -> None:
    """Refuse to train with coefficients that no checkpoint would keep."""
    manager = config.checkpoint.custom_manager_class
    if controller.adaptive and config.checkpoint.save is not None and manager != manager_name():
        raise ConfigurationError(
            f"checkpoint.custom_manager_class is {manager!r}, expected '{manager_name()}', without which checkpoints do not"
            " keep the coefficients; nemo_skymoe.bridge.training.pretrain sets it"
        )


def _saved_state(config: Any, step: int) -> dict[str, Any]:
    """Return the controller's state in the checkpoint of another run, or of this one's `step`; empty if it has none.

    Bridge loads it with the optimizer's state, which a run can leave out.
    """
    settings = config.checkpoint
    if step:
        folder = Path(settings.load) / f"iter_{step:07d}"
    else:
        start = settings.pretrained_checkpoint or (settings.load if settings.finetune else None)
        folder = None if start is None else checkpoint_of(Path(start))
    if folder is None or not folder.is_dir():
        return {}
    state: Any = read_common_state(folder)
    for key in ("opt_param_scheduler", KEY):
        state = state.get(key) if isinstance(state, dict) else None
    return state if isinstance(state, dict) else {}


def with_callback(callbacks: Iterable[Callback], config: ConfigContainer) -> list[Callback]:
    """Return the callbacks of a training, with one of ours if it trains a Skywork-MoE and none is among them.

    It logs what `config.logger` says. Adapters leave the routers frozen, so that there is nothing to follow.
    """
    callbacks, model = list(callbacks), config.model
    trains_routers = (
        isinstance(model, SkyworkOptions) and getattr(model, "num_moe_experts", None) and config.peft is None
    )
    if trains_routers and not any(isinstance(callback, SkyworkMoECallback) for callback in callbacks):
        logger = config.logger if isinstance(config.logger, SkyworkLoggerConfig) else SkyworkLoggerConfig()
        callbacks.append(
            SkyworkMoECallback(
                similarity_interval=logger.similarity_interval,
                histogram=logger.expert_histogram,
                warm_start=logger.warm_start,
            )
        )
    return callbacks
