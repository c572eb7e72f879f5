"""What users hand over instead of a checkpoint that is read here: each recognised by its names, and told what to do."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from nemo_skymoe.config import ConfigurationError

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1"
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+:/")
_HUB_ID = re.compile(r"(?:hf:/+|https?:/+huggingface\.co/)?([\w.-]+/[\w.-]+)")
_MOST_NAMED = 5
_SAVE_SAFE = (
    "which runs code when read: load the model with transformers and save it by"
    " model.save_pretrained(FOLDER, safe_serialization=True)"
)
_FILES: tuple[tuple[str, str], ...] = (
    (
        r".*\.nemo",
        "is a NeMo archive: unpack it with tar -xf into a folder; of a NeMo 2 checkpoint give the folder with weights/"
        " and context/, and one of NeMo 1 (model_config.yaml) must be converted by NeMo's own scripts first",
    ),
    (
        r".*\.gguf|.*\.ggml",
        "is a GGUF file of llama.cpp, whose weights are mostly quantised: give the safetensors that it was made from",
    ),
    (
        r".*\.(zip|tar|tgz|tar\.(gz|zst|xz))",
        "is an archive: unpack it, and give the folder of the checkpoint",
    ),
    (r".*\.safetensors(\.index\.json)?", "is one file of a model: give its folder, with config.json"),
    (
        r"consolidated.*\.pth",
        "is a pickle in Meta's layout: convert it with transformers' convert_llama_weights_to_hf.py first",
    ),
    (r".*\.(bin|pt|pth|ckpt|pkl)", f"is a pickle, {_SAVE_SAFE}"),
    (
        r".*\.(h5|msgpack|onnx|npz|tflite|mlmodel)",
        "is another framework's format: give the model's safetensors",
    ),
)
_FOLDERS: tuple[tuple[str, str], ...] = (
    (
        r"adapter_config\.json|adapter_model\..*",
        "belongs to an adapter (LoRA), which is not a model: merge it into its base with peft"
        " (PeftModel.from_pretrained(BASE, FOLDER).merge_and_unload()), save that, and give the result",
    ),
    (
        r"mp_rank_\d+.*_model_states\.pt|zero_to_fp32\.py|global_step\d+",
        "belongs to a DeepSpeed checkpoint of pickles: run its zero_to_fp32.py, and save the model as safetensors",
    ),
    (
        r"mp_rank_\d+(_\d+)*|model_optim_rng\.pt",
        "belongs to Megatron's legacy format, a pickle for each rank: convert it with Megatron-LM's"
        " tools/checkpoint/convert.py --saver core and --ckpt-format torch_dist first",
    ),
    (
        r"latest_checkpointed_iteration\.txt",
        "says that this is the folder of a Megatron-LM run: give that of one iteration, such as iter_0001000",
    ),
    (
        r"model_config\.yaml|model_weights",
        "belongs to a checkpoint of NeMo 1: convert it with NeMo's own scripts to NeMo 2 or to Hugging Face first",
    ),
    (
        r"pytorch_model_fsdp.*",
        "belongs to a sharded checkpoint of FSDP: gather it first (accelerate merge-weights FOLDER OUTPUT), and put"
        " config.json and the tokenizer beside the result",
    ),
    (
        r"model_index\.json",
        "belongs to a diffusers pipeline: give the folder of a language model",
    ),
)
_QUANTISED_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
_QUANTISED_TENSORS: tuple[tuple[str, str], ...] = (
    (".weight_scale_inv", "block-scaled FP8 (DeepSeek's)"),
    (".qweight", "GPTQ or AWQ"),
    (".weight.absmax", "bitsandbytes in 4 bits"),
    (".SCB", "bitsandbytes in 8 bits"),
    (".weight_packed", "compressed-tensors"),
    ("_blocks", "MXFP4"),
)
_UNQUANTISE = (
    "only FP8 with one weight_scale a tensor is read here: give the checkpoint in bfloat16 that it was made from, or one"
    " that was dequantised and saved anew"
)


def refuse_broken_link(path: Path) -> None:
    """Refuse a link that leads nowhere, or round in a circle."""
    if path.is_symlink() and not path.exists():
        raise ConfigurationError(
            f"'{path}' is a link to '{os.readlink(path)}', which cannot be opened: put what it stands for in its place"
        )


def refuse_path(path: Path) -> None:
    """Refuse what is no folder, with what it seems to be.

    Raises:
        ConfigurationError: It is no folder.
    """
    if path.is_dir():
        return
    refuse_broken_link(path)
    if path.is_file():
        refuse_pointer_file(path)
        advice = (
            _advice(path.name, _FILES)
            or _advice_by_content(path)
            or "is a file: give the folder of a checkpoint"
        )
        raise ConfigurationError(f"'{path}' {advice}")
    if _ADDRESS.match(str(path)) and not _HUB_ID.fullmatch(str(path)):
        raise ConfigurationError(
            f"'{path}' is an address, not a folder: download the checkpoint first, and give its folder"
        )
    hub = _HUB_ID.fullmatch(str(path))
    if hub and not path.parent.is_dir():
        name = hub[1]
        raise ConfigurationError(
            f"'{path}' is not a folder: if it is a model of the Hugging Face hub, download it first, as by"
            f" hf download {name} --local-dir {name.rpartition('/')[2]}, and give that folder"
        )
    raise ConfigurationError(f"'{path}' is not a folder")


def refuse_folder(folder: Path, *, is_model: bool) -> None:
    """Refuse a folder that holds something else than a model, or something beside it that changes the model.

    Args:
        is_model: Whether it has what a model here has: then only adapters matter.

    Raises:
        ConfigurationError: With the file that says so.
    """
    names = sorted(entry.name for entry in folder.iterdir())
    tables = _FOLDERS[:1] if is_model else (*_FOLDERS, *_FILES)
    for table in tables:
        for name in names:
            if re.fullmatch(table[0], name):
                raise ConfigurationError(f"'{folder / name}' {table[1]}")


def refuse_folder_of_models(folder: Path, telling: Iterable[str]) -> None:
    """Refuse a folder that only contains models, such as the hub's cache of one or a trainer's output, and name them.

    Args:
        telling: Names in a folder by which a model is known.

    Raises:
        ConfigurationError: With the first few of them.
    """
    inner = [*folder.iterdir(), *folder.glob("snapshots/*"), *folder.glob("models--*/snapshots/*")]
    found = sorted(str(path) for path in inner if any((path / name).exists() for name in telling))
    if found:
        more = ", ..." if len(found) > _MOST_NAMED else ""
        raise ConfigurationError(
            f"'{folder}' is no checkpoint itself: give the one in it that you mean,"
            f" {', '.join(map(repr, found[:_MOST_NAMED]))}{more}"
        )


def refuse_quantised_files(folder: Path) -> None:
    """Refuse a folder with the settings of a quantiser beside config.json."""
    for name in _QUANTISED_FILES:
        if (folder / name).is_file():
            raise ConfigurationError(f"'{folder / name}' says that the weights are quantised: {_UNQUANTISE}")


def refuse_quantised_tensors(folder: Path, names: Iterable[str]) -> None:
    """Refuse tensors that are a quantiser's, by their names."""
    for name in sorted(names):
        for ending, method in _QUANTISED_TENSORS:
            if name.endswith(ending):
                raise ConfigurationError(
                    f"'{name}' in '{folder}' belongs to weights quantised as {method}: {_UNQUANTISE}"
                )


def check_quantization(config: Any, wrong: Callable[[str, str], ConfigurationError]) -> None:
    """Refuse a `quantization_config` whose weights are not read here; `wrong` makes the error."""
    if config is None:
        return
    method = config.get("quant_method") if isinstance(config, dict) else None
    if isinstance(config, dict) and method == "fp8" and not config.get("weight_block_size"):
        return
    kind = f"quant_method {method!r}" if method != "fp8" else "FP8 with a scale for each block"
    raise wrong(
        "quantization_config", f"none, or quant_method 'fp8' with one scale a tensor; {kind}: {_UNQUANTISE}"
    )


def refuse_pointer(file: Path, begin: bytes) -> None:
    """Refuse what git-lfs left in a file's place; `begin` is how the file begins."""
    if begin.startswith(LFS_POINTER):
        raise ConfigurationError(
            f"'{file}' is a git-lfs pointer, not the file itself: run git lfs pull in its folder, or download it anew"
        )


def refuse_pointer_file(file: Path) -> None:
    """The same, of a file whose beginning is read here."""
    with file.open("rb") as opened:
        refuse_pointer(file, opened.read(len(LFS_POINTER)))


def _advice_by_content(path: Path) -> str | None:
    """For a file whose name says nothing, as a blob of a cache has it."""
    with path.open("rb") as opened:
        start = opened.read(512)
    beginnings = {b"GGUF": "m.gguf", b"PK\x03\x04": "m.zip", b"\x1f\x8b": "m.tgz"}
    name = next((name for begin, name in beginnings.items() if start.startswith(begin)), "")
    return _advice("m.tar" if start[257:262] == b"ustar" else name, _FILES)


def _advice(name: str, table: tuple[tuple[str, str], ...]) -> str | None:
    return next((advice for pattern, advice in table if re.fullmatch(pattern, name, re.IGNORECASE)), None)
