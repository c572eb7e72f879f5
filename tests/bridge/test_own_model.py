"""The recipes that take their model from a checkpoint: the training begins with the loss of the dense model."""

import os
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM

from nemo_skymoe.bridge.__main__ import main
from nemo_skymoe.bridge.callback import Callback, CallbackContext
from nemo_skymoe.bridge.checks import check
from nemo_skymoe.bridge.forward import forward_step
from nemo_skymoe.bridge.recipes import RECIPES
from nemo_skymoe.bridge.training import pretrain
from nemo_skymoe.checkpoint.inspection import inspect
from nemo_skymoe.checkpoint.upcycling.options import Upcycling
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.ranks import run_ranks
from tests.bridge.models import converted
from tests.own_model import JOB, make_llama_and_corpus


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama that no recipe of the report can start from, converted and upcycled; and a corpus."""
    folder = tmp_path_factory.mktemp("own")
    llama = make_llama_and_corpus(folder)
    converted(llama, folder / "dense", "bridge")
    converted(llama, folder / "moe", "bridge", Upcycling(num_experts=4, moe_router_topk=2))
    return folder


def recipe(folder: Path, kind: str, **arguments: Any) -> Any:
    own = {"expert_capacity_factor": None} if kind == "moe" else {}
    given = {"dir": str(folder / "runs"), "corpus": str(folder / "corpus"), "resume_path": str(folder / kind)}
    return RECIPES[f"skywork_{kind}_pretrain_config"](**(given | JOB | {"max_steps": 2} | own | arguments))


class Keep(Callback):
    """Keeps the losses."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_step_end(self, context: CallbackContext) -> None:
        assert context.loss_dict is not None
        self.losses.append(float(context.loss_dict["lm loss"]))


def first_batch(folder: Path, kind: str) -> tuple[float, dict[str, torch.Tensor]]:
    """The first loss of a training, with the batch."""
    batches: list[Any] = []

    def kept(state: Any, iterator: Any, model: Any, *more: Any) -> Any:
        batches.append(next(iterator))
        return forward_step(state, iter(batches[-1:]), model, *more)

    made, keep = recipe(folder, kind), Keep()
    made.validation.eval_iters = 0
    pretrain(made, forward_step_func=kept, callbacks=[keep])
    return keep.losses[0], {name: batches[0][name].clone() for name in ("tokens", "labels", "loss_mask")}


def test_the_training_begins_with_the_loss_of_the_dense_model(folder: Path) -> None:
    model: Any = LlamaForCausalLM.from_pretrained(folder / "llama", dtype=torch.float32)
    for kind in ("dense", "moe"):
        ((loss, batch),) = run_ranks(first_batch, 1, folder, kind)
        with torch.no_grad():
            logits = model(batch["tokens"]).logits
        each = cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none")
        expected = (each * batch["loss_mask"].flatten()).sum() / batch["loss_mask"].sum()
        assert loss == pytest.approx(expected.item(), rel=1e-6)
    # The run that is there now is not continued as another model, nor under a layout that does not fit.
    for changed, message in (
        ({"rotary_base": 10_000.0}, None),
        ({}, "model.layernorm_epsilon is 1e-06, expected 0.01"),
        ({"pipeline_parallelism": 4}, "num_layers is 2, expected a multiple of the 4 chunks"),
    ):
        made = recipe(folder, "moe", **changed)
        if message is None:
            check(made)
            made.model.differs_from_checkpoint = None
            message = "model.rotary_base is 10000.0, expected 500000"
        elif not changed:
            made.model.layernorm_epsilon = 1e-6
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("WORLD_SIZE", "4" if "pipeline_parallelism" in changed else "1")
            with pytest.raises(ConfigurationError, match=message):
                check(made)
    assert not parallel_state.is_initialized()


def by_itself(folder: Path, words: list[str]) -> int:
    os.chdir(folder)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)
    return main(words)


def test_the_training_that_inspect_proposes_passes_its_checks(folder: Path) -> None:
    (folder / "runs").mkdir(exist_ok=True)
    (folder / "runs" / "corpus").symlink_to(folder / "corpus")
    for kind in ("dense", "moe"):
        words = shlex.split(inspect(folder / kind).next["check its training"])
        assert words[:3] == ["python", "-m", "nemo_skymoe.bridge"] and "--dry-run" in words
        assert run_ranks(by_itself, 1, folder, words[3:]) == [0]
