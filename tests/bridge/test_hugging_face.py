"""`AutoBridge` converts SkyworkForCausalLM as `skymoe convert` does, tensor for tensor, both ways and on two ranks."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.bridge import AutoBridge
from megatron.bridge.training.model_load_save import load_tokenizer, temporary_distributed_context
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, dynamic_module_utils

from nemo_skymoe.bridge.hugging_face import SkyworkBridge
from nemo_skymoe.checkpoint.sources import open_source
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.patches import bridge_cpu
from nemo_skymoe.ranks import RankFailed, run_ranks
from tests.bridge.models import converted, imported, loaded, same, start_world, tensors
from tests.cases import every
from tests.checkpoint import hf_models
from tests.checkpoint.hugging_face.test_fp8 import fp8_release
from tests.checkpoint.hugging_face.test_names import authors

GROUPED = {"num_key_value_heads": 2}
DIFFERENT = {"mlp_only_layers": [0], "moe_intermediate_size": 32}
MODELS: dict[str, Callable[[Path], Any]] = {
    "dense": lambda folder: hf_models.skywork_dense(folder, **GROUPED),
    "dense, tied": lambda folder: hf_models.skywork_dense(folder, tie_word_embeddings=True),
    "MoE": lambda folder: hf_models.skywork_moe(folder, **GROUPED),
    "MoE in float32": lambda folder: hf_models.skywork_moe(folder, dtype=torch.float32),
}
SIZES = hf_models.SIZES | hf_models.SKYWORK | hf_models.SKYWORK_MOE


def differing(folder: Path) -> None:
    """An MoE whose first layer is dense, in the release's names."""
    values = SIZES | DIFFERENT
    moe = hf_models.moe_tensors(values | {"intermediate_size": 32}, seed=1)
    dense = hf_models.dense_tensors(values, seed=0)
    kept = {name: tensor for name, tensor in moe.items() if "layers.0.block_sparse_moe" not in name}
    first = {name: tensor for name, tensor in dense.items() if "layers.0.mlp" in name}
    hf_models.save(folder, kept | first, values | {"torch_dtype": "float32"})


def in_the_authors_names(folder: Path) -> None:
    hf_models.save(folder, authors(hf_models.moe_tensors(SIZES, seed=0)), SIZES | {"torch_dtype": "float32"})


MODELS["layers that differ"] = differing
MODELS["biases and norms of heads"] = lambda folder: hf_models.skywork_moe(
    folder, **GROUPED, add_qkv_bias=True, qk_layernorm=True
)
MORE = {"the authors' names": in_the_authors_names, "FP8": fp8_release}


def sources(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder, in the release's names."""
    from nemo_skymoe.bridge.hugging_face_folder import FolderState

    state = FolderState(folder)
    return {name: state[name] for name in state.get_all_keys()}


def problems_of(hf: Path, bridge_folder: Path, tp: int, moe: bool, export: bool) -> dict[str, Any]:
    """What differs between Bridge's import and `skymoe convert`, and between its export and the source."""
    start_world(hf.parent)
    expected = tensors(loaded(bridge_folder, tp, moe))
    bridge, model = imported(hf, tp, moe)
    found = {"tensors": len(expected), "import": same(tensors(model), expected)}
    if export:
        # From the model that Bridge loaded: an export that read the source would be found out.
        exported = dict(
            bridge.export_hf_weights([loaded(bridge_folder, tp, moe)], cpu=True, show_progress=False)
        )
        found["export"] = same(exported, sources(hf))
    return found


@every("name", [*MODELS, *MORE], ids=[*MODELS, *MORE], tp=(1, 2))
def test_autobridge_does_what_convert_does(name: str, tp: int, tmp_path: Path):
    (MODELS | MORE)[name](tmp_path / "hf")
    converted(tmp_path / "hf", tmp_path / "bridge", "bridge")
    moe = not name.startswith("dense")
    for found in run_ranks(
        problems_of, tp, tmp_path / "hf", tmp_path / "bridge", tp, moe, name in MODELS, timeout=300
    ):
        assert found.pop("tensors") > 10 and not any(found.values()), found


def test_grouped_experts_have_a_pair_of_names_each():
    """Grouped experts are Transformer Engine's: their names and shapes are all that can be seen here."""
    registry = SkyworkBridge().mapping_registry()
    fc1: Any = registry.megatron_to_hf_lookup("decoder.layers.1.mlp.experts.linear_fc1.weight13")
    assert fc1.hf_param == {
        "gate": "model.layers.1.block_sparse_moe.experts.13.w1.weight",
        "up": "model.layers.1.block_sparse_moe.experts.13.w3.weight",
    }
    fc2: Any = registry.megatron_to_hf_lookup("decoder.layers.0.mlp.experts.linear_fc2.weight3")
    assert fc2.hf_param == "model.layers.0.block_sparse_moe.experts.3.w2.weight"
    norm: Any = registry.megatron_to_hf_lookup("decoder.layers.0.pre_mlp_layernorm.weight")
    assert norm.hf_param == "model.layers.0.post_attention_layernorm.weight"


def there_and_back(folder: Path) -> None:
    """Bridge's own import into a checkpoint, and its export from one."""
    bridge_cpu.apply()
    with temporary_distributed_context(backend="gloo"):
        AutoBridge.import_ckpt(folder / "hf", folder / "imported")
    bridge = AutoBridge.from_hf_pretrained(folder / "hf")
    bridge.export_ckpt(folder / "converted", folder / "exported", show_progress=False)
    dynamic_module_utils.HF_MODULES_CACHE = str(folder / "modules")
    bridge = AutoBridge.from_hf_pretrained(folder / "hf", trust_remote_code=True)
    bridge.export_ckpt(folder / "converted", folder / "trusted", show_progress=False)
    assert load_tokenizer(str(folder / "converted/iter_0000000")).vocab_size > 0


def with_tokenizer(folder: Path) -> None:
    """A tokenizer of words, as transformers saves one."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(419)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    tokenizer: Any = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="w0", bos_token="w1", eos_token="w2"
    )
    tokenizer.save_pretrained(folder)


def test_import_and_export_of_whole_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What import_ckpt writes is read by `skymoe`, and export_ckpt reads what `skymoe` writes."""
    monkeypatch.setenv("MEGATRON_CONFIG_LOCK_DIR", str(tmp_path))
    hf_models.skywork_moe(tmp_path / "release", **GROUPED)
    with_tokenizer(tmp_path / "release")
    converted(
        tmp_path / "release", tmp_path / "hf", "hf"
    )  # with our modeling files, and the auto_map to them
    converted(tmp_path / "hf", tmp_path / "converted", "bridge")
    run_ranks(there_and_back, 1, tmp_path, timeout=300)
    expected = sources(tmp_path / "hf")
    for name, trusted in (("exported", False), ("trusted", True)):
        assert same(sources(tmp_path / name), expected) == []
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["architectures"] == ["SkyworkForCausalLM"] and config["num_experts"] == [4]
        # Bridge's rule: code travels with a model whose code was trusted.
        assert ("auto_map" in config) == (tmp_path / name / "modeling_skywork.py").is_file() == trusted
    source = open_source(tmp_path / "imported")
    assert source.form == "bridge" and source.description.architecture.vocab_size == 419
    assert (source.description.bos_token_id, source.description.eos_token_id) == (1, 2)
    converted(tmp_path / "imported", tmp_path / "back", "hf")
    assert same(sources(tmp_path / "back"), expected) == []


def logits_by_bridge(folder: Path, token_ids: Tensor) -> Tensor:
    start_world(folder)
    _, model = imported(folder)
    positions = torch.arange(token_ids.shape[1]).expand_as(token_ids)
    with torch.no_grad():
        return model.eval()(token_ids, positions, attention_mask=None)[..., :419].clone()


@every("make", [hf_models.skywork_dense, hf_models.skywork_moe], ids=["dense", "MoE"])
def test_the_logits_are_those_of_transformers(make: Callable[..., Any], tmp_path: Path):
    make(tmp_path / "hf", dtype=torch.float32, **GROUPED, moe_gate_norm_std=0.7)
    token_ids = torch.randint(419, (2, 48), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
        expected = model.eval()(token_ids).logits
    [found] = run_ranks(logits_by_bridge, 1, tmp_path / "hf", token_ids, timeout=300)
    assert (found - expected).abs().max() / expected.abs().max() < 1e-6


def test_what_convert_refuses_is_refused(tmp_path: Path):
    """A tensor that is missing would be left as it was drawn: Bridge itself only warns."""
    hf_models.skywork_moe(tmp_path / "hf")
    name = "model.layers.1.input_layernorm.weight"
    index = json.loads((tmp_path / "hf/model.safetensors.index.json").read_text())
    shard = tmp_path / "hf" / index["weight_map"].pop(name)
    (tmp_path / "hf/model.safetensors.index.json").write_text(json.dumps(index))
    save_file({kept: tensor for kept, tensor in load_file(shard).items() if kept != name}, shard)
    with pytest.raises(RankFailed, match=r"is not the model its configuration describes: .* is missing"):
        run_ranks(logits_by_bridge, 1, tmp_path / "hf", torch.zeros(1, 4, dtype=torch.int64), timeout=300)
    shutil.rmtree(tmp_path / "hf")
    hf_models.skywork_moe(tmp_path / "hf", moe_2layer_gate=True)
    with pytest.raises(RankFailed, match="moe_2layer_gate is True, expected false"):
        run_ranks(logits_by_bridge, 1, tmp_path / "hf", torch.zeros(1, 4, dtype=torch.int64), timeout=300)


def with_a_gates_bias(folder: Path) -> None:
    start_world(folder)
    bridge: Any = AutoBridge.from_hf_pretrained(folder)
    provider = bridge.to_megatron_provider(load_weights=False)
    provider.moe_router_gate_bias = True
    provider.finalize()
    model = provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)
    with pytest.raises(ConfigurationError, match="moe_router_gate_bias=False"):
        list(bridge.export_hf_weights(model, cpu=True, show_progress=False))


def test_a_parameter_that_the_release_has_not_is_refused(tmp_path: Path):
    hf_models.skywork_moe(tmp_path / "hf")
    run_ranks(with_a_gates_bias, 1, tmp_path / "hf", timeout=300)


@every(
    "config, theta, factor",
    [
        ({"rope_theta": 5000.0}, 5000, None),
        ({"rope_scaling": {"type": "ntk", "factor": 2.0}}, 20000, None),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 10000, 2.0),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "truncate": False}}, 10000, None),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, None, None),
    ],
)
def test_the_provider_follows_the_configuration(
    config: dict[str, Any],
    theta: int | None,
    factor: float | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """The rotary embedding, which transformers keeps in its own words, and which Megatron may lack."""
    monkeypatch.setenv("MEGATRON_CONFIG_LOCK_DIR", str(tmp_path))
    hf_models.skywork_moe(tmp_path / "hf", **config)
    bridge: Any = AutoBridge.from_hf_pretrained(tmp_path / "hf")
    if theta is None:
        with pytest.raises(ConfigurationError, match="of type 'dynamic', which Megatron lacks"):
            bridge.to_megatron_provider(load_weights=False)
        return
    provider = bridge.to_megatron_provider(load_weights=False)
    assert (provider.rotary_base, provider.seq_len_interpolation_factor) == (theta, factor)
    assert (provider.params_dtype, provider.bf16) == (torch.bfloat16, True)
    if config.get("rope_scaling", {}).get("type") == "yarn":
        original = provider.yarn_original_max_position_embeddings
        assert (provider.yarn_rotary_scaling_factor, original) == (
            4.0,
            hf_models.SIZES["max_position_embeddings"],
        )
        written = SkyworkBridge.megatron_to_hf_config(provider)
        assert (written["rope_scaling"]["factor"], written["rope_scaling"]["truncate"]) == (4.0, False)
    else:
        assert provider.yarn_rotary_scaling_factor == 1.0


def test_the_configuration_follows_the_provider(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As `from_auto_config` needs it, for a model whose sizes are not those of the reference."""
    monkeypatch.setenv("MEGATRON_CONFIG_LOCK_DIR", str(tmp_path))
    hf_models.skywork_moe(tmp_path / "hf", **GROUPED, moe_gate_norm_std=0.7)
    bridge: Any = AutoBridge.from_hf_pretrained(tmp_path / "hf")
    provider = bridge.to_megatron_provider(load_weights=False)
    provider.num_layers, provider.moe_router_topk = 3, 1
    config = SkyworkBridge.megatron_to_hf_config(provider)
    expected = {"num_hidden_layers": 3, "num_experts_per_tok": 1, "num_experts": [4], "vocab_size": 419}
    assert config.items() >= {**expected, "moe_gate_norm_std": 0.7, "num_key_value_heads": 2}.items()
    provider.add_bias_linear = True
    with pytest.raises(ConfigurationError, match="add_bias_linear is True"):
        SkyworkBridge.megatron_to_hf_config(provider)
