"""Checkpoints that Megatron itself wrote, at any parallel sizes, read back bit for bit; and what describes a model."""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.transformer.enums import AttnBackend

from nemo_skymoe.architecture import Architecture
from nemo_skymoe.checkpoint.description import Description
from nemo_skymoe.checkpoint.formats import open_torch_dist
from nemo_skymoe.checkpoint.tensors.model import Key, Weights
from nemo_skymoe.checkpoint.torch_dist import names as torch_dist_names
from nemo_skymoe.checkpoint.verification.gpt_model import gpt_model
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.patches import cpu_runtime
from nemo_skymoe.ranks import run_ranks
from tests.checkpoint.fakes import DictWeights, random_weights
from tests.checkpoint.megatron_files import NANS, ROWS, bits, save, stored_tensors, write, write_context

DENSE = Architecture(4, 48, 20, 8, vocab_size=97, num_query_groups=4)
MOE = DENSE.with_experts(4)
TIED = replace(DENSE, tied_embeddings=True, num_query_groups=2, kv_channels=10)

QWEN = replace(DENSE, add_qkv_bias=True, qk_layernorm=True)
"""The biases of Qwen2 and the norms of Qwen3 in one."""


@dataclass(frozen=True)
class Case:
    """How Megatron saves the model."""

    architecture: Architecture
    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 1
    dtype: torch.dtype = torch.bfloat16
    stacked: bool = True
    prefix: str = "module."

    @property
    def ranks(self) -> int:
        return max(self.tp * self.pp, self.ep * self.etp * self.pp)

    def __str__(self) -> str:
        kind = (
            "moe"
            if self.architecture.num_moe_experts
            else "tied"
            if self.architecture.tied_embeddings
            else "dense"
        )
        sizes = {name: getattr(self, name) for name in ("tp", "pp", "ep", "etp")}
        return "-".join(
            [kind, *(f"{name}{size}" for name, size in sizes.items() if size > 1), str(self.dtype)[6:]]
        )


CASES = [
    Case(DENSE, tp=2),
    Case(DENSE, pp=2, dtype=torch.float32, stacked=False, prefix=""),
    Case(TIED, tp=2, dtype=torch.float16),
    Case(MOE, ep=2),
    Case(MOE, tp=2, ep=2, prefix=""),
    Case(MOE, tp=2, etp=2, stacked=False),
    Case(DENSE, tp=2, pp=2),
    Case(QWEN, tp=2),
    Case(QWEN.with_experts(4), tp=2, ep=2, stacked=False),
    Case(MOE, tp=2, pp=2, ep=2),
]


def arguments(architecture: Architecture, **changes: Any) -> argparse.Namespace:
    """What of Megatron-LM's arguments matters here, and two that no restricted loader of torch's admits."""
    return argparse.Namespace(
        **{
            "num_layers": architecture.num_layers,
            "hidden_size": architecture.hidden_size,
            "ffn_hidden_size": architecture.ffn_hidden_size,
            "num_attention_heads": architecture.num_attention_heads,
            "group_query_attention": architecture.num_query_groups is not None,
            "num_query_groups": architecture.query_groups,
            "kv_channels": architecture.head_size,
            "add_qkv_bias": architecture.add_qkv_bias,
            "qk_layernorm": architecture.qk_layernorm,
            "num_experts": architecture.num_moe_experts,
            "moe_router_topk": 2,
            "untie_embeddings_and_output_weights": not architecture.tied_embeddings,
            "normalization": "RMSNorm",
            "swiglu": True,
            "add_bias_linear": False,
            "position_embedding_type": "rope",
            "norm_epsilon": 1e-6,
            "rotary_base": 10000,
            "max_position_embeddings": 64,
            "vocab_size": architecture.vocab_size,
            "padded_vocab_size": ROWS,
            "attention_backend": AttnBackend.auto,
            "params_dtype": torch.bfloat16,
            **changes,
        }
    )


def save_by_megatron(case: Case, source: Path, target: Path) -> None:
    """Load `source` into a model in parallel and save it, both by Megatron."""
    cpu_runtime.apply()
    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(
        case.tp, case.pp, expert_model_parallel_size=case.ep, expert_tensor_parallel_size=case.etp
    )
    model = gpt_model(Description(case.architecture), ROWS, stacked=case.stacked).to(case.dtype)
    state = model.sharded_state_dict(prefix=case.prefix)
    loaded: Any = dist_checkpointing.load(state, str(source / "weights"))
    model.load_state_dict({name.removeprefix(case.prefix): value for name, value in loaded.items()})
    saved = dict(model.sharded_state_dict(prefix=case.prefix))
    if not case.prefix:
        saved["args"] = arguments(case.architecture)
    dist_checkpointing.save(saved, str(target))


def assert_same(read: Weights, expected: DictWeights, dtype: torch.dtype) -> None:
    assert read.keys() == expected.keys()
    for key in read.keys():  # noqa: SIM118
        assert f"torch.{read.info(key).dtype}" == str(dtype)
        assert torch.equal(bits(read.read(key)), bits(expected.read(key))), key


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_megatron_saves_is_read_bit_for_bit(case: Case, tmp_path: Path) -> None:
    """Megatron loads our file at these parallel sizes, saves its own, and nothing has changed."""
    weights = random_weights(case.architecture, case.dtype, seed=3)
    # NaNs of two payloads, which a conversion between data types would make one.
    bits(weights.values[Key("down", 1, 2 if case.architecture.num_moe_experts else None)])[0, :2] = NANS[
        case.dtype
    ]
    source = write(tmp_path / "source", weights, case.dtype, stacked=case.stacked, prefix=case.prefix)
    target = tmp_path / "target"
    (target / "weights").mkdir(parents=True)
    run_ranks(save_by_megatron, case.ranks, case, source, target / "weights")
    if case.prefix:
        write_context(target, case.architecture)
    read, description = open_torch_dist(target)
    assert description.architecture == case.architecture
    assert description.dtype == str(case.dtype).removeprefix("torch.")
    assert_same(read, weights, case.dtype)


@pytest.mark.parametrize("architecture", [DENSE, TIED, MOE], ids=["dense", "tied", "moe"])
@pytest.mark.parametrize("layer_spec", ["local", "te"])
def test_every_layout_is_recognised(tmp_path: Path, architecture: Architecture, layer_spec: str) -> None:
    weights = random_weights(architecture)
    for stacked in (True, False):
        folder = write(
            tmp_path / str(stacked), weights, torch.float32, layer_spec=layer_spec, stacked=stacked
        )
        write_context(folder, architecture)
        assert_same(open_torch_dist(folder)[0], weights, torch.float32)


def test_padding_is_zero_and_left_out_again(tmp_path: Path) -> None:
    weights = random_weights(DENSE)
    tensors = stored_tensors(weights, torch.float32)
    for kind, name in (("embedding", torch_dist_names.EMBEDDING), ("output", "output_layer.weight")):
        stored = tensors[f"module.{name}"]
        assert stored.shape == (ROWS, DENSE.hidden_size) and not stored[97:].any()
        assert torch.equal(stored[:97], weights.read(Key(kind)))
    # What a training leaves in the padding is nobody's weight.
    tensors[f"module.{torch_dist_names.EMBEDDING}"][97:] = torch.nan
    save(tmp_path, tensors)
    write_context(tmp_path, DENSE)
    assert_same(open_torch_dist(tmp_path)[0], weights, torch.float32)
    assert [torch_dist_names.padded_vocab_size(size) for size in (97, 128, 65519, 65536)] == [
        128,
        128,
        65536,
        65536,
    ]


@pytest.mark.parametrize(
    "vocab",
    ['{"a": 0, "<s>": 1}', '[["a", -1.0], ["<s>", -2.0]]'],
    ids=["by id", "in the order of ids"],
)
def test_a_tokenizer_tells_padding_from_vocabulary(tmp_path: Path, vocab: str) -> None:
    write(tmp_path, random_weights(DENSE), torch.float32)
    write_context(tmp_path, DENSE, vocab_size=ROWS)
    assert open_torch_dist(tmp_path)[1].architecture.vocab_size == ROWS
    folder = tmp_path / "context" / "mine"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(
        f'{{"model": {{"vocab": {vocab}}}, "added_tokens": [{{"id": 96, "content": "</s>"}}]}}'
    )
    (folder / "tokenizer_config.json").write_text(
        '{"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": null}'
    )
    description = open_torch_dist(tmp_path)[1]
    assert description.architecture.vocab_size == 97
    assert (description.bos_token_id, description.eos_token_id, description.pad_token_id) == (1, 96, None)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{}", "is no tokenizer of Hugging Face's"),
        ("tokenizer.json", '{"model": {"vocab": {"a": "0"}}, "added_tokens": []}', "an id is no integer"),
        ("tokenizer.json", "[", "is not JSON"),
        ("tokenizer.model", "?", "is no SentencePiece model"),
    ],
)
def test_a_damaged_tokenizer_is_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    write(tmp_path, random_weights(DENSE), torch.float32)
    write_context(tmp_path, DENSE)
    (tmp_path / "context" / name).write_text(content)
    with pytest.raises(ConfigurationError, match=message):
        open_torch_dist(tmp_path)


def test_nemo_options_become_a_description(tmp_path: Path) -> None:
    write(tmp_path, random_weights(MOE, torch.bfloat16), torch.bfloat16)
    write_context(
        tmp_path,
        MOE,
        rotary_base=500000,
        layernorm_epsilon=1e-5,
        seq_len_interpolation_factor=4,
        moe_router_logit_norm_scale=0.5,
        moe_router_logit_norm_correction=0,
    )
    assert open_torch_dist(tmp_path)[1] == Description(
        MOE,
        family="skywork",
        rope_theta=500000.0,
        rope_scaling={"rope_type": "linear", "factor": 4.0},
        rms_norm_eps=1e-5,
        max_position_embeddings=64,
        dtype="bfloat16",
        moe_router_logit_norm_scale=0.5,
        moe_router_logit_norm_correction=0,
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalization": "LayerNorm"}, "normalization is 'LayerNorm', expected 'RMSNorm'"),
        (
            {"activation_func": {"_target_": "torch.nn.functional.gelu"}},
            "activation_func is 'torch.nn.functional.gelu'",
        ),
        ({"scale_factor": 0}, "rope_scaling: scale_factor is 0, expected a positive number"),
        ({"qk_layernorm": True}, "'module.decoder.layers.self_attention.k_layernorm.weight' is missing"),
        ({"add_qkv_bias": True}, "'module.decoder.layers.self_attention.linear_qkv.bias' is missing"),
        ({"attention_output_gate": True}, "attention_output_gate is True, expected False"),
        ({"layernorm_epsilon": "1e-6"}, "layernorm_epsilon is '1e-6', expected a positive number"),
        ({"rotary_base": [1]}, r"rotary_base is \[1\], expected a positive number"),
        ({"kv_channels": 2.5}, "kv_channels is 2.5, expected a positive integer"),
        (
            {"num_moe_experts": 4, "moe_router_topk": 5},
            r"moe_router_topk is 5, expected 1 to num_moe_experts",
        ),
        ({"num_layers": "4"}, "num_layers is '4', expected a positive integer"),
        ({"vocab_size": None}, "no tokenizer and no vocab_size.*expected --config"),
        ({"num_query_groups": 3}, "num_query_groups is 3, expected a divisor"),
        ({"num_moe_experts": 4, "moe_layer_freq": 0}, "moe_layer_freq is 0, expected n for an MoE in"),
        (
            {"num_moe_experts": 4, "moe_layer_freq": [0, 1]},
            r"moe_layer_freq is \[0, 1\], expected .* \(4\) entries",
        ),
        ({"num_moe_experts": 4, "moe_layer_freq": [0] * 4}, "expected an MoE layer among them"),
        ({"num_moe_experts": 4, "moe_router_two_layer_gate": True}, "moe_router_two_layer_gate is True"),
        ({"num_moe_experts": 4, "moe_ffn_hidden_size": 0}, "moe_ffn_hidden_size is 0, expected a positive"),
        ({"num_layers": 5}, r"linear_qkv.weight' is \[4, 96, 48\], expected \[5, 96, 48\]"),
        ({"share_embeddings_and_output_weights": True}, "'module.output_layer.weight' in .* differs from"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_kind_of_model_is_refused_by_the_option(tmp_path: Path, changes: dict, message: str) -> None:
    write(tmp_path, random_weights(DENSE), torch.float32)
    write_context(tmp_path, DENSE, **changes)
    with pytest.raises(ConfigurationError, match=message):
        open_torch_dist(tmp_path)


def test_heads_are_never_guessed(tmp_path: Path) -> None:
    write(tmp_path, random_weights(DENSE), torch.float32)
    with pytest.raises(
        ConfigurationError, match=r"does not say how its attention heads are cut.*expected --config"
    ):
        open_torch_dist(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(
        '{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 97, "hidden_size": 48,'
        ' "intermediate_size": 20, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4}'
    )
    assert_same(open_torch_dist(tmp_path, config)[0], random_weights(DENSE), torch.float32)


@pytest.mark.parametrize("content", [b"", b"PK", None, {"args": 3}, {"model": torch.ones(2)}], ids=str)
def test_damaged_arguments_are_refused(tmp_path: Path, content: Any) -> None:
    write(tmp_path, random_weights(DENSE), torch.float32)
    common = tmp_path / "weights" / "common.pt"
    if isinstance(content, dict):
        torch.save(content, common)
    elif content is None:
        common.unlink()
    else:
        common.write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"common\.pt.*expected --config"):
        open_torch_dist(tmp_path)


def test_no_checkpoint_of_megatron(tmp_path: Path) -> None:
    save(tmp_path, {"module.encoder.weight": torch.ones(2)})
    with pytest.raises(ConfigurationError, match=r"has no 'module\.embedding.word_embeddings.weight'"):
        open_torch_dist(tmp_path)


def test_arguments_are_read_where_megatron_core_0_19_puts_them(tmp_path: Path) -> None:
    """An object among the tensors holds them, in a list, and there is no `common.pt`."""
    weights = random_weights(DENSE)
    content = {"args": arguments(DENSE), "iteration": 3}
    tensors = stored_tensors(weights, torch.float32, prefix="")
    save(tmp_path / "before", tensors)
    torch.save(content, tmp_path / "before" / "weights" / "common.pt")
    save(tmp_path / "now", {**tensors, "common_state/shard_0_1": [content]})
    (tmp_path / "now" / "weights" / "common.pt").unlink()
    read, description = open_torch_dist(tmp_path / "now")
    assert description == open_torch_dist(tmp_path / "before")[1]
    assert_same(read, weights, torch.float32)
