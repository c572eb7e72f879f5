"""Weights that are not a model's own numbers under its own names: quantised ones, adapters, wrapped and inner models."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from nemo_skymoe.checkpoint.foreign import MERGE
from nemo_skymoe.checkpoint.hugging_face.fp8 import block_of
from nemo_skymoe.durable.errors import CheckpointError

_QUANTISED_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
_QUANTISED_TENSORS: tuple[tuple[str, str], ...] = (
    (".qweight", "GPTQ or AWQ"),
    (".qzeros", "GPTQ or AWQ"),
    (".weight.absmax", "bitsandbytes in 4 bits"),
    (".weight.quant_map", "bitsandbytes in 4 bits"),
    (".SCB", "bitsandbytes in 8 bits"),
    (".weight_packed", "compressed-tensors"),
    (".weight_scale_2", "NVFP4"),
    ("_blocks", "MXFP4"),
    (".scales", "MLX or GPTQ"),
    (".codes", "AQLM"),
    (".codebooks", "AQLM"),
    (".W_q", "HQQ"),
    ("._data", "quanto"),
)
_ADAPTER_PARTS = (".lora_A.", ".lora_B.", ".lora_embedding_", ".lora_magnitude_vector", ".modules_to_save.")
_EMBEDDING = "embed_tokens.weight"
_WHOLE = "model."
_UNQUANTISE = (
    "only FP8 with scales by tensor or block is read here: give the checkpoint in bfloat16 that it was made from, or one"
    " that was dequantised and saved anew"
)
_WHOLE_NUMBERS = ("int8", "uint8", "int32", "uint32", "int16", "uint16")


def refuse_quantised_files(folder: Path) -> None:
    """Refuse a folder with the settings of a quantiser beside config.json."""
    for name in _QUANTISED_FILES:
        if (folder / name).is_file():
            raise CheckpointError(f"'{folder / name}' says that the weights are quantised: {_UNQUANTISE}")


def refuse_foreign_tensors(folder: Path, dtypes: dict[str, str]) -> None:
    """Refuse tensors that are a quantiser's, an adapter's or a wrapper's, by their names and data types.

    Raises:
        CheckpointError: With the first of them, and what to do.
    """
    for name in sorted(dtypes):
        for ending, method in _QUANTISED_TENSORS:
            if name.endswith(ending):
                raise CheckpointError(
                    f"'{name}' in '{folder}' belongs to weights quantised as {method}: {_UNQUANTISE}"
                )
        if any(part in name for part in _ADAPTER_PARTS):
            raise CheckpointError(
                f"'{name}' in '{folder}' belongs to an adapter (LoRA), which has to become part of the weights: {MERGE}"
            )
        if dtypes[name] in _WHOLE_NUMBERS and name.endswith("_proj.weight"):
            raise CheckpointError(
                f"'{name}' in '{folder}' is {dtypes[name]}, as of a quantiser: {_UNQUANTISE}"
            )
    _refuse_prefixes(folder, dtypes)


def _refuse_prefixes(folder: Path, names: Iterable[str]) -> None:
    """Refuse a whole model all of whose names are longer, or shorter, than its own."""
    (embedding,) = [name for name in names if f".{name}".endswith(f".{_EMBEDDING}")][:1] or [
        _WHOLE + _EMBEDDING
    ]
    before = embedding.removesuffix(_EMBEDDING)
    if before == _WHOLE or not all(name.startswith(before) or ".lm_head." in f".{name}" for name in names):
        return
    if before == "":
        raise CheckpointError(
            f"'{folder}' holds '{embedding}', not '{_WHOLE}{embedding}': the inner model was saved, without its head; load"
            " it with the class that config.json names, such as LlamaForCausalLM, and save that"
        )
    wrapper = before.removesuffix(_WHOLE)
    raise CheckpointError(
        f"the names in '{folder}' begin with '{wrapper}', as a wrapper (DDP, torch.compile, peft, a multimodal model)"
        " leaves them: unwrap the model, save it again with save_pretrained, and give the result"
    )


def check_quantization(name: str, config: Any, wrong: Callable[[str, str], CheckpointError]) -> None:
    """Refuse a `quantization_config`, under this name, whose weights are not read here; `wrong` makes the error."""
    if config is None:
        return
    method = config.get("quant_method") if isinstance(config, dict) else None
    if method != "fp8":
        raise wrong(
            name,
            f"none, or quant_method 'fp8' with scales by tensor or block; quant_method {method!r}: {_UNQUANTISE}",
        )
    try:
        block_of({name: config})
    except ValueError as reason:
        raise wrong(name, f"FP8 with scales by tensor or block; {reason}") from None
