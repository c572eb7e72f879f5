"""The `context/` folder of a NeMo 2 checkpoint, written without NeMo and with the same bytes every time.

`io.json` is a configuration of Fiddle's as NeMo serialises it; `model.yaml` holds the plain values of the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_skymoe.checkpoint.companions import companion_files
from nemo_skymoe.checkpoint.description import Description
from nemo_skymoe.checkpoint.torch_dist.model_options import llama_options, model_options
from nemo_skymoe.checkpoint.torch_dist.options import CONTEXT, HF_CONFIG

TOKENIZER = "tokenizer"
_MODELS = "nemo_skymoe.nemo.model"
_TOKENIZERS = "nemo.collections.common.tokenizers"


@dataclass(frozen=True)
class _Call:
    """A class by its full name, and the arguments to build it with."""

    target: str
    arguments: Mapping[str, Any]


def context_files(
    description: Description, tokenizer_folder: Path | None, *, config: bytes, padded_vocab_size: int
) -> dict[str, bytes]:
    """Return the files by path relative to the checkpoint.

    Args:
        description: The model's description.
        tokenizer_folder: The folder of its tokenizer, if it has one.
        config: The config.json that describes it too.
        padded_vocab_size: Rows of embedding and head, with which NeMo is to build the model.

    Raises:
        ConfigurationError: The model scales its rotary embedding in a way that is not carried over to Megatron.
    """
    tokenizer = {} if tokenizer_folder is None else companion_files(tokenizer_folder)
    model = _model(description, padded_vocab_size, _tokenizer(tokenizer))
    trainer = _Call(
        "nemo.lightning.pytorch.trainer.Trainer",
        {
            "accelerator": "cpu",
            "devices": 1,
            "strategy": _Call("nemo.lightning.pytorch.strategies.megatron_strategy.MegatronStrategy", {}),
        },
    )
    root = _Call("nemo.lightning.io.pl.TrainerContext", {"model": model, "trainer": trainer})
    files = {
        "io.json": _io_json(root),
        "model.yaml": _model_yaml(model),
        HF_CONFIG: config,
        **{f"{TOKENIZER}/{name}": content for name, content in tokenizer.items()},
    }
    return {f"{CONTEXT}/{name}": content for name, content in files.items()}


def _model(description: Description, padded_vocab_size: int, tokenizer: _Call | None) -> _Call:
    kind = "Skywork" if description.architecture.num_moe_experts is None else "SkyworkMoE"
    options = model_options(description, padded_vocab_size)
    config = _Call(f"{_MODELS}.{kind}Config", options)
    return _Call(
        f"{_MODELS}.{kind}Model", {"config": config} | ({} if tokenizer is None else {"tokenizer": tokenizer})
    )


def _tokenizer(files: Mapping[str, bytes]) -> _Call | None:
    """Return NeMo's class for these files. Code of a tokenizer is not run: SentencePiece's model is enough."""
    if not any(re.fullmatch(r"tokenizer(_config)?\.(json|model)|vocab\.(json|txt)", name) for name in files):
        return None
    brings_code = b'"auto_map"' in files.get("tokenizer_config.json", b"")
    if brings_code and "tokenizer.json" not in files and "tokenizer.model" in files:
        model = f"{TOKENIZER}/tokenizer.model"
        return _Call(f"{_TOKENIZERS}.sentencepiece_tokenizer.SentencePieceTokenizer", {"model_path": model})
    return _Call(
        f"{_TOKENIZERS}.huggingface.auto_tokenizer.AutoTokenizer", {"pretrained_model_name": TOKENIZER}
    )


def _model_yaml(model: _Call) -> bytes:
    """Return the file for readers without Fiddle. Unlike NeMo's own it leaves out what none of our options changes."""
    import yaml

    values = _plain(model)
    values["config"] |= llama_options()
    return yaml.safe_dump(values).encode()


def _plain(value: Any) -> Any:
    if not isinstance(value, _Call):
        return value
    return {"_target_": value.target} | {name: _plain(item) for name, item in value.arguments.items()}


def _io_json(root: _Call) -> bytes:
    objects: dict[str, Any] = {}

    def add(call: _Call, path: str) -> dict[str, str]:
        items = []
        for name, value in call.arguments.items():
            place = f"{path}.{name}"
            leaf = {"type": "leaf", "value": value, "paths": [place]}
            if isinstance(value, list):
                leaf = _container("list", [[f"Index(index={i})", one] for i, one in enumerate(value)])
            items.append([f"Attr(name='{name}')", add(value, place) if isinstance(value, _Call) else leaf])
        key = f"{call.target.rpartition('.')[2]}_1"
        objects[key] = {
            "type": _reference("fiddle._src.config.Config"),
            "items": items,
            "metadata": _metadata(call),
            "paths": [path],
        }
        return {"type": "ref", "key": key}

    reference = add(root, "<root>")
    content = {
        "root": reference,
        "objects": objects,
        "refcounts": dict.fromkeys(objects, 1),
        "version": "0.0.1",
    }
    return json.dumps(content).encode()


def _metadata(call: _Call) -> dict[str, Any]:
    kind = _reference("fiddle._src.config.BuildableTraverserMetadata")
    values = {
        "fn_or_cls": _reference(call.target),
        "argument_names": _container(
            "tuple", [[f"Index(index={i})", name] for i, name in enumerate(call.arguments)]
        ),
        "argument_tags": _container("dict", []),
        "argument_history": _container("dict", []),
    }
    return {
        "type": kind,
        "items": [[f"Attr(name='{name}')", value] for name, value in values.items()],
        "metadata": kind,
    }


def _container(kind: str, items: list[Any]) -> dict[str, Any]:
    keys = _container("tuple", []) if kind == "dict" else None
    return {"type": _reference(f"builtins.{kind}"), "items": items, "metadata": keys}


def _reference(target: str) -> dict[str, str]:
    module, _, name = target.rpartition(".")
    return {"type": "pyref", "module": module, "name": name}
