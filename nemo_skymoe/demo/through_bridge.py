"""The story's front door of Megatron-Bridge."""

from pathlib import Path
from typing import Any

import torch
import yaml

from nemo_skymoe.bridge import evaluate
from nemo_skymoe.bridge.callback import Callback, CallbackContext, SkyworkMoECallback
from nemo_skymoe.bridge.provider import provider_of
from nemo_skymoe.bridge.recipes import RECIPES
from nemo_skymoe.bridge.training import pretrain
from nemo_skymoe.checkpoint.torch_dist.run_config import RUN_CONFIG
from nemo_skymoe.demo.door import Training
from nemo_skymoe.demo.progress import Bar
from nemo_skymoe.experiments.demonstration import MOE, SEQUENCE, SKYWORK_MOE_TINY, SKYWORK_TINY
from nemo_skymoe.moe.mesh import edp_mesh_rows

FORMAT: str = "bridge"
start_single_rank = evaluate.start_single_rank


def dense(training: Training) -> Any:
    """Return the recipe of `skywork_tiny`."""
    return RECIPES["skywork_tiny_pretrain_1rank_cpu_fp32_config"](**training.arguments())


def moe(training: Training) -> Any:
    """Return the recipe of `skywork_moe_tiny`."""
    made: Any = RECIPES["skywork_moe_tiny_pretrain_2rank_cpu_fp32_config"](**training.arguments())
    if training.smoothing is not None:
        made.model.moe_adaptive_aux_loss_smoothing = training.smoothing
    return made


def train(recipe: Any, bar: Bar) -> list[dict[str, int]]:
    """Run a recipe on this rank, show its progress, and return the mesh that it trained on."""
    progress = _Progress(bar, recipe.train.train_iters)
    pretrain(recipe, callbacks=[progress, SkyworkMoECallback(similarity_interval=MOE.similarity_interval)])
    return progress.mesh


class _Progress(Callback):
    def __init__(self, bar: Bar, steps: int) -> None:
        self.bar, self.steps = bar, steps
        self.mesh: list[dict[str, int]] = []

    def on_train_start(self, context: CallbackContext) -> None:
        self.mesh = edp_mesh_rows()
        if torch.distributed.get_rank() == 0:
            self.bar.start(self.steps)

    def on_train_step_end(self, context: CallbackContext) -> None:
        value = (context.loss_dict or {}).get("lm loss")
        # Bridge counts the step only afterwards.
        self.bar.move(context.state.train_state.step + 1, None if value is None else float(value))

    def on_train_end(self, context: CallbackContext) -> None:
        self.bar.stop()


def load(
    checkpoint: Path, vocab_size: int, *, experts: bool, capacity_factor: float | None = None
) -> torch.nn.Module:
    """Return the dense model or the MoE with the weights of a checkpoint."""
    options: dict[str, Any] = {
        "seq_length": SEQUENCE,
        "vocab_size": vocab_size,
        "params_dtype": torch.float32,
    }
    if experts:
        options["moe_expert_capacity_factor"] = capacity_factor
    architecture = SKYWORK_MOE_TINY if experts else SKYWORK_TINY
    return evaluate.load_model(provider_of(architecture, **options), checkpoint)


def configuration(checkpoint: Path) -> str:
    """Return what a checkpoint says about its model."""
    return yaml.safe_dump(yaml.safe_load((checkpoint / RUN_CONFIG).read_text())["model"])
