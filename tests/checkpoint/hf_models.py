"""Tiny Hugging Face checkpoints with random weights: Llama, Mistral, and both of Skywork's layouts."""

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

VOCAB_SIZE = 419
"""Odd, as Skywork-13B's 65519: a Megatron model pads it to 512."""
SIZES = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 256,
}
SKYWORK: dict[str, Any] = {
    "architectures": ["SkyworkForCausalLM"],
    "model_type": "skywork",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "use_cache": True,
}
SKYWORK_MOE: dict[str, Any] = {
    "num_experts": [4],
    "moe_expert_interval": 1,
    "moe_2layer_gate": False,
    "moe_use_mixtral_gating": False,
    "moe_use_logits_norm": True,
    "moe_gate_norm_std": 1.0,
    "moe_feature_no_mul_topk": True,
}


def llama(folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> LlamaForCausalLM:
    """Save a Llama by transformers itself; `config` changes SIZES (`num_key_value_heads=2`, ...)."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = SIZES | config
    model: Any = LlamaForCausalLM(LlamaConfig(**sizes))
    model = model.to(dtype)
    model.save_pretrained(folder, max_shard_size="100KB")
    return model.eval()


def mistral(
    folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any
) -> MistralForCausalLM:
    """Save a Mistral by transformers itself: grouped-query attention, no sliding window."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = SIZES | {"num_key_value_heads": 2, "sliding_window": None} | config
    model: Any = MistralForCausalLM(MistralConfig(**sizes))
    model = model.to(dtype)
    model.save_pretrained(folder, max_shard_size="100KB")
    return model.eval()


def skywork_dense(
    folder: Path, seed: int = 0, dtype: torch.dtype = torch.bfloat16, **config: Any
) -> dict[str, Tensor]:
    """Save a checkpoint in Skywork-13B's layout; returns its tensors."""
    values = SIZES | SKYWORK | config
    tensors = {name: tensor.to(dtype) for name, tensor in dense_tensors(values, seed).items()}
    save(folder, tensors, values | {"torch_dtype": str(dtype).removeprefix("torch.")})
    return tensors


def skywork_moe(
    folder: Path, seed: int = 0, dtype: torch.dtype = torch.bfloat16, **config: Any
) -> dict[str, Tensor]:
    """Save a checkpoint in the released Skywork-MoE's layout; returns its tensors. Gates are not all alike."""
    values = SIZES | SKYWORK | SKYWORK_MOE | config
    tensors = {name: tensor.to(dtype) for name, tensor in moe_tensors(values, seed).items()}
    save(folder, tensors, values | {"torch_dtype": str(dtype).removeprefix("torch.")})
    return tensors


def dense_tensors(values: dict[str, Any], seed: int) -> dict[str, Tensor]:
    """Random weights of a Llama of these sizes under Hugging Face's names, norms included."""
    torch.manual_seed(seed)
    known = {
        "num_key_value_heads",
        "head_dim",
        "tie_word_embeddings",
        "rope_theta",
        "rms_norm_eps",
    } | SIZES.keys()
    model = LlamaForCausalLM(LlamaConfig(**{name: values[name] for name in known & values.keys()}))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter.data, mean=1.0, std=0.1)
    tensors = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    return tensors | _vectors(values, tensors)


def _vectors(values: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return random biases of queries, keys and values, and norms of queries and keys, where the configuration has them."""
    vectors = {}
    for name, matrix in tensors.items():
        for kind in "qkv" if values.get("add_qkv_bias") else "":
            if name.endswith(f"{kind}_proj.weight"):
                vectors[name.removesuffix("weight") + "bias"] = torch.randn(matrix.shape[0])
        for kind in "qk" if values.get("qk_layernorm") else "":
            if name.endswith(f"{kind}_proj.weight"):
                size = values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]
                vectors[name.replace("_proj", "_norm")] = 1 + 0.2 * torch.randn(size)
    return vectors


def moe_tensors(values: dict[str, Any], seed: int) -> dict[str, Tensor]:
    """Random weights of a Skywork-MoE under the release's names."""
    dense = dense_tensors(values, seed)
    tensors = {name: tensor for name, tensor in dense.items() if ".mlp." not in name}
    experts = values["num_experts"]
    hidden, ffn = values["hidden_size"], values["intermediate_size"]
    for layer in range(values["num_hidden_layers"]):
        moe = f"model.layers.{layer}.block_sparse_moe"
        count = experts[0] if isinstance(experts, list) else experts
        tensors[f"{moe}.gate.weight"] = torch.randn(count, hidden)
        for expert in range(count):
            tensors[f"{moe}.experts.{expert}.w1.weight"] = torch.randn(ffn, hidden) * 0.02
            tensors[f"{moe}.experts.{expert}.w2.weight"] = torch.randn(hidden, ffn) * 0.02
            tensors[f"{moe}.experts.{expert}.w3.weight"] = torch.randn(ffn, hidden) * 0.02
    return tensors


def save(
    folder: Path, tensors: dict[str, Tensor], config: dict[str, Any], shard_bytes: int = 100_000
) -> None:
    """Write safetensors shards with an index, and config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=shard_bytes)
    for file, names in split.filename_to_tensors.items():
        save_file({name: tensors[name].contiguous() for name in names}, folder / file, {"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def rope_theta(config: Any) -> float:
    """The base of the rotary embedding in a configuration of transformers; from 5 on it is among the parameters."""
    return config.rope_theta if hasattr(config, "rope_theta") else config.rope_parameters["rope_theta"]
