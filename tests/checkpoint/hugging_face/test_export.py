"""Our modeling files in transformers: Llama around the experts, the gate of `moe.gating`, a cache, and a way back."""

import ast
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from nemo_skymoe.checkpoint.hugging_face.configuration import read
from nemo_skymoe.checkpoint.hugging_face.exported_files import EXPORT, MODELING_FILES, extras
from nemo_skymoe.checkpoint.hugging_face.opening import open_hugging_face
from nemo_skymoe.moe.gating import normalize_gating_logits
from tests.checkpoint import hf_models

MOE = "model.layers.{}.block_sparse_moe"
pytestmark = pytest.mark.usefixtures("remote_code")


def exported(folder: Path) -> Path:
    """Put beside the weights what an export puts there."""
    _, description = open_hugging_face(folder)
    for name, content in extras(description, folder).items():
        (folder / name).write_bytes(content)
    return folder


def load(folder: Path, **options: Any) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, **options
    )
    assert not any(info.values()), info
    return model.eval()


def text(tokens: int = 32, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, hf_models.VOCAB_SIZE, (batch, tokens), generator=generator)


def difference(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.fixture
def moe(tmp_path: Path) -> Path:
    hf_models.skywork_moe(tmp_path / "moe", dtype=torch.float32, num_experts=[8], num_experts_per_tok=3)
    return exported(tmp_path / "moe")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"num_key_value_heads": 2, "rope_theta": 5e5},
        {"tie_word_embeddings": True, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    ],
    ids=str,
)
@torch.no_grad
def test_dense_skywork_is_llama(config: dict[str, Any], attention: str, tmp_path: Path):
    llama = hf_models.llama(tmp_path, **config)
    values = json.loads((tmp_path / "config.json").read_text())
    values |= {"architectures": ["SkyworkForCausalLM"], "model_type": "skywork"}
    (tmp_path / "config.json").write_text(json.dumps(values))
    model = load(exported(tmp_path), attn_implementation=attention)
    assert type(model).__name__ == "SkyworkForCausalLM" and not isinstance(llama, type(model))
    assert difference(model(text()).logits, llama(text()).logits) <= 1e-6


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no norm"])
@torch.no_grad
def test_identical_experts_are_the_dense_model(norm: bool, attention: str, tmp_path: Path):
    llama = hf_models.llama(tmp_path / "dense", num_hidden_layers=4, num_key_value_heads=2)
    tensors = {}
    for name, tensor in llama.state_dict().items():
        names = [name]
        for old, new in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
            if f"mlp.{old}" in name:
                names = [name.replace(f"mlp.{old}", f"block_sparse_moe.experts.{e}.{new}") for e in range(4)]
        tensors |= {copy: tensor.clone() for copy in names}
    torch.manual_seed(2)
    tensors |= {f"{MOE.format(layer)}.gate.weight": torch.randn(4, 64) for layer in range(4)}
    config = hf_models.SIZES | hf_models.SKYWORK | hf_models.SKYWORK_MOE
    config |= {"num_hidden_layers": 4, "num_key_value_heads": 2, "moe_use_logits_norm": norm}
    hf_models.save(tmp_path / "moe", tensors, config)
    model = load(exported(tmp_path / "moe"), attn_implementation=attention)
    assert difference(model(text()).logits, llama(text()).logits) <= 1e-6


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
@torch.no_grad
def test_gate_is_ours(scale: float, tmp_path: Path):
    """Against nemo_skymoe.moe.gating and equations (1) and (2), flat rows included."""
    tensors = hf_models.skywork_moe(tmp_path, dtype=torch.float32, num_experts=16, moe_gate_norm_std=scale)
    gate = load(exported(tmp_path)).model.layers[1].block_sparse_moe
    torch.manual_seed(3)
    x = torch.randn(100, 64)
    x[7] = 0.0
    weights, experts = gate.route(x)
    logits = x @ tensors[f"{MOE.format(1)}.gate.weight"].T
    full = torch.softmax(normalize_gating_logits(logits, scale, correction=1), dim=-1)
    chosen = full.gather(1, experts)
    least_chosen = chosen.min(dim=-1).values
    assert (full.scatter(1, experts, 0.0).max(dim=-1).values <= least_chosen).all()
    torch.testing.assert_close(weights, chosen / chosen.sum(dim=-1, keepdim=True), rtol=1e-5, atol=1e-7)
    assert torch.equal(weights[7], torch.tensor([0.5, 0.5]))


@torch.no_grad
def test_layer_against_one_token_at_a_time(moe: Path):
    tensors = {name: tensor.double() for name, tensor in load(moe).state_dict().items()}
    block = load(moe, dtype=torch.float64).model.layers[0].block_sparse_moe
    x = torch.randn(2, 9, 64, dtype=torch.float64)
    expected = torch.stack([one_token(token, tensors) for token in x.view(-1, 64)])
    torch.testing.assert_close(block(x), expected.view_as(x), rtol=1e-10, atol=1e-14)


def one_token(token: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    """Layer 0's experts as the report writes them: eq. 6 with the sample deviation, eq. 1, eq. 2."""
    prefix = MOE.format(0)
    logits = tensors[f"{prefix}.gate.weight"] @ token
    gate = ((logits - logits.mean()) / logits.std()).softmax(0)
    chosen = gate.topk(3).indices.tolist()
    output = torch.zeros_like(token)
    for index in chosen:
        w1, w2, w3 = (tensors[f"{prefix}.experts.{index}.{name}.weight"] for name in ("w1", "w2", "w3"))
        output += gate[index] / gate[chosen].sum() * (w2 @ (F.silu(w1 @ token) * (w3 @ token)))
    return output


@torch.no_grad
def test_gate_of_a_bfloat16_model_counts_in_float32(tmp_path: Path):
    tensors = hf_models.skywork_moe(tmp_path)
    block = load(exported(tmp_path), dtype=torch.bfloat16).model.layers[0].block_sparse_moe
    x = torch.randn(50, 64, dtype=torch.bfloat16)
    for size in (1.0, 1e20):  # whose squares no float32 holds
        weights, experts = block.route(size * x)
        logits = (size * x).float() @ tensors[f"{MOE.format(0)}.gate.weight"].float().T
        centred = logits.double() - logits.double().mean(-1, keepdim=True)
        expected = (centred / centred.std(-1, keepdim=True)).topk(2)
        assert weights.dtype == torch.float32
        assert torch.equal(experts, expected.indices)
        torch.testing.assert_close(weights.double(), expected.values.softmax(dim=-1), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(normalize_gating_logits(logits).topk(2).values.double(), expected.values)
    assert block(x[None]).dtype == torch.bfloat16


def test_generation_with_the_cache_is_that_without(moe: Path):
    model = load(moe)
    options: dict[str, Any] = {
        "max_new_tokens": 12,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    prompt = text(8)
    mask = torch.ones_like(prompt)
    cached = model.generate(prompt, attention_mask=mask, use_cache=True, **options)
    assert torch.equal(cached, model.generate(prompt, attention_mask=mask, use_cache=False, **options))
    # And that is the most likely token at every place.
    with torch.no_grad():
        assert torch.equal(model(cached[:, :-1]).logits.argmax(-1)[:, 7:], cached[:, 8:])


@torch.no_grad
def test_padding_changes_nothing(moe: Path):
    model = load(moe)
    prompt = text(8)
    padded = F.pad(prompt, (3, 0))
    mask = F.pad(torch.ones_like(prompt), (3, 0))
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    found = model(padded, attention_mask=mask, position_ids=positions).logits[:, 3:]
    assert difference(found, model(prompt).logits) <= 1e-5


def test_gradients_reach_the_gate_and_every_expert_used(moe: Path):
    model = load(moe).train()
    model.gradient_checkpointing_enable()
    loss = model(text(), labels=text()).loss
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())
    assert gradients[f"{MOE.format(1)}.gate.weight"].abs().max() > 0


def test_saved_again_with_the_same_names_and_values(moe: Path, tmp_path: Path):
    load(moe).save_pretrained(tmp_path / "again", max_shard_size="100KB")
    tensors = hf_models.moe_tensors(json.loads((moe / "config.json").read_text()), seed=0)
    saved: dict[str, Tensor] = {}
    for file in (tmp_path / "again").glob("*.safetensors"):
        saved |= load_file(file)
    assert saved.keys() == tensors.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in tensors.items())
    assert {"configuration_skywork.py", "modeling_skywork.py"} <= {
        file.name for file in (tmp_path / "again").iterdir()
    }
    assert read(tmp_path / "again") == read(moe)


def test_hidden_states_and_attentions(moe: Path):
    result = load(moe, attn_implementation="eager")(text(), output_hidden_states=True, output_attentions=True)
    assert (len(result.hidden_states), len(result.attentions)) == (3, 2)


def test_a_llama_stays_a_llama(tmp_path: Path):
    hf_models.llama(tmp_path)
    assert type(AutoModelForCausalLM.from_pretrained(exported(tmp_path))) is LlamaForCausalLM


def test_needs_nothing_but_torch_and_transformers():
    imported: set[str] = set()
    for name in MODELING_FILES:
        for node in ast.walk(ast.parse((EXPORT / name).read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add((node.module or "").partition(".")[0])
            elif isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
    assert imported == {"torch", "transformers", "typing"}


def test_tokenizer_and_model_load_together(moe: Path, tmp_path: Path):
    words = {word: index for index, word in enumerate(["<unk>", "<s>", "</s>", "mixture", "of", "experts"])}
    source = Tokenizer(WordLevel(words, unk_token="<unk>"))
    source.pre_tokenizer = Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    PreTrainedTokenizerFast(tokenizer_object=source, unk_token="<unk>").save_pretrained(moe)
    for file in moe.glob("*.safetensors*"):
        shutil.copy(file, tmp_path)
    for name, content in extras(read(moe), moe).items():
        (tmp_path / name).write_bytes(content)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True)
    prompt = tokenizer("mixture of experts", return_tensors="pt")
    assert prompt["input_ids"].tolist() == [[3, 4, 5]]
    generated = load(tmp_path).generate(
        **{name: prompt[name] for name in ("input_ids", "attention_mask")}, max_new_tokens=2, pad_token_id=0
    )
    assert generated.shape[1] > 3
