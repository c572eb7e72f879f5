"""Megatron's checkpoints for tests: written in one piece, and what NeMo says beside one."""

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save as save_state_dict

from nemo_skymoe.architecture import Architecture
from nemo_skymoe.checkpoint.tensors.mapping import assemble
from nemo_skymoe.checkpoint.tensors.model import Weights
from nemo_skymoe.checkpoint.torch_dist import names as torch_dist_names
from nemo_skymoe.checkpoint.torch_dist.storage import CONFIG, WEIGHTS

ROWS = 128
NANS = {
    torch.bfloat16: torch.tensor([0x7F81, 0x7FC3], dtype=torch.int16),
    torch.float16: torch.tensor([0x7C01, 0x7E03], dtype=torch.int16),
    torch.float32: torch.tensor([0x7F800001, 0x7FC00003], dtype=torch.int32),
}


def stored_tensors(weights: Weights, dtype: torch.dtype, **layout: Any) -> dict[str, Tensor]:
    """Every tensor of a checkpoint in memory, as the chunks say."""
    slices: dict[str, list[Tensor]] = defaultdict(list)
    shapes = {}
    for chunk in torch_dist_names.chunks(weights.architecture, ROWS, **layout):
        slices[chunk.tensor].append(assemble(chunk, weights, dtype))
        shapes[chunk.tensor] = chunk.shape
    return {name: torch.cat(parts).reshape(shapes[name]) for name, parts in slices.items()}


def save(folder: Path, entries: Mapping[str, Any]) -> None:
    """Save tensors and extra states as `folder/weights`, by torch's own writer."""
    weights = folder / WEIGHTS
    weights.mkdir(parents=True)
    whole = DefaultSavePlanner(flatten_state_dict=False)
    save_state_dict(dict(entries), storage_writer=FileSystemWriter(weights), planner=whole, no_dist=True)
    torch.save({}, weights / "common.pt")
    (weights / CONFIG).write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))


def write(folder: Path, weights: Weights, dtype: torch.dtype, **layout: Any) -> Path:
    """A checkpoint as the writer makes it, without its context."""
    extra_states = {name: [None] for name in torch_dist_names.extra_states(weights.architecture, **layout)}
    save(folder, {**stored_tensors(weights, dtype, **layout), **extra_states})
    return folder


def nemo_options(architecture: Architecture, **changes: Any) -> dict[str, Any]:
    """What of a NeMo configuration matters here."""
    return {
        "_target_": "nemo.collections.llm.gpt.model.llama.LlamaConfig",
        "num_layers": architecture.num_layers,
        "hidden_size": architecture.hidden_size,
        "ffn_hidden_size": architecture.ffn_hidden_size,
        "num_attention_heads": architecture.num_attention_heads,
        "num_query_groups": architecture.query_groups,
        "kv_channels": architecture.head_size,
        "add_qkv_bias": architecture.add_qkv_bias,
        "qk_layernorm": architecture.qk_layernorm,
        "num_moe_experts": architecture.num_moe_experts,
        "moe_router_topk": 2,
        "share_embeddings_and_output_weights": architecture.tied_embeddings,
        "normalization": "RMSNorm",
        "activation_func": {"_target_": "torch.nn.functional.silu", "_call_": False},
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "position_embedding_type": "rope",
        "layernorm_epsilon": 1e-6,
        "rotary_base": 10000,
        "seq_length": 64,
        "vocab_size": architecture.vocab_size,
        **changes,
    }


def write_context(folder: Path, architecture: Architecture, **changes: Any) -> None:
    (folder / "context").mkdir(parents=True)
    model = {"_target_": "nemo.collections.llm.GPTModel", "config": nemo_options(architecture, **changes)}
    (folder / "context" / "model.yaml").write_text(yaml.safe_dump(model))


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)
