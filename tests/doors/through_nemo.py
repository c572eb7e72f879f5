"""The training of `case` through NeMo: python -m tests.doors.through_nemo TRACES.json"""

import sys
from pathlib import Path
from typing import Any

import fiddle as fdl
import lightning.pytorch as pl

from nemo_skymoe.nemo.callbacks import SkyworkMoECallback
from nemo_skymoe.patches import nemo_cpu
from nemo_skymoe.recipes import skywork_moe_tiny
from tests.doors import case
from tests.doors.case import Trace


class Keep(pl.Callback):
    """Keeps what NeMo logs of every step."""

    def __init__(self) -> None:
        self.trace = Trace()

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        [callback] = [found for found in trainer.callbacks if isinstance(found, SkyworkMoECallback)]
        assert callback._controller is not None
        logged, coefficients = trainer.callback_metrics, callback._controller.coefficient_by_layer()
        self.trace.step(logged["reduced_train_loss"].item(), float(logged["grad_norm"]), coefficients)


def recipe(**arguments: Any) -> Any:
    """The demonstration's recipe with the options of the case."""
    made = skywork_moe_tiny.pretrain_recipe(**arguments)
    for name, value in case.OPTIONS.items():
        setattr(made.model.config, name, value)
    made.trainer.log_every_n_steps = 1
    return made


def train(made: Any) -> Trace:
    """On one rank."""
    nemo_cpu.apply()
    keep = Keep()
    partial = fdl.build(made)
    partial.keywords["trainer"].callbacks.append(keep)
    partial()
    return keep.trace


def traces() -> dict[str, Trace]:
    """By layout."""
    return case.traces_through("nemo", recipe, train)


if __name__ == "__main__":
    case.write(traces(), Path(sys.argv[1]))
