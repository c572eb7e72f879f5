"""Users hand over other things than checkpoints that are read here: each is recognised by its names, and told what to do."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from nemo_skymoe.durable.errors import CheckpointError
from nemo_skymoe.durable.stand_in import refuse_broken_link, refuse_pointer

MERGE = (
    "merge it into its base with peft (PeftModel.from_pretrained(BASE, FOLDER).merge_and_unload()), save that, and give"
    " the result"
)
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+:/")
_HUB_ID = re.compile(
    r"(?:hf:/*|https?:/+(?:www\.)?huggingface\.co/|models--)?([\w.-]+?(?:(?:/|--)[\w.-]+?)?)"
    r"(?:@[\w.-]+|/(?:tree|blob|resolve)/.*)?/?"
)
_MOST_NAMED = 5
_SAVE_SAFE = (
    "which runs code when read: load the model with transformers and save it by"
    " model.save_pretrained(FOLDER, safe_serialization=True)"
)
_GGUF = "is a GGUF or GGML file of llama.cpp, whose weights are mostly quantised: give the safetensors that it was made from"
_MISTRAL = (
    "is in Mistral's own layout: convert it with transformers' convert_mistral_weights_to_hf.py, or give the files of the"
    " same model in Hugging Face's (config.json, model*.safetensors)"
)
_WEIGHTS = (
    r"(?!consolidated).*\.safetensors(\.index\.json)?|pytorch_model(-\d{5}-of-\d{5})?\.bin(\.index\.json)?",
    "is one file of a model: give its folder, with config.json",
)
_PART = (r".*\.distcp|\.metadata", "is one file of a checkpoint: give the folder of the whole")
_FILES: tuple[tuple[str, str], ...] = (
    (
        r".*\.nemo",
        "is a NeMo archive: unpack it with tar -xf into a folder; of a NeMo 2 checkpoint give the folder with weights/"
        " and context/, and one of NeMo 1 (model_config.yaml) must be converted by NeMo's own scripts first",
    ),
    (r".*\.gguf|.*\.ggml|ggml.*\.bin", _GGUF),
    (
        r".*\.(zip|tar|tgz|7z|rar|tar\.(gz|zst|xz|bz2))",
        "is an archive: unpack it, and give the folder of the checkpoint",
    ),
    (
        r"consolidated.*\.pth",
        "is a pickle in Meta's layout: convert it with transformers' convert_llama_weights_to_hf.py first",
    ),
    (r"consolidated.*\.safetensors", _MISTRAL),
    (
        r"(?!(rng_state|optimizer|scheduler|scaler|training_args|random_states|pytorch_model(-\d{5}-of-\d{5})?\.bin).*).*\.(bin|pt|pth|ckpt|pkl)(\.index\.json)?",
        f"is a pickle, {_SAVE_SAFE}",
    ),
    (
        r".*\.(h5|keras|msgpack|onnx|onnx_data|npz|tflite|mlmodel|mlpackage|ot|pb|pdparams|engine|plan|tfl)"
        r"|.*\.ckpt\.(index|meta|data-.*)|openvino_model.*|onnx|openvino|coreml",
        "is another framework's format: give the model's safetensors",
    ),
)
_FOLDERS: tuple[tuple[str, str], ...] = (
    (
        r"adapter_config\.json|adapter_model\..*",
        f"belongs to an adapter (LoRA), which is not a model: {MERGE}",
    ),
    (
        r"\.journal",
        "says that a command has not finished here: run the same command again, and give the folder that it was to write",
    ),
    (
        r"(.*zero_pp_rank_\d+_)?mp_rank_\d+.*_(model|optim)_states\.pt|zero_to_fp32\.py|global_step\d+",
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


def refuse_path(path: Path) -> None:
    """Refuse what is no folder, with what it seems to be.

    Raises:
        CheckpointError: It is no folder.
    """
    if path.is_dir():
        return
    refuse_broken_link(path)
    if path.is_file():
        refuse_pointer(path)
        advice = (
            _advice(path.name, (_PART, _WEIGHTS, *_FILES))
            or _advice_by_content(path)
            or "is a file: give the folder of a checkpoint"
        )
        raise CheckpointError(f"'{path}' {advice}")
    hub = _HUB_ID.fullmatch(str(path))
    if hub and not path.is_absolute():
        name = hub[1].replace("--", "/")
        raise CheckpointError(
            f"'{path}' is not a folder: if it is a model of the Hugging Face hub, download it first, as by"
            f" hf download {name} --local-dir {name.rpartition('/')[2]}, and give that folder"
        )
    if _ADDRESS.match(str(path)):
        raise CheckpointError(
            f"'{path}' is an address, not a folder: download the checkpoint first, and give its folder"
        )
    raise CheckpointError(f"'{path}' is not a folder")


def refuse_folder(folder: Path, *, is_model: bool) -> None:
    """Refuse a folder that holds something else than a model, or something beside it that changes the model.

    Args:
        is_model: Whether it has what a model here has: then only adapters and unfinished work matter.

    Raises:
        CheckpointError: With the file that says so.
    """
    names = sorted(entry.name for entry in folder.iterdir())
    tables = _FOLDERS[:2] if is_model else (*_FOLDERS, *_FILES)
    for table in tables:
        for name in names:
            if re.fullmatch(table[0], name, re.IGNORECASE):
                raise CheckpointError(f"'{folder / name}' {table[1]}")


def refuse_folder_of_models(folder: Path, telling: Iterable[str]) -> None:
    """Refuse a folder that only contains models, such as the hub's cache of one or a trainer's output, and name them.

    Args:
        telling: Names in a folder by which a model is known.

    Raises:
        CheckpointError: With the first few of them.
    """
    depths = ("*", "*/*", "models--*/snapshots/*")
    found: list[str] = []
    for depth in depths:
        inner = (path for path in folder.glob(depth) if path.name != "context")
        found = found or sorted(
            str(path) for path in inner if any((path / name).exists() for name in telling)
        )
    if found:
        more = ", ..." if len(found) > _MOST_NAMED else ""
        raise CheckpointError(
            f"'{folder}' is no checkpoint itself: give the one in it that you mean,"
            f" {', '.join(map(repr, found[:_MOST_NAMED]))}{more}"
        )


def _advice_by_content(path: Path) -> str | None:
    """Return advice on a file whose name says nothing, such as a blob of a cache."""
    with path.open("rb") as opened:
        start = opened.read(512)
    beginnings = {b"PK\x03\x04": "m.zip", b"\x1f\x8b": "m.tgz"}
    beginnings |= dict.fromkeys((b"GGUF", b"lmgg", b"fmgg", b"tjgg"), "m.gguf")
    name = next((name for begin, name in beginnings.items() if start.startswith(begin)), "")
    return _advice("m.tar" if start[257:262] == b"ustar" else name, _FILES)


def _advice(name: str, table: tuple[tuple[str, str], ...]) -> str | None:
    return next((advice for pattern, advice in table if re.fullmatch(pattern, name, re.IGNORECASE)), None)
