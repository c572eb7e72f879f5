"""What users hand over that is no checkpoint of a known format: how to make each, and what has to be said of it."""

import json
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from nemo_skymoe.architecture import Architecture
from nemo_skymoe.checkpoint import convert
from nemo_skymoe.checkpoint.convert import TargetOptions
from nemo_skymoe.checkpoint.description import Description
from nemo_skymoe.checkpoint.hugging_face import names as hugging_face_names
from nemo_skymoe.checkpoint.hugging_face.exported_files import to_hf_config
from nemo_skymoe.checkpoint.sources import open_source
from nemo_skymoe.durable.receipt import RECEIPT

TINY = Architecture(1, 16, 8, 2, vocab_size=40)
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 5\n"
CONFIG = to_hf_config(Description(TINY))


def model(folder: Path, **config: Any) -> Path:
    folder.mkdir(parents=True)
    tensors = {chunk.tensor: torch.zeros(chunk.shape) for chunk in hugging_face_names.chunks(TINY)}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG | {"torch_dtype": "float32"} | config))
    return folder


def file(name: str, content: bytes = b"x" * 2000) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return make


def folder_of(*names: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        for name in names:
            (folder / "made" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "made" / name).write_bytes(b"{}")
        return folder / "made"

    return make


def model_with(config: Mapping[str, Any] | None = None, /, **files: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        made = model(folder / "made", **(config or {}))
        for name, content in files.items():
            (made / name.replace("__", ".")).write_bytes(content)
        return made

    return make


def with_tensor(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        made = model(folder / "made")
        tensors = {chunk.tensor: torch.zeros(chunk.shape) for chunk in hugging_face_names.chunks(TINY)}
        save_file(tensors | {name: torch.zeros(1)}, made / "model.safetensors")
        return made

    return make


def renamed(rename: Callable[[str], str]) -> Callable[[Path], Path]:
    """A model whose tensors have other names."""

    def make(folder: Path) -> Path:
        made = model(folder / "made")
        names = [chunk.tensor for chunk in hugging_face_names.chunks(TINY)]
        save_file({rename(name): torch.zeros(1) for name in names}, made / "model.safetensors")
        return made

    return make


def sharded(without: str, content: bytes | None = None) -> Callable[[Path], Path]:
    """A model in two shards, one file of which is missing or something else."""

    def make(folder: Path) -> Path:
        made = model(folder / "made")
        (made / "model.safetensors").unlink()
        places = {}
        for number, chunk in enumerate(hugging_face_names.chunks(TINY)):
            places[chunk.tensor] = f"model-0000{1 + number % 2}-of-00002.safetensors"
        for shard in sorted(set(places.values())):
            save_file({name: torch.zeros(1) for name in places if places[name] == shard}, made / shard)
        (made / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
        (made / without).unlink()
        if content is not None:
            (made / without).write_bytes(content)
        return made

    return make


def nemo(without: str, content: bytes | None = None) -> Callable[[Path], Path]:
    """A checkpoint of NeMo's, one file of which is missing or something else."""

    def make(folder: Path) -> Path:
        source = open_source(model(folder / "made"))
        convert.plan({"base": source}, TargetOptions("nemo", layer_spec="local")).run(folder / "nemo")
        (folder / "nemo" / without).unlink()
        if without != RECEIPT:
            (folder / "nemo" / RECEIPT).unlink()
        if content is not None:
            (folder / "nemo" / without).write_bytes(content)
        return folder / "nemo"

    return make


def cast(dtype: torch.dtype) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        made = model(folder / "made")
        tensors = {
            chunk.tensor: torch.zeros(chunk.shape, dtype=dtype if "_proj" in chunk.tensor else torch.bfloat16)
            for chunk in hugging_face_names.chunks(TINY)
        }
        save_file(tensors, made / "model.safetensors")
        return made

    return make


def nemo_tar(folder: Path) -> Path:
    with tarfile.open(folder / "model.nemo", "w"):
        return folder / "model.nemo"


def zarr(folder: Path) -> Path:
    (folder / "weights").mkdir()
    (folder / "weights/metadata.json").write_text('{"sharded_backend": "zarr"}')
    return folder


def zipped(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "model.zip", "w"):
        return folder / "model.zip"


def quantised(method: str, **more: Any) -> Callable[[Path], Path]:
    return model_with({"quantization_config": {"quant_method": method, **more}})


PAGE = b"<!DOCTYPE html><html>Access denied</html>"
INDEX = "model.safetensors.index.json"
EXAMPLES: list[tuple[Callable[[Path], Path], str]] = [
    (model_with(model__safetensors=POINTER), r"model\.safetensors' is a git-lfs pointer.*git lfs pull"),
    (model_with(config__json=POINTER), r"config\.json' is a git-lfs pointer"),
    (model_with(tokenizer__model=POINTER), r"tokenizer\.model' is a git-lfs pointer"),
    (file("model.safetensors", POINTER), "is a git-lfs pointer"),
    (nemo_tar, r"model\.nemo' is a NeMo archive: unpack it"),
    (folder_of("model.nemo"), "is a NeMo archive"),
    (zipped, "is an archive: unpack it"),
    (file("m-Q4_K_M.GGUF"), "GGUF or GGML file .*give the safetensors"),
    (folder_of("config.json", "m.gguf"), "architectures|GGUF"),
    (folder_of("m-Q4.gguf"), "GGUF or GGML file"),
    (lambda _: Path("Skywork/Skywork-13B-base"), "hf download Skywork/Skywork-13B-base --local-dir"),
    (lambda _: Path("hf://Skywork/Skywork-13B-base"), "hf download Skywork/Skywork-13B-base --local-dir"),
    (
        lambda _: Path("https://huggingface.co/Skywork/Skywork-13B-base/tree/main"),
        "hf download Skywork/Skywork-13B-base ",
    ),
    (lambda _: Path("Skywork/Skywork-13B-base@main"), "hf download Skywork/Skywork-13B-base "),
    (lambda _: Path("models--Skywork--Skywork-13B-base"), "hf download Skywork/Skywork-13B-base "),
    (lambda _: Path("gpt2"), "hf download gpt2 "),
    (lambda _: Path("0/Skywork-13B-base"), "hf download 0/Skywork-13B-base "),
    (lambda folder: folder / "nowhere", "nowhere' is not a folder$"),
    (folder_of("adapter_config.json", "adapter_model.safetensors"), r"adapter \(LoRA\).*merge_and_unload"),
    (model_with(adapter_config__json=b"{}"), r"adapter \(LoRA\).*merge_and_unload"),
    (model_with(adapter_model__safetensors=b""), r"adapter \(LoRA\).*merge_and_unload"),
    (
        quantised("fp8", weight_block_size=[128]),
        "weight_block_size is .*, expected two numbers of rows and columns",
    ),
    (
        with_tensor("model.layers.0.mlp.up_proj.weight_scale_inv"),
        "has the scales of blocks, expected weight_block",
    ),
    (with_tensor("model.layers.0.mlp.up_proj.qweight"), "GPTQ or AWQ"),
    (with_tensor("model.layers.0.mlp.up_proj.weight.absmax"), "bitsandbytes in 4 bits"),
    (with_tensor("model.layers.0.mlp.experts.up_proj_blocks"), "MXFP4"),
    (model_with(quantize_config__json=b"{}"), "says that the weights are quantised"),
    *((quantised(m), f"quant_method '{m}'.*bfloat16") for m in ("gptq", "awq", "bitsandbytes", "mxfp4", "x")),
    (quantised("compressed-tensors"), "quant_method 'compressed-tensors'.*bfloat16"),
    (folder_of("pytorch_model.bin"), "has 'pytorch_model.bin' but no config.json"),
    (folder_of("model.pt"), "is a pickle.*save_pretrained"),
    (file("consolidated.00.pth"), "Meta's layout"),
    (folder_of("consolidated.00.pth", "params.json"), "Meta's layout"),
    (folder_of("mp_rank_00/model_optim_rng.pt"), "Megatron's legacy format.*torch_dist"),
    (folder_of("mp_rank_00_001/model_optim_rng.pt"), "Megatron's legacy format"),
    (
        folder_of("latest_checkpointed_iteration.txt", "iter_0000010/.metadata"),
        "one iteration, such as iter_",
    ),
    (folder_of("zero_to_fp32.py", "latest"), "DeepSpeed"),
    (folder_of("model_config.yaml", "model_weights/x"), "NeMo 1"),
    (folder_of("tf_model.h5"), "another framework's"),
    (folder_of("pytorch_model_fsdp_0/.metadata"), "sharded checkpoint of FSDP.*merge-weights"),
    (
        folder_of(".metadata", "__0_0.distcp"),
        r"no metadata\.json: .*a sharded checkpoint of FSDP must be gathered",
    ),
    (zarr, "sharded_backend 'zarr', expected 'torch_dist'"),
    (
        folder_of("blobs/0", "refs/main", "snapshots/1a2b/config.json"),
        "no checkpoint itself: .*snapshots/1a2b'",
    ),
    (folder_of("checkpoint-5/config.json", "runs/x"), "no checkpoint itself: .*checkpoint-5'$"),
    (file("blob", b"GGUF" + bytes(600)), "GGUF or GGML file"),
    (file("blob", bytes(257) + b"ustar" + bytes(300)), "is an archive"),
    (lambda _: Path("s3://bucket/model"), "is an address, not a folder"),
    *(
        (model_with(**{name.replace(".", "__"): POINTER}), f"{name}' is a git-lfs pointer")
        for name in (
            "tokenizer.json",
            "tokenizer_config.json",
            "merges.txt",
            "vocab.json",
            "generation_config.json",
        )
    ),
    (model_with(LICENSE=POINTER), "LICENSE' is a git-lfs pointer"),
    (sharded(INDEX, POINTER), r"index\.json' is a git-lfs pointer"),
    (sharded("model-00002-of-00002.safetensors", POINTER), r"00002\.safetensors' is a git-lfs pointer"),
    *(
        (nemo(name, POINTER), f"{name}' is a git-lfs pointer")
        for name in (
            "weights/.metadata",
            "weights/metadata.json",
            "weights/common.pt",
            "weights/__0_0.distcp",
        )
    ),
    *(
        (nemo(name, POINTER), f"{name}' is a git-lfs pointer")
        for name in ("context/config.json", "context/model.yaml", "context/io.json", "skymoe_receipt.json")
    ),
    (model_with(model__safetensors=PAGE * 9), "is a web page, not the file itself.*logged in"),
    (model_with(config__json=PAGE), "is a web page"),
    (sharded("model-00002-of-00002.safetensors"), "00002.safetensors' named by .* download or copy it anew"),
    (sharded(INDEX), "has 'model-00001-of-00002.safetensors' but no 'model.safetensors.index.json'"),
    (folder_of("model.safetensors"), r"has 'model\.safetensors' but no config\.json"),
    (folder_of("ggml-model-q4_0.bin"), "GGML file"),
    (file("blob", b"tjgg" + bytes(600)), "GGML file"),
    (renamed(lambda name: f"base_model.model.{name}.lora_A.weight"), r"adapter \(LoRA\), .*merge_and_unload"),
    (
        renamed(lambda name: f"base_model.model.{name}"),
        r"begin with 'base_model\.model\.', as a wrapper .*unwrap",
    ),
    (renamed(lambda name: f"module.{name}"), r"begin with 'module\.', as a wrapper"),
    (renamed(lambda name: f"_orig_mod.{name}"), r"begin with '_orig_mod\.', as a wrapper"),
    (renamed(lambda name: name.removeprefix("model.")), "the inner model was saved, without its head"),
    *(
        (with_tensor(f"model.layers.0.mlp.up_proj.{name}"), f"quantised as {method}")
        for name, method in (
            ("qzeros", "GPTQ or AWQ"),
            ("weight.quant_map", "bitsandbytes"),
            ("weight_scale_2", "NVFP4"),
            ("scales", "MLX"),
            ("codes", "AQLM"),
            ("W_q", "HQQ"),
            ("weight._data", "quanto"),
        )
    ),
    (cast(torch.int8), "_proj.weight' in .* is int8, as of a quantiser: .*bfloat16"),
    (model_with({"quantization": {"bits": 4}}), r"quantization is \{'bits': 4\}, expected none"),
    *(
        (folder_of("config.json", name), "another framework's|architectures is None")
        for name in (
            "model.onnx",
            "onnx/model.onnx",
            "flax_model.msgpack",
            "tf_model.h5",
            "rust_model.ot",
            "x.keras",
        )
    ),
    *(
        (folder_of(name), "another framework's")
        for name in ("saved_model.pb", "model.ckpt.index", "openvino_model.xml")
    ),
    (folder_of("consolidated.safetensors", "params.json"), "Mistral's own layout"),
    (folder_of("bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"), "DeepSpeed"),
    (folder_of("global_step5/x", "rng_state_0.pth", "trainer_state.json"), "DeepSpeed"),
    (folder_of("mp_rank_00/distrib_optim.pt"), "Megatron's legacy format"),
    (folder_of("pytorch_model_fsdp.bin"), "sharded checkpoint of FSDP"),
    (folder_of("step-10/.metadata"), "no checkpoint itself: .*step-10'"),
    (folder_of("models/mine/config.json"), "no checkpoint itself: .*models/mine'"),
    (folder_of("models--a--b/snapshots/1a2b/config.json"), "no checkpoint itself: .*snapshots/1a2b'"),
    (folder_of("readme.txt"), r"is no checkpoint: expected config\.json"),
    (lambda folder: folder, r"it is empty: expected config\.json"),
    (nemo("weights/metadata.json"), r"no metadata\.json: if it is Megatron's, copy that file anew"),
    (nemo("weights/__3_0.distcp"), "download or copy it anew"),
    (model_with(**{"__journal": b""}), "a command has not finished here: run the same command again"),
    (file("__0_0.distcp", b"PK\x03\x04" + bytes(600)), "one file of a checkpoint"),
    (file("config.json"), "is a file: give the folder"),
    (file("model.safetensors"), "one file of a model: give its folder"),
    (file("last.ckpt"), "is a pickle"),
]
