"""The provider: the model that its sizes mean, what is trained of it, and what comes back from a saved configuration."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from megatron.bridge.training.model_load_save import temporary_distributed_context
from megatron.bridge.training.utils.checkpoint_utils import read_run_config
from megatron.bridge.utils.instantiate_utils import InstantiationException, instantiate
from megatron.core.models.common.embeddings import YarnRotaryEmbedding
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor

from nemo_skymoe.architecture import Architecture
from nemo_skymoe.bridge.checkpoint import manager_name
from nemo_skymoe.bridge.learning_rate import ExpertLearningRate
from nemo_skymoe.bridge.provider import SkyworkProvider
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.patches import bridge_cpu
from nemo_skymoe.ranks import run_ranks
from tests.bridge.recorded import Record, Recorder, start_alike, train
from tests.bridge.tiny import DENSE, MOE, tiny_config, tiny_provider
from tests.cases import every
from tests.moe.worlds import weight

MODELS: dict[str, Architecture] = {
    "dense": DENSE,
    "moe": MOE,
    "some layers dense": replace(MOE, num_layers=3, moe_layer_freq=(0, 1, 1), moe_ffn_hidden_size=16),
    "grouped queries": replace(MOE, num_query_groups=2, kv_channels=16),
    "tied": replace(DENSE, tied_embeddings=True),
    "biases and norms of heads": replace(DENSE, add_qkv_bias=True, qk_layernorm=True),
}


def start(context: Any) -> None:
    """Weights by name, in the model and in the optimizer, which has copies of its own."""
    start_alike(context)
    context.optimizer.reload_model_params()


def trained(architecture: Architecture, **options: Any) -> Record:
    return train(tiny_config(steps=1, model=tiny_provider(architecture, **options)), Recorder(start=start))


@every(name=list(MODELS))
def test_the_model_has_the_weights_of_its_architecture(name: str):
    [record] = run_ranks(trained, 1, MODELS[name])
    assert sum(found.size for found in record.weights.values()) == MODELS[name].parameters


def test_only_the_mlps_are_trained_if_that_is_asked_for():
    [record] = run_ranks(lambda: trained(DENSE, train_only_ffn=True), 1)
    start_of = {name: weight(name, found.shape).float().numpy() for name, found in record.weights.items()}
    moved = {name for name, found in record.weights.items() if (found != start_of[name]).any()}
    layers = range(1, DENSE.num_layers + 1)
    assert moved == {f"decoder.layers.{n}.mlp.linear_{fc}.weight" for n in layers for fc in ("fc1", "fc2")}


def frequencies(options: dict[str, Any]) -> torch.Tensor:
    bridge_cpu.apply()
    with temporary_distributed_context(backend="gloo"):
        provider = tiny_provider(DENSE, **options)
        provider.finalize()
        return provider.provide(pre_process=True, post_process=True).rotary_pos_emb.inv_freq


def megatrons_yarn(options: dict[str, Any]) -> Tensor:
    bridge_cpu.apply()
    heads = {name.removeprefix("yarn_").removeprefix("rotary_"): value for name, value in options.items()}
    embedding = YarnRotaryEmbedding(DENSE.head_size, rotary_base=10_000, use_cpu_initialization=True, **heads)
    return embedding.get_emb(2)[0][1, 0, 0, : DENSE.head_size // 2]


def test_the_rotary_embedding_is_scaled_with_every_number():
    """Bridge passes the factor on. The reference is Megatron's own scaling."""
    options = {"rope_scaling": True, "rope_scaling_factor": 4.0, "rope_scaling_low_freq_factor": 0.5}
    options |= {"rope_scaling_high_freq_factor": 2.0, "rope_scaling_original_max_position_embeddings": 16}
    [plain] = run_ranks(frequencies, 1, {})
    [scaled] = run_ranks(frequencies, 1, options)
    expected = RotaryEmbedding._apply_scaling(cast(Any, None), plain, 4.0, 0.5, 2.0, 16)
    assert torch.equal(scaled, expected) and not torch.equal(scaled, plain)


def test_yarn_is_scaled_by_the_options_and_not_by_another_embedding():
    """The reference is Megatron's own YaRN, of which position 1 turns by the frequencies."""
    options = {"yarn_rotary_scaling_factor": 4.0, "yarn_original_max_position_embeddings": 64}
    options |= {"yarn_beta_fast": 8.0, "yarn_beta_slow": 0.5}
    [plain] = run_ranks(frequencies, 1, {})
    [scaled] = run_ranks(frequencies, 1, options)
    [expected] = run_ranks(megatrons_yarn, 1, options)
    assert torch.equal(scaled, expected) and not torch.equal(scaled, plain)
    with pytest.raises(ConfigurationError, match="position_embedding_type is 'yarn', expected 'rope'"):
        tiny_provider(DENSE, position_embedding_type="yarn", **options).finalize()


def saved(folder: Path) -> None:
    config = tiny_config(
        folder,
        steps=1,
        model=tiny_provider(
            replace(MOE, num_layers=3), pipeline_model_parallel_layout="EtttL", pipeline_recompute=[[2]]
        ),
    )
    config.optimizer_config_override_provider = ExpertLearningRate(2.0)
    train(config)


def test_a_saved_configuration_is_the_one_that_trained(tmp_path: Path):
    run_ranks(saved, 1, tmp_path)
    file = tmp_path / "iter_0000001" / "run_config.yaml"
    saved_as: Any = read_run_config(str(file))
    model = instantiate(saved_as["model"])
    assert type(model) is SkyworkProvider
    assert instantiate(saved_as["optimizer_config_override_provider"]) == ExpertLearningRate(2.0)
    assert saved_as["checkpoint"]["custom_manager_class"] == manager_name()
    model.finalize()
    assert str(model.pipeline_model_parallel_layout) == "EtttL" and model.pipeline_recompute == [[2]]
    assert (model.moe_adaptive_aux_loss_initial, model.moe_edp, model.num_moe_experts) == (0.01, True, 4)


@every(
    name=[
        "provider.provider_of",
        "provider.GPTModelProvider",
        "training.pretrain",
        "checkpoint.dataclasses.replace",
    ]
)
def test_a_saved_configuration_can_name_nothing_else_of_this_package(name: str):
    with pytest.raises(InstantiationException, match="not in the allowlist"):
        instantiate({"_target_": f"nemo_skymoe.bridge.{name}"})
