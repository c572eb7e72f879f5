"""Models of other families are trained on as they are: losses and updates are transformers', tensor by tensor."""

from pathlib import Path
from typing import Any

import fiddle as fdl
import lightning.pytorch as pl
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from nemo_skymoe.checkpoint import convert
from nemo_skymoe.checkpoint.convert import TargetOptions
from nemo_skymoe.checkpoint.sources import open_source
from nemo_skymoe.checkpoint.upcycling.options import BASE
from nemo_skymoe.data.corpus import build_corpus
from nemo_skymoe.nemo.model import SkyworkModel
from nemo_skymoe.patches import nemo_cpu
from nemo_skymoe.ranks import run_ranks
from nemo_skymoe.recipes import skywork_dense, skywork_moe
from tests.cases import every
from tests.checkpoint.families import MOES, saved
from tests.own_model import JOB, VOCABULARY

STEPS = 2
RATE, EPSILON = 4.0, 1.0
"""With an epsilon far above every gradient Adam's update is proportional to it, so that its relative error is the gradient's."""
Batch = dict[str, Tensor]


class Losses(pl.Callback):
    """Keeps the loss of every step."""

    def __init__(self) -> None:
        self.kept: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.kept.append(trainer.callback_metrics["reduced_train_loss"].item())


def recipe(folder: Path, moe: bool) -> Any:
    """Two steps at one rate, without decay, clipping and auxiliary losses."""
    module: Any = skywork_moe if moe else skywork_dense
    given = {
        "dir": str(folder / "runs"),
        "corpus": str(folder / "corpus"),
        "resume_path": str(folder / "nemo"),
    }
    own = {"max_steps": STEPS, "max_lr": RATE, "min_lr": RATE} | (
        {"expert_capacity_factor": None} if moe else {}
    )
    made = module.pretrain_recipe(**(given | JOB | own))
    made.optim.config.weight_decay, made.optim.config.clip_grad = 0.0, 0.0
    made.optim.config.adam_eps = EPSILON
    made.trainer.limit_val_batches, made.trainer.log_every_n_steps = 0, 1
    if moe:
        made.model.config.moe_adaptive_aux_loss, made.model.config.moe_aux_loss_coeff = False, 0.0
        made.model.config.moe_z_loss_coeff = None
    return made


def trained(folder: Path, moe: bool) -> tuple[list[float], list[Batch]]:
    """The losses and the batches of a training."""
    nemo_cpu.apply()
    batches: list[Batch] = []
    step = SkyworkModel.forward_step

    def kept(self: Any, batch: Any) -> Any:
        batches.append({name: batch[name].clone() for name in ("tokens", "labels", "loss_mask")})
        return step(self, batch)

    SkyworkModel.forward_step = kept  # type: ignore[method-assign]
    partial: Any = fdl.build(recipe(folder, moe))
    partial.keywords["trainer"].callbacks.append(losses := Losses())
    partial()
    return losses.kept, batches


def trained_by_transformers(model: Any, batches: list[Batch]) -> list[float]:
    """The losses of the same steps; `model` is what they leave."""
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE, betas=(0.9, 0.95), eps=EPSILON)
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        logits = model(batch["tokens"]).logits
        each = cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none")
        loss = (each * batch["loss_mask"].flatten()).sum() / batch["loss_mask"].sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def exported(folder: Path, name: str) -> dict[str, Tensor]:
    """The tensors of the trained model in Hugging Face's form."""
    layout = None if name not in MOES else "mixtral" if name == "mixtral" else "qwen3_moe"
    (run,) = (folder / "runs").glob("skywork_*")
    source = {BASE: open_source(run)}
    convert.plan(source, TargetOptions("hf", layout=layout)).run(folder / "hf")
    return {k: v for file in (folder / "hf").glob("*.safetensors") for k, v in load_file(file).items()}


@every(name=["llama31", "qwen25", "qwen3", *MOES])
def test_two_steps_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    model = saved(name, tmp_path / "source", vocab_size=VOCABULARY)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    convert.plan({BASE: open_source(tmp_path / "source")}, TargetOptions("nemo")).run(tmp_path / "nemo")
    build_corpus(tmp_path / "corpus", VOCABULARY, 0.3, files=["argparse.py", "typing.py", "ast.py"])
    ((losses, batches),) = run_ranks(trained, 1, tmp_path, name in MOES)
    expected = trained_by_transformers(model.train(), batches)
    assert len(losses) == STEPS and losses == pytest.approx(expected, rel=1e-6)
    after = exported(tmp_path, name)
    for key, tensor in model.state_dict().items():
        if key not in after and "lm_head" in key:
            continue  # it is tied to the embedding
        moved, wanted = after[key] - before[key], tensor - before[key]
        rounding = torch.finfo(torch.float32).eps * tensor.norm()  # of the weights, twice half of it
        assert (moved - wanted).norm() <= 1e-5 * wanted.norm() + rounding, key
