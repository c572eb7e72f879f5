"""A recipe takes its model from a checkpoint: what it reads there, and what it refuses in one sentence."""

from pathlib import Path
from typing import Any

import pytest

from nemo_skymoe.checkpoint import convert
from nemo_skymoe.checkpoint.convert import TargetOptions
from nemo_skymoe.checkpoint.sources import open_source
from nemo_skymoe.checkpoint.upcycling.options import BASE, Upcycling
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.experiments import catalogue
from nemo_skymoe.launch.bridge_checks import check_checkpoints, check_ranks
from tests.checkpoint import hf_models

LLAMA: dict[str, Any] = {
    "rope_theta": 5e5, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "num_key_value_heads": 2, "head_dim": 24,
    "num_hidden_layers": 4,
}  # fmt: skip


def upcycled(folder: Path, to: str) -> Path:
    """A Llama that differs from the report's models in everything that shapes do not tell, upcycled to 8 experts."""
    hf_models.llama(folder / "llama", **LLAMA)
    options = Upcycling(num_experts=8, moe_router_topk=2)
    convert.plan({BASE: open_source(folder / "llama")}, TargetOptions(to), options).run(folder / to)
    return folder / to


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return upcycled(tmp_path_factory.mktemp("own"), "bridge").parent


def chosen(folder: Path, task: str = "pretrain", model: str = "skywork_moe", **arguments: Any) -> Any:
    arguments = {"resume_path": str(folder / "bridge"), "num_gpus_per_node": 2, **arguments}
    return catalogue.RECIPES[f"{model}_{task}_config"](**arguments)


def test_everything_about_the_model_comes_from_the_folder(folder: Path) -> None:
    for task in ("pretrain", "sft", "peft"):
        run = chosen(folder, task).run
        sizes = run.architecture
        assert (sizes.num_layers, sizes.query_groups, sizes.head_size, sizes.num_moe_experts) == (4, 2, 24, 8)
        assert sizes.tied_embeddings and sizes.vocab_size == hf_models.VOCAB_SIZE
        expected = {
            "rotary_base": 500_000, "layernorm_epsilon": 1e-5, "share_embeddings_and_output_weights": True,
            "moe_router_logit_norm_scale": 1.0, "num_query_groups": 2, "kv_channels": 24, "vocab_size": 512,
        }  # fmt: skip
        assert expected.items() <= run.model_options.items()
        assert run.seq_length == hf_models.SIZES["max_position_embeddings"]
    run = chosen(folder, seq_length=64, max_steps=7, global_batch_size=4, edp=2, warmup_steps=1).run
    assert (run.seq_length, run.max_steps, run.edp) == (64, 7, 2)
    assert (run.save_interval, run.val_check_interval) == (7, 7)
    longer = chosen(folder, rotary_base=1e6).run.model_options
    assert (longer["rotary_base"], longer["differs_from_checkpoint"]) == (1e6, ["rotary_base"])


def test_the_planner_lays_out_the_stages(folder: Path) -> None:
    run = chosen(folder, plan="auto", pipeline_parallelism=2, global_batch_size=8).run
    assert run.pipeline_layout.startswith("E") and run.pipeline_layout.endswith("L")
    assert run.pipeline_layout.count("|") == 1 and len(run.pipeline_recompute) == 2


def test_what_does_not_fit_is_refused_in_one_sentence(folder: Path, tmp_path: Path) -> None:
    for arguments, message in (
        ({"resume_path": None}, "resume_path is missing, expected the folder"),
        (
            {"resume_path": str(tmp_path / "far")},
            "far' is not a folder on this machine, expected to see it here",
        ),
        ({"resume_path": str(tmp_path)}, "is no checkpoint, it is empty"),
        ({"resume_path": str(folder / "llama")}, "has the form hf, expected that of Megatron-Bridge"),
        ({"model": "skywork_dense"}, r"is an MoE, expected a dense model: its recipe is skywork_moe"),
        ({"scale": "toy"}, "scale is 'toy', expected none"),
        ({"precision": "16"}, "precision is '16', expected bf16-mixed or 32"),
        ({"plan": "best"}, "plan is 'best', expected auto"),
        ({"plan": "auto"}, "plan is auto and pipeline_parallelism 1, expected 2 or more"),
        ({"plan": "auto", "pipeline_parallelism": 2, "hardware": "B1"}, "hardware is 'B1', expected one of"),
        ({"max_steps": 50}, "warmup_steps is 100, expected fewer than the 50 steps"),
        ({"max_steps": 0}, "max_steps is 0, expected at least 1"),
        ({"edp": 0}, "edp is 0, expected a divisor"),
        ({"edp": 3}, "edp is 3, expected a divisor of the 512 rows"),
    ):
        with pytest.raises(ConfigurationError, match=message) as refused:
            chosen(folder, **arguments)
        assert "\n" not in str(refused.value)


def test_a_submission_compares_the_model_and_its_layout(folder: Path) -> None:
    start = chosen(folder, edp=2)
    check_ranks(start, {})
    check_checkpoints(start, str(folder / "none"), {})
    check_checkpoints(
        start,
        str(folder / "none"),
        {"layernorm_epsilon": 1e-6, "differs_from_checkpoint": ["layernorm_epsilon"]},
    )
    with pytest.raises(ConfigurationError, match=r"model\.layernorm_epsilon is 1e-06, expected 1e-05"):
        check_checkpoints(start, str(folder / "none"), {"layernorm_epsilon": 1e-6})
    with pytest.raises(ConfigurationError, match="num_layers is 4, expected a multiple of the 8 chunks"):
        check_ranks(chosen(folder, pipeline_parallelism=8, num_gpus_per_node=8), {})
    four = chosen(folder, edp=4, num_gpus_per_node=4)
    check_ranks(four, {})  # two ranks have one of the two key-value heads
    with pytest.raises(
        ConfigurationError, match="num_query_groups is 3, expected a multiple or a divisor of tensor_model"
    ):
        check_ranks(four, {"num_query_groups": 3})
    tiny = catalogue.RECIPES["skywork_moe_tiny_pretrain_2rank_cpu_fp32_config"](
        resume_path=str(folder / "bridge")
    )
    with pytest.raises(ConfigurationError, match=r"model\.hidden_size is 160, expected 64") as refused:
        check_checkpoints(tiny, str(folder / "none"), {})
    for option in ("rotary_base", "layernorm_epsilon", "num_moe_experts", "kv_channels"):
        assert f"model.{option} is" in str(refused.value)
