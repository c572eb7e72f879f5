"""The `run_config.yaml` beside the tensors of a Megatron-Bridge checkpoint: plain YAML, of which nothing is built here."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from nemo_skymoe.checkpoint.config_values import read_yaml
from nemo_skymoe.checkpoint.description import Description
from nemo_skymoe.checkpoint.torch_dist.model_options import llama_options, model_options, uncalled
from nemo_skymoe.durable.errors import CheckpointError

RUN_CONFIG = "run_config.yaml"
OURS = "nemo_skymoe."
_PROVIDER = f"{OURS}bridge.provider.SkyworkProvider"
_BESIDE = f"{OURS}bridge.tokenizer.beside_the_weights"
_TRAINING = "megatron.bridge.training"
_KNOWN = re.compile(
    r"nemo_skymoe\..+|megatron\.bridge\.models\.(gpt_provider\.GPTModelProvider|(llama|mistral)\..+)"
)
"""Bridge's other providers build models that compute something else, whatever their options say."""
_NOT_SAVED = ("train", "optimizer", "scheduler", "dataset", "logger")
"""The sections of a training that a converted checkpoint has not been through."""


def run_config(description: Description, *, padded_vocab_size: int, tokenizer: Collection[str]) -> bytes:
    """Return the file with which Bridge builds the model and finds its tokenizer: the same bytes every time.

    Args:
        description: The model's description.
        padded_vocab_size: Rows of embedding and head. Bridge adds none to a number that is given.
        tokenizer: The names of the files in `tokenizer/`.

    Raises:
        ConfigurationError: The model scales its rotary embedding in a way that is not carried over to Megatron.
    """
    import yaml

    model = {
        "_target_": _PROVIDER,
        **llama_options(),
        **model_options(description, padded_vocab_size),
        "unpadded_vocab_size": description.architecture.vocab_size,
        "should_pad_vocab": False,
        "bf16": description.dtype == "bfloat16",
        "fp16": description.dtype == "float16",
        "params_dtype": uncalled(f"torch.{description.dtype}"),
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
    }
    config = {
        "_target_": f"{_TRAINING}.config.ConfigContainer",
        "model": model,
        "tokenizer": _tokenizer(tokenizer),
        "checkpoint": {
            "_target_": f"{_TRAINING}.config.CheckpointConfig",
            "save_optim": False,
            "save_rng": False,
            "fully_parallel_save": True,
        },
        **dict.fromkeys(_NOT_SAVED),
    }
    return yaml.safe_dump(config).encode()


def _tokenizer(files: Collection[str]) -> dict[str, Any] | None:
    target = f"{_TRAINING}.tokenizers.config.TokenizerConfig"
    if any(re.fullmatch(r"tokenizer(_config)?\.json|vocab\.(json|txt)", name) for name in files):
        kind, model = "HuggingFaceTokenizer", {"_target_": _BESIDE}
    elif "tokenizer.model" in files:
        kind, model = "SentencePieceTokenizer", "tokenizer/tokenizer.model"
    else:
        return None
    return {"_target_": target, "tokenizer_type": kind, "tokenizer_model": model}


def read_model(file: Path) -> dict[str, Any]:
    """Return the options of whatever model it is. A function or class is its dotted name.

    Raises:
        CheckpointError: The file is damaged, or has no model.
    """
    return flat(_model(read_yaml(file), file))


def flat(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return options with the dotted name of a function or class in place of what YAML has of it."""
    return {
        name: value.get("_target_") if isinstance(value, dict) else value for name, value in model.items()
    }


def read_options(file: Path) -> dict[str, Any]:
    """Return the options of a model that is converted. A function or class is its dotted name.

    Raises:
        CheckpointError: The file is damaged, or describes a model of another kind, an adapter or a quantised model.
    """
    config = read_yaml(file)
    model = _model(config, file)
    kind = model.get("_builder_") or model.get("_target_")
    if not _KNOWN.fullmatch(str(kind)):
        raise CheckpointError(
            f"'{file}' says that the model is made by {kind!r}, expected GPTModelProvider or a provider of Llama, Mistral"
            " or Skywork: if it computes what one of them does, describe it with --config"
        )
    if config.get("peft") is not None:
        raise CheckpointError(
            f"'{file}' says that an adapter was trained (peft), which is not a model: merge it into its base with"
            " AutoBridge's export_adapter_ckpt and peft, and give the result"
        )
    if model.get("restore_modelopt_state") or (file.parent / "modelopt_state").exists():
        raise CheckpointError(
            f"'{file}' belongs to a model that ModelOpt has quantised, pruned or distilled, expected plain weights"
        )
    return flat(model)


def _model(config: Mapping[str, Any], file: Path) -> dict[str, Any]:
    model = config.get("model")
    if not isinstance(model, dict):
        raise CheckpointError(f"'{file}' has no 'model': expected what Megatron-Bridge writes of a training")
    return model
