"""What is said about a recipe of Megatron-Bridge is split into its arguments and Bridge's options, or refused in one sentence."""

import pytest

from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.experiments import catalogue
from nemo_skymoe.experiments.command_line import split, spoken
from tests.cases import every

TINY = "skywork_moe_tiny_pretrain_config"


def test_arguments_are_read_by_their_types_and_the_rest_is_bridges() -> None:
    arguments, overrides = split(
        "skywork_moe_146b_pretrain_config",
        [
            "corpus=/a=b c",
            "tokens=1e12",
            "edp=8",
            "scale=null",
            "pipeline_recompute=[[1],[0]]",
            "model.moe_edp=false",
        ],
    )
    expected = {"corpus": "/a=b c", "tokens": 1e12, "edp": 8, "scale": None, "pipeline_recompute": [[1], [0]]}
    assert (arguments, overrides) == (expected, ["model.moe_edp=false"])
    assert split("skywork_moe_146b_pretrain_config", spoken(arguments))[0] == arguments


def test_a_recipe_has_the_ranks_of_its_name() -> None:
    for name, experiment in catalogue.FIXED.items():
        run = experiment().run
        kind = "rank_cpu_fp32" if run.precision == "32" else "gpu_a800_bf16"
        assert f"_{run.num_nodes * run.num_gpus_per_node}{kind}_config" in name
    assert "skywork_moe_146b_pretrain_1536gpu_a800_bf16_config" in catalogue.RECIPES


@every(
    refused=[
        ("skywork_moe_tiny_pretrain_confg", [], "did you mean skywork_moe_tiny_pretrain_config"),
        (TINY, ["corpus"], "'corpus' is no option, expected KEY=VALUE"),
        (TINY, ["corpse=x"], "option corpse is unknown: did you mean corpus"),
        (TINY, ["max_steps=three"], "max_steps is 'three', expected int"),
        (TINY, ["edp=2", "edp=4"], "edp is given twice"),
        (TINY, ["stages=x"], "stages is now called phases"),
        (TINY, ["trian.train_iters=3"], "option trian.train_iters is unknown"),
    ]
)  # fmt: skip
def test_what_makes_no_sense_is_named(refused: tuple[str, list[str], str]) -> None:
    recipe, words, message = refused
    with pytest.raises(ConfigurationError, match=message):
        split(recipe, words)
