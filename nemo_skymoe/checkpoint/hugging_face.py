"""Hugging Face checkpoints as tables of chunks: Llama's names, the released Skywork-MoE's, and its authors' own."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import replace
from pathlib import Path

from nemo_skymoe.architecture import Architecture
from nemo_skymoe.checkpoint import hf_config
from nemo_skymoe.checkpoint.description import Description
from nemo_skymoe.checkpoint.foreign_tensors import refuse_foreign_tensors, refuse_quantised_files
from nemo_skymoe.checkpoint.fp8 import EIGHT_BITS, SCALE, Dequantized
from nemo_skymoe.checkpoint.mapping import Chunk, Part, StoredWeights, listed
from nemo_skymoe.checkpoint.reading import FileStorage
from nemo_skymoe.checkpoint.redundant import one_embedding, without_buffers
from nemo_skymoe.checkpoint.safetensors_storage import SafetensorsStorage
from nemo_skymoe.checkpoint.storage_view import StorageView
from nemo_skymoe.checkpoint.tensors import ITEM_SIZES, Key, TensorInfo, key_shape, model_keys
from nemo_skymoe.config import ConfigurationError

logger = logging.getLogger(__name__)

_NAMES = {
    "embedding": "model.embed_tokens",
    "attention_norm": "input_layernorm",
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "attention_output": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "final_norm": "model.norm",
    "output": "lm_head",
}
_EMBEDDING, _HEAD = (f"{_NAMES[kind]}.weight" for kind in ("embedding", "output"))
NAMINGS = {
    "skywork": {
        "router": "block_sparse_moe.gate",
        "gate": "block_sparse_moe.experts.{}.w1",
        "up": "block_sparse_moe.experts.{}.w3",
        "down": "block_sparse_moe.experts.{}.w2",
    },
    "authors": {
        "router": "mlp.moe.gate.wg",
        "gate": "mlp.moe.experts.experts.{}.up_proj",
        "up": "mlp.moe.experts.experts.{}.up_proj",
        "down": "mlp.moe.experts.experts.{}.down_proj",
    },
}
"""Of an MoE's own tensors: the release's, and that of the authors' trainer and their later MoE++, where `up_proj`
holds the gate's rows before its own."""
IGNORED = (
    ".rotary_emb.cos_cached",
    ".rotary_emb.sin_cached",
    ".act_scale",
    ".input_scale",
    ".kv_scale",
    ".k_scale",
    ".v_scale",
)
"""Tensors that say nothing about the weights: buffers computed anew, and scales of activations."""


def chunks(architecture: Architecture, naming: str = "skywork") -> list[Chunk]:
    """Every stored tensor of a model: 471 for Skywork-13B, 2863 for Skywork-MoE.

    Args:
        architecture: A dense model has Llama's names whatever `naming` is.
        naming: Of the experts, one of NAMINGS.
    """
    parts: dict[str, list[Part]] = {}
    for key in model_keys(architecture):
        rows = key_shape(architecture, key)[0]
        parts.setdefault(_name(key, naming), []).append(Part(key, 0, rows))
    return [
        Chunk(name, (sum(part.stop for part in rows), *_columns(architecture, rows)), tuple(rows))
        for name, rows in parts.items()
    ]


def _name(key: Key, naming: str) -> str:
    of_moe = key.expert is not None or key.kind == "router"
    name = NAMINGS[naming][key.kind].format(key.expert) if of_moe else _NAMES[key.kind]
    layer = "" if key.layer is None else f"model.layers.{key.layer}."
    return f"{layer}{name}.weight"


def _columns(architecture: Architecture, rows: list[Part]) -> tuple[int, ...]:
    key = rows[0].key
    assert key is not None
    return key_shape(architecture, key)[1:]


def open(folder: Path) -> tuple[StoredWeights, Description]:
    """A checkpoint folder of any layout here, from its headers and its configuration.

    Raises:
        ConfigurationError: The configuration is refused, or the tensors are not those of its model.
    """
    description = hf_config.read(folder)
    refuse_quantised_files(folder)
    storage = SafetensorsStorage(folder)
    refuse_foreign_tensors(folder, {name: info.dtype for name, info in storage.tensors.items()})
    storage = without_buffers(_without_ignored(storage), description)
    if any(name.endswith(SCALE) or info.dtype in EIGHT_BITS for name, info in storage.tensors.items()):
        storage = Dequantized(storage)
    _check_types(storage)
    tied = description.architecture.tied_embeddings
    storage = one_embedding(storage, embedding=_EMBEDDING, head=_HEAD, tied=tied)
    embedding = storage.tensors.get(_EMBEDDING)
    if embedding is not None:
        description = _with_stored(description, embedding, folder)
    naming = "authors" if any(".mlp.moe." in name for name in storage.tensors) else "skywork"
    architecture = description.architecture
    return StoredWeights(storage, architecture, chunks(architecture, naming)), description


def _check_types(storage: FileStorage) -> None:
    problems = [
        f"'{name}' is {info.dtype}" for name, info in storage.tensors.items() if info.dtype not in ITEM_SIZES
    ]
    if problems:
        raise ConfigurationError(
            f"'{storage.folder}' has weights of other types than {', '.join(ITEM_SIZES)}: {listed(problems)}"
        )


def _with_stored(description: Description, embedding: TensorInfo, folder: Path) -> Description:
    """The data type is that of the weights; a vocabulary of another size is an error, never a correction."""
    vocab_size = description.architecture.vocab_size
    if embedding.shape[:1] != (vocab_size,):
        raise ConfigurationError(
            f"'{folder / 'config.json'}': vocab_size is {vocab_size}, the embedding is {list(embedding.shape)}"
        )
    if embedding.dtype != description.dtype:
        logger.warning(
            "%s: torch_dtype is %s, the weights are %s", folder, description.dtype, embedding.dtype
        )
    return replace(description, dtype=embedding.dtype)


def _without_ignored(storage: FileStorage) -> FileStorage:
    """The storage without the tensors that are known and mean nothing here; says what they were."""
    tensors = storage.tensors
    ignored = Counter(ending for ending in map(_ignored, tensors) if ending)
    for ending, count in ignored.items():
        logger.info("%s: %d tensors '*%s' are not needed", storage.folder, count, ending)
    return StorageView(storage, {name: info for name, info in tensors.items() if not _ignored(name)})


def _ignored(name: str) -> str | None:
    return next((ending for ending in IGNORED if name.endswith(ending)), None)
