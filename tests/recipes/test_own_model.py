"""The recipes that take their model from a checkpoint: the training begins with the loss of the dense model."""

import shlex
import sys
from pathlib import Path
from typing import Any

import fiddle as fdl
import pytest
import torch
from nemo_run.cli import api
from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM

from nemo_skymoe import nemo_cli  # noqa: F401
from nemo_skymoe.checkpoint import convert
from nemo_skymoe.checkpoint.convert import TargetOptions
from nemo_skymoe.checkpoint.inspection import inspect
from nemo_skymoe.checkpoint.sources import open_source
from nemo_skymoe.checkpoint.upcycling.options import BASE, Upcycling
from nemo_skymoe.nemo.model import SkyworkModel
from nemo_skymoe.nemo.recipe_check import check_made, check_start
from nemo_skymoe.patches import nemo_cpu
from nemo_skymoe.ranks import run_ranks
from nemo_skymoe.recipes import skywork_dense, skywork_moe
from tests.own_model import JOB, make_llama_and_corpus


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama that no recipe of the report can start from, converted and upcycled; and a corpus."""
    folder = tmp_path_factory.mktemp("own")
    source, local = (
        {BASE: open_source(make_llama_and_corpus(folder))},
        TargetOptions("nemo", layer_spec="local"),
    )
    convert.plan(source, local, None).run(folder / "dense")
    convert.plan(source, local, Upcycling(num_experts=4, moe_router_topk=2)).run(folder / "moe")
    return folder


def recipe(folder: Path, kind: str, **arguments: Any) -> Any:
    module, own = (skywork_moe, {"expert_capacity_factor": None}) if kind == "moe" else (skywork_dense, {})
    given = {"dir": str(folder / "runs"), "corpus": str(folder / "corpus"), "resume_path": str(folder / kind)}
    return module.pretrain_recipe(**(given | JOB | own | arguments))


def first_batch(folder: Path, kind: str) -> tuple[float, dict[str, torch.Tensor]]:
    """The first loss of a training, with the batch."""
    nemo_cpu.apply()
    batches: list[Any] = []
    step = SkyworkModel.forward_step

    def kept(self: Any, batch: Any) -> Any:
        batches.append({name: batch[name].clone() for name in ("tokens", "labels", "loss_mask")})
        return step(self, batch)

    SkyworkModel.forward_step = kept  # type: ignore[method-assign]
    made = recipe(folder, kind)
    made.trainer.limit_val_batches, made.trainer.log_every_n_steps = 0, 1
    partial: Any = fdl.build(made)
    partial()
    return partial.keywords["trainer"].callback_metrics["reduced_train_loss"].item(), batches[0]


def test_the_training_begins_with_the_loss_of_the_dense_model(folder: Path) -> None:
    """The same text: with the usual base and epsilon the loss would be another."""
    model: Any = LlamaForCausalLM.from_pretrained(folder / "llama", torch_dtype=torch.float32)
    for kind in ("dense", "moe"):
        ((loss, batch),) = run_ranks(first_batch, 1, folder, kind)
        with torch.no_grad():
            logits = model(batch["tokens"]).logits
        each = cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none")
        expected = (each * batch["loss_mask"].flatten()).sum() / batch["loss_mask"].sum()
        assert loss == pytest.approx(expected.item(), rel=1e-6), kind


def test_the_recipes_serialise_and_pass_their_own_checks(folder: Path) -> None:
    for made in (
        recipe(folder, "moe"),
        recipe(folder, "dense"),
        recipe(folder, "dense", edp=2, num_gpus_per_node=2),
        skywork_moe.finetune_recipe(resume_path=str(folder / "moe"), num_gpus_per_node=1, precision="32"),
        skywork_dense.finetune_recipe(resume_path=str(folder / "dense"), num_gpus_per_node=1, peft_scheme="none"),
        recipe(folder, "moe", plan="auto", pipeline_parallelism=2, num_gpus_per_node=2),
        recipe(folder, "moe", rotary_base=1e6),
    ):  # fmt: skip
        assert ZlibJSONSerializer().deserialize(ZlibJSONSerializer().serialize(made)) == made
        plan = fdl.build(made.pipeline) if getattr(made, "pipeline", None) is not None else None
        check_made(made, plan)
        check_start(made, local=True, written_before=False)


def dry_run(words: list[str]) -> int:
    sys.argv = words
    try:
        api.create_cli()(standalone_mode=True)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_the_training_that_inspect_proposes_passes_its_checks(folder: Path) -> None:
    for kind in ("dense", "moe"):
        command = inspect(folder / kind).next["check its training"]
        words = shlex.split(command)
        assert words[:4] == ["nemo", "llm", "pretrain", "--factory"] and words[-1] == "--dryrun"
        assert run_ranks(dry_run, 1, words, env={"NEMORUN_HOME": str(folder)}) == [0]
