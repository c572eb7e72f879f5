"""`pretrain` and `finetune` run Bridge's own functions after checking the training and curing the platform's defects."""

from collections.abc import Callable, Sequence
from typing import Any

from megatron.bridge.training import finetune as bridge_finetune
from megatron.bridge.training import pretrain as bridge_pretrain
from megatron.bridge.training.callbacks import Callback
from megatron.bridge.training.config import ConfigContainer

from nemo_skymoe.bridge.callback import with_callback
from nemo_skymoe.bridge.checkpoint import manager_name
from nemo_skymoe.bridge.checks import check, check_saving, check_starting_point
from nemo_skymoe.bridge.forward import forward_step
from nemo_skymoe.patches import bridge_compiled_helpers, bridge_cpu, bridge_warnings, chained_optimizers


def pretrain(
    config: ConfigContainer,
    *,
    forward_step_func: Callable[..., Any] = forward_step,
    callbacks: Sequence[Callback] = (),
) -> None:
    """Pretrain with Bridge, as `megatron.bridge.training.pretrain` does.

    Without CUDA the function applies the CPU runtime first. It gives a Skywork-MoE model the callback that runs its
    adaptive auxiliary loss, unless one is among `callbacks`, and checkpoints that keep the coefficients.

    Args:
        config: The training.
        forward_step_func: As Bridge takes it. The default is Bridge's own for GPT models, which also tells the routers
            what is padding.
        callbacks: Further callbacks, or a `SkyworkMoECallback` with other arguments.

    Raises:
        ConfigurationError: The training cannot work. Nothing was started.
        CheckpointError: A checkpoint cannot be read, or would build what is not allowed.
    """
    _train(bridge_pretrain.pretrain, config, forward_step_func, callbacks)


def finetune(
    config: ConfigContainer,
    *,
    forward_step_func: Callable[..., Any] = forward_step,
    callbacks: Sequence[Callback] = (),
) -> None:
    """Finetune with Bridge, as `megatron.bridge.training.finetune` does, from a checkpoint that must exist.

    The arguments and errors are those of `pretrain`.
    """
    check_starting_point(config)
    _train(bridge_finetune.finetune, config, forward_step_func, callbacks)


def _train(
    train: Callable[..., None],
    config: ConfigContainer,
    forward_step_func: Callable[..., Any],
    callbacks: Sequence[Callback],
) -> None:
    check_saving(config)
    bridge_cpu.apply()
    bridge_compiled_helpers.apply()
    bridge_warnings.apply()
    chained_optimizers.apply()
    check(config)
    config.checkpoint.custom_manager_class = manager_name()
    given: Any = with_callback(callbacks, config)
    train(config, forward_step_func, callbacks=given)
