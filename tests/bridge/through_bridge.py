"""The training of `tests.doors.case` through Megatron-Bridge: python -m tests.bridge.through_bridge TRACES.json"""

import sys
from pathlib import Path
from typing import Any

from nemo_skymoe.bridge.callback import Callback, CallbackContext
from nemo_skymoe.bridge.checkpoint import coefficients_of
from nemo_skymoe.bridge.recipes import RECIPES
from nemo_skymoe.bridge.training import pretrain
from tests.doors import case
from tests.doors.case import Trace


class Keep(Callback):
    """Keeps what Bridge tells its callbacks of every step."""

    def __init__(self) -> None:
        self.trace = Trace()

    def on_train_step_end(self, context: CallbackContext) -> None:
        controller = coefficients_of(context.state).controller
        assert controller is not None and context.loss_dict is not None and context.grad_norm is not None
        loss = float(context.loss_dict["lm loss"])
        self.trace.step(loss, float(context.grad_norm), controller.coefficient_by_layer())


def recipe(**arguments: Any) -> Any:
    """The demonstration's recipe with the options of the case."""
    made = RECIPES["skywork_moe_tiny_pretrain_2rank_cpu_fp32_config"](**arguments)
    for name, value in case.OPTIONS.items():
        setattr(made.model, name, value)
    return made


def train(made: Any) -> Trace:
    """On one rank."""
    keep = Keep()
    pretrain(made, callbacks=[keep])
    return keep.trace


def traces() -> dict[str, Trace]:
    """By layout."""
    return case.traces_through("bridge", recipe, train)


if __name__ == "__main__":
    case.write(traces(), Path(sys.argv[1]))
