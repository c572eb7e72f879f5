"""Bridge trains from what `skymoe` writes, and `skymoe` reads what a training of Bridge saves."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.bridge import AutoBridge
from megatron.bridge.models.gpt_provider import local_layer_spec
from megatron.bridge.training import gpt_step
from megatron.bridge.training.config import ConfigContainer
from torch import Tensor
from transformers import AutoModelForCausalLM

from nemo_skymoe.bridge.from_checkpoint import provider_from
from nemo_skymoe.bridge.provider import SkyworkProvider
from nemo_skymoe.checkpoint.sources import open_source
from nemo_skymoe.checkpoint.upcycling.options import Upcycling
from nemo_skymoe.checkpoint.verification.verifier import verify
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.ranks import run_ranks
from tests.bridge.models import ITERATION, converted, start_world
from tests.bridge.recorded import Record, train
from tests.bridge.tiny import SEQUENCE, tiny_config
from tests.cases import every
from tests.checkpoint import hf_models

# As many tokens as rows: Megatron's softmax counts the rows of padding, whose logits are zero before they are trained.
SIZES: dict[str, Any] = {"max_position_embeddings": SEQUENCE, "vocab_size": 128, "num_key_value_heads": 2}
EDP: dict[str, Any] = {
    "tensor_model_parallel_size": 2,
    "expert_model_parallel_size": 2,
    "expert_tensor_parallel_size": 1,
    "sequence_parallel": True,
}


def upcycled(folder: Path) -> Path:
    """An MoE for Bridge, made of a dense model whose rotary embedding and norm are not the usual ones."""
    sizes = SIZES | {"rope_theta": 5000.0, "rms_norm_eps": 1e-5}
    hf_models.skywork_dense(folder / "dense", dtype=torch.float32, **sizes)
    moe = Upcycling(4, seed=1, init="drop", drop_ratio=0.5)
    return converted(folder / "dense", folder / "upcycled", "bridge", moe)


def trained(start: Path, output: Path) -> tuple[Record, list[Tensor]]:
    """What two steps from the weights in `start` computed, and the batches that they saw: tokens and labels."""
    seen: list[Tensor] = []
    original = gpt_step.get_batch

    def get_batch(*args: Any, **kwargs: Any) -> Any:
        batch = original(*args, **kwargs)
        seen.append(torch.stack(batch[:2]).clone())
        return batch

    gpt_step.get_batch = get_batch
    model = provider_from(start, gradient_accumulation_fusion=False, **EDP)
    config = tiny_config(
        output, 2, model, save_interval=1, overrides={"checkpoint": {"pretrained_checkpoint": str(start)}}
    )
    return train(config), seen


def loss_by_transformers(folder: Path, batches: list[Tensor]) -> float:
    """The mean loss of a Hugging Face model."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    losses = []
    for tokens, labels in batches:
        with torch.no_grad():
            logits = model(tokens).logits
        losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), labels.flatten()))
    return float(torch.stack(losses).mean())


@dataclass(frozen=True)
class Trained:
    """A warm start: `upcycled`, the folder it begins with, and `trained`, which has iterations 1 and 2."""

    folder: Path
    record: Record
    first: list[Tensor]
    second: list[Tensor]


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("warm")
    start = upcycled(folder)
    (record, seen), _ = run_ranks(trained, 2, start, folder / "trained", timeout=900.0)
    half = len(seen) // 2
    return Trained(folder, record, seen[:half], seen[half:])


def test_the_first_loss_is_that_of_the_checkpoint(warm: Trained):
    """Evaluated by transformers on the same tokens, after another conversion: no option was lost on the way."""
    exported = converted(warm.folder / "upcycled", warm.folder / "start", "hf")
    expected = loss_by_transformers(exported, warm.first)
    assert len(warm.first) == 4 and warm.record.losses[0] == pytest.approx(expected, rel=1e-6)
    other = loss_by_transformers(warm.folder / "dense", warm.first)
    assert warm.record.losses[0] != pytest.approx(other, rel=1e-4)


def test_what_a_training_saves_is_read(warm: Trained):
    """The loss of the second step, from the checkpoint after the first, which two ranks wrote under EDP."""
    source, start = open_source(warm.folder / "trained/iter_0000001"), open_source(warm.folder / "upcycled")
    # Bridge keeps no ids of special tokens but those in its tokenizer, and this training has none.
    described = replace(start.description, bos_token_id=None, eos_token_id=None)
    assert (source.form, source.description) == ("bridge", described)
    assert open_source(warm.folder / "trained").folder.name == "iter_0000002"
    exported = converted(source.folder, warm.folder / "after one", "hf")
    expected = loss_by_transformers(exported, warm.second)
    assert warm.record.losses[1] == pytest.approx(expected, rel=1e-6)
    assert verify({"base": source.folder}, exported).problems == []


def test_a_trained_checkpoint_goes_to_nemo_and_comes_back(warm: Trained):
    nemo = converted(warm.folder / "trained", warm.folder / "nemo", "nemo")
    back = converted(nemo, warm.folder / "back", "bridge")
    assert verify({"base": warm.folder / "trained"}, back).problems == []
    found, expected = (open_source(folder) for folder in (back, warm.folder / "trained"))
    assert found.description == expected.description
    for key in expected.weights.keys():  # noqa: SIM118
        assert torch.equal(found.weights.read(key), expected.weights.read(key))


def bridge_imports(folder: Path) -> None:
    """Bridge's own conversion of a Llama, with Megatron's own layers, into its own checkpoint."""
    start_world(folder)
    bridge: Any = AutoBridge.from_hf_pretrained(folder / "llama")
    provider = bridge.to_megatron_provider()
    provider.transformer_layer_spec = local_layer_spec
    for fusion in (
        "persist_layer_norm",
        "apply_rope_fusion",
        "masked_softmax_fusion",
        "bias_activation_fusion",
    ):
        setattr(provider, fusion, False)
    provider.finalize()
    model = provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)
    bridge.save_megatron_model(model, folder / "imported")


@every(
    "options",
    [
        {"num_key_value_heads": 2, "rope_theta": 5000.0, "rms_norm_eps": 1e-5},
        {"tie_word_embeddings": True, "num_key_value_heads": 2, "head_dim": 32},
    ],
)
def test_a_llama_that_bridge_imported_is_read(options: dict[str, Any], tmp_path: Path):
    """All that Bridge writes of a model of its own is known, and says what the source's configuration does."""
    hf_models.llama(tmp_path / "llama", **options)
    run_ranks(bridge_imports, 1, tmp_path, timeout=600.0)
    source, expected = open_source(tmp_path / "imported"), open_source(tmp_path / "llama")
    ids = {name: None for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    assert source.description == replace(expected.description, **ids)
    for key in expected.weights.keys():  # noqa: SIM118
        assert torch.equal(source.weights.read(key), expected.weights.read(key)), key


def test_a_provider_takes_everything_from_the_folder(tmp_path: Path):
    """The same one from every form in which the model lies."""
    sizes = {"rope_theta": 5000.0, "rms_norm_eps": 1e-5, "moe_gate_norm_std": 0.7, "num_key_value_heads": 2}
    hf_models.skywork_moe(tmp_path / "hf", tie_word_embeddings=True, **sizes)
    providers = [provider_from(tmp_path / "hf")]
    for to in ("nemo", "bridge"):
        providers.append(provider_from(str(converted(tmp_path / "hf", tmp_path / to, to))))
    expected = {
        "num_layers": 2,
        "num_moe_experts": 4,
        "num_query_groups": 2,
        "rotary_base": 5000,
        "layernorm_epsilon": 1e-5,
        "moe_router_logit_norm_scale": 0.7,
        "share_embeddings_and_output_weights": True,
        "vocab_size": 512,
        "unpadded_vocab_size": 419,
        "should_pad_vocab": False,
        "seq_length": 256,
    }
    for provider in providers:
        assert {name: getattr(provider, name) for name in expected} == expected
        provider.finalize()
    assert provider_from(tmp_path / "hf", seq_length=64).seq_length == 64
    with pytest.raises(ConfigurationError, match="is not a folder"):
        provider_from(tmp_path / "nowhere")


def test_bridge_reads_the_whole_configuration(tmp_path: Path):
    """Every `_target_` is one that Bridge allows, and none but our own were added."""
    hf_models.skywork_moe(tmp_path / "hf")
    folder = converted(tmp_path / "hf", tmp_path / "bridge", "bridge")
    config = ConfigContainer.from_yaml(str(folder / ITERATION / "run_config.yaml"))
    assert type(config.model) is SkyworkProvider and config.model.num_moe_experts == 4
    assert config.checkpoint.save_optim is False and config.tokenizer is None
