"""One run has one plan: by `skymoe plan`, by `launch jobs=[plan]`, by the recipe's own layout, and in print."""

import importlib.util
import json
import re
import shlex
from pathlib import Path
from typing import Any

import fiddle as fdl
import pytest
from typer.testing import CliRunner

from nemo_skymoe.cli import app
from nemo_skymoe.commands.launch import jobs
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.launch.composition import compose_groups
from nemo_skymoe.pipeline.planning import plan
from nemo_skymoe.recipes import skywork_moe_146b

ROOT = Path(__file__).resolve().parents[2]
REPORT: dict[str, Any] = {
    "num_gpus": 1536, "tensor_parallel": 4, "expert_parallel": 4, "pipeline_parallel": 12, "seq_length": 8192,
    "global_batch_size": 2048, "capacity_factor": 1.25,
}  # fmt: skip
"""The report's run in numbers (appendix B.3), with what the recipe assumes of it; nothing else is said of it."""


def figures(made: dict[str, Any]) -> dict[str, Any]:
    """All that a reader may compare."""
    return {name: value for name, value in made.items() if name != "model"}


def by_launch(tmp_path: Path, *overrides: str) -> dict[str, Any]:
    """What the plan's job writes, run as it runs it."""
    given = ["cluster=a800_slurm", "training.dir=/data/runs", "jobs=[plan]", "plan.output_path=/data/p"]
    (job,) = jobs(compose_groups([*given, *overrides]))
    file = tmp_path / "plan.json"
    job.task.output_path = str(file)
    fdl.build(job.task)()
    return json.loads(file.read_text())


def test_every_place_gives_the_same_number(tmp_path: Path) -> None:
    documented = re.search(
        r"skymoe plan (--model skywork-moe-146b .*?)\n```", (ROOT / "docs/plan.md").read_text(), re.DOTALL
    )
    assert documented
    answer = CliRunner().invoke(app, ["plan", *shlex.split(documented[1].replace("\\\n", " ")), "--json"])
    assert answer.exit_code == 0, answer.stderr
    found = json.loads(answer.stdout)
    assert figures(found) == figures(by_launch(tmp_path, "training=skywork_moe_146b"))
    recipe = skywork_moe_146b.pretrain_recipe(dir="/data/runs")
    assert (recipe.pipeline.layout, recipe.pipeline.recompute) == (found["layout"], found["recompute"])
    own = plan("skywork-moe-146b", "A800-80G", layers=[sum(s["layers"]) for s in found["stages"]], **REPORT)
    assert figures(json.loads(json.dumps(own.to_dict()))) == figures(found)

    speed = f"{found['tokens_per_gpu_per_second']:.0f}"
    for page, words in {
        "README.md": r"the report's 146B run, by the cost model, .* \| (\d+) \(",
        "benchmarks/README.md": r"tokens per GPU and second on 1536 A800 \(predicted\) \| 690 \| (\d+);",
        "benchmarks/cost_model.md": r"experts in balance: (\d+) tokens/GPU/s",
        "benchmarks/pipeline.md": r"\| 1 \| \*\*planned\*\* .*\| (\d+) \| \+0.0% \|",
        "docs/plan.md": r"(\d+) tokens/GPU/s",
    }.items():
        assert re.findall(words, (ROOT / page).read_text()) == [speed], page
    script = importlib.util.spec_from_file_location("cost_model", ROOT / "benchmarks/cost_model.py")
    assert script and script.loader
    script.loader.exec_module(benchmark := importlib.util.module_from_spec(script))
    assert figures(json.loads(json.dumps(benchmark._report_plan().to_dict()))) == figures(found)


FIRST_DENSE = (0, *[1] * 51)
CHANGES: dict[str, tuple[str, dict[str, Any]]] = {
    "micro-batch": ("training.micro_batch_size=2", {"micro_batch_size": 2}),
    "batch": ("training.global_batch_size=4096", {"global_batch_size": 4096}),
    "sequence": ("training.seq_length=4096", {"seq_length": 4096}),
    "GPUs": ("training.num_nodes=96", {"num_gpus": 768}),
    "stages": ("training.pipeline_parallelism=6", {"pipeline_parallel": 6}),
    "overlap": ("training.communication_overlap=false", {"overlap_grad_reduce": False}),
    "bytes of a gradient": ("training.grad_reduce_in_fp32=false", {"gradient_bytes": 2}),
    "ZeRO-1": ("training.trainer.strategy.ddp.use_distributed_optimizer=false", {"distributed_optimizer": False}),
    "capacity": ("training.expert_capacity_factor=0.5", {"capacity_factor": 0.5}),
    "dropless": ("model=dropless", {"capacity_factor": None}),
    "padding": ("model.moe_pad_expert_input_to_capacity=true", {"pad_to_capacity": True}),
    "virtual stages": ("training.trainer.strategy.virtual_pipeline_model_parallel_size=2 training.global_batch_size=3072", {"virtual_pipeline": 2, "global_batch_size": 3072}),
    "vocabulary": ("model.vocab_size=100000", {"vocab_size": 100000}),
    "experts' width": ("model.moe_ffn_hidden_size=6144", {"ffn_hidden_size": 6144}),
    "tied": ("model.share_embeddings_and_output_weights=true", {"tied_embeddings": True}),
    "experts": ("model.num_moe_experts=8", {"num_moe_experts": 8}),
    "top-k": ("model.moe_router_topk=4", {"moe_router_topk": 4}),
    "key-value heads": ("model.num_query_groups=4", {"num_query_groups": 4}),
    "dense layers between": ("model.moe_layer_freq=2", {"moe_layer_freq": 2}),
    "a dense layer before": (f"model.moe_layer_freq=[{','.join(map(str, FIRST_DENSE))}]", {"moe_layer_freq": FIRST_DENSE}),
    "hardware": ("plan.hardware=H100", {}),
}  # fmt: skip


def test_whatever_a_training_changes_its_plan_takes_up(tmp_path: Path) -> None:
    model = {
        "num_layers": 52, "hidden_size": 4608, "ffn_hidden_size": 12288, "num_attention_heads": 36, "num_query_groups": 36,
        "vocab_size": 65536, "num_moe_experts": 16, "moe_router_topk": 2,
    }  # fmt: skip
    plain = plan(model, "A800-80G", **REPORT).tokens_per_gpu_per_second
    for what, (override, change) in CHANGES.items():
        found = by_launch(tmp_path, "training=skywork_moe_146b", *override.split())
        sizes = {
            name: value
            for name, value in change.items()
            if name in (*model, "tied_embeddings", "moe_layer_freq")
        }
        how = {name: value for name, value in change.items() if name not in sizes}
        hardware = "H100" if what == "hardware" else "A800-80G"
        expected = plan(model | sizes, hardware, **REPORT | how)
        assert figures(found) == figures(json.loads(json.dumps(expected.to_dict()))), what
        if what not in ("tied", "dropless", "ZeRO-1", "bytes of a gradient"):
            assert found["tokens_per_gpu_per_second"] != pytest.approx(plain, rel=1e-6), what
    dense = by_launch(tmp_path, "training=skywork_13b")
    expected = plan(
        "skywork-13b", "A800-80G", num_gpus=512, pipeline_parallel=2, seq_length=4096,
        global_batch_size=dense["training"]["global_batch_size"],
    )  # fmt: skip
    assert figures(dense) == figures(json.loads(json.dumps(expected.to_dict())))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.moe_router_topk=1", "^moe_router_topk=1 .*moe_router_pre_softmax=True$"),
        ("model.moe_shared_expert_intermediate_size=64", "moe_shared_expert_intermediate_size is 64, expected 0 for a plan"),
    ],
)  # fmt: skip
def test_what_the_cost_model_does_not_count_is_refused(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=message):
        by_launch(tmp_path, "training=skywork_moe_146b", override)
