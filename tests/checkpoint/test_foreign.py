"""What is no checkpoint of a known format: each is recognised, and the sentence says what to do."""

import json
import logging
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from nemo_skymoe.architecture import Architecture
from nemo_skymoe.checkpoint import convert, hugging_face
from nemo_skymoe.checkpoint.convert import TargetOptions
from nemo_skymoe.checkpoint.description import Description
from nemo_skymoe.checkpoint.hf_config import from_hf_config
from nemo_skymoe.checkpoint.hf_files import to_hf_config
from nemo_skymoe.config import ConfigurationError

TINY = Architecture(1, 16, 8, 2, vocab_size=40)
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 5\n"
CONFIG = to_hf_config(Description(TINY))


def model(folder: Path, **config: Any) -> Path:
    folder.mkdir()
    tensors = {chunk.tensor: torch.zeros(chunk.shape) for chunk in hugging_face.chunks(TINY)}
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


def model_with(*, config: dict[str, Any] | None = None, **files: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        made = model(folder / "made", **(config or {}))
        for name, content in files.items():
            (made / name.replace("__", ".")).write_bytes(content)
        return made

    return make


def with_tensor(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        made = model(folder / "made")
        tensors = {chunk.tensor: torch.zeros(chunk.shape) for chunk in hugging_face.chunks(TINY)}
        save_file(tensors | {name: torch.zeros(1)}, made / "model.safetensors")
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
    return model_with(config={"quantization_config": {"quant_method": method, **more}})


FOREIGN: list[tuple[Callable[[Path], Path], str]] = [
    (model_with(model__safetensors=POINTER), r"model\.safetensors' is a git-lfs pointer.*git lfs pull"),
    (model_with(config__json=POINTER), r"config\.json' is a git-lfs pointer"),
    (model_with(tokenizer__model=POINTER), r"tokenizer\.model' is a git-lfs pointer"),
    (file("model.safetensors", POINTER), "is a git-lfs pointer"),
    (nemo_tar, r"model\.nemo' is a NeMo archive: unpack it"),
    (folder_of("model.nemo"), "is a NeMo archive"),
    (zipped, "is an archive: unpack it"),
    (file("m-Q4_K_M.GGUF"), "GGUF file .*give the safetensors"),
    (folder_of("config.json", "m.gguf"), "architectures|GGUF"),
    (folder_of("m-Q4.gguf"), "GGUF file"),
    (lambda _: Path("Skywork/Skywork-13B-base"), "hf download Skywork/Skywork-13B-base --local-dir"),
    (lambda _: Path("hf://Skywork/Skywork-13B-base"), "hf download Skywork/Skywork-13B-base --local-dir"),
    (lambda folder: folder / "nowhere", "nowhere' is not a folder$"),
    (folder_of("adapter_config.json", "adapter_model.safetensors"), r"adapter \(LoRA\).*merge_and_unload"),
    (model_with(adapter_config__json=b"{}"), r"adapter \(LoRA\).*merge_and_unload"),
    (model_with(adapter_model__safetensors=b""), r"adapter \(LoRA\).*merge_and_unload"),
    (quantised("fp8", weight_block_size=[128, 128]), "FP8 with a scale for each block: .*bfloat16"),
    (with_tensor("model.layers.0.mlp.up_proj.weight_scale_inv"), "block-scaled FP8"),
    (with_tensor("model.layers.0.mlp.up_proj.qweight"), "GPTQ or AWQ"),
    (with_tensor("model.layers.0.mlp.up_proj.weight.absmax"), "bitsandbytes in 4 bits"),
    (with_tensor("model.layers.0.mlp.experts.up_proj_blocks"), "MXFP4"),
    (model_with(quantize_config__json=b"{}"), "says that the weights are quantised"),
    *((quantised(m), f"quant_method '{m}'.*bfloat16") for m in ("gptq", "awq", "bitsandbytes", "mxfp4", "x")),
    (quantised("compressed-tensors"), "quant_method 'compressed-tensors'.*bfloat16"),
    (folder_of("pytorch_model.bin"), "is a pickle.*save_pretrained"),
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
    (folder_of(".metadata", "__0_0.distcp"), r"no metadata\.json, as a sharded checkpoint of FSDP"),
    (zarr, "sharded_backend 'zarr', expected 'torch_dist'"),
    (
        folder_of("blobs/0", "refs/main", "snapshots/1a2b/config.json"),
        "no checkpoint itself: .*snapshots/1a2b'",
    ),
    (folder_of("checkpoint-5/config.json", "runs/x"), "no checkpoint itself: .*checkpoint-5'$"),
    (file("blob", b"GGUF" + bytes(600)), "GGUF file"),
    (file("blob", bytes(257) + b"ustar" + bytes(300)), "is an archive"),
    (lambda _: Path("s3://bucket/model"), "is an address, not a folder"),
]


def test_each_is_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for number, (make, message) in enumerate(FOREIGN):
        (place := tmp_path / str(number)).mkdir()
        made = make(place)
        with pytest.raises(ConfigurationError, match=message):
            convert.plan({"base": convert.open_source(made)}, TargetOptions("nemo", layer_spec="local"))
    convert.open_source(model(tmp_path / "good"))


def test_harmless_fields_are_no_warning_and_others_are_refused(caplog: pytest.LogCaptureFixture):
    harmless: dict[str, Any] = {
        "unsloth_version": "2025.1",
        "tokenizer_class": "LlamaTokenizer",
        "router_aux_loss_coef": 0.01,
        "output_attentions": True,
        "use_sliding_window": False,
        "is_encoder_decoder": False,
        "final_logit_softcapping": None,
        "some_new_switch": False,
        "logits_scaling": 1.0,
        "head_dim": 8,
    }
    with caplog.at_level(logging.WARNING):
        from_hf_config(CONFIG | harmless)
    assert caplog.text == ""
    changing: dict[str, Any] = {
        "final_logit_softcapping": 30.0,
        "embedding_multiplier": 12.0,
        "shared_expert_intermediate_size": 64,
        "use_qk_norm": True,
        "some_new_multiplier": 2.0,
        "is_encoder_decoder": True,
        "rope_pct": 0.25,
        "rope_ratio": 2,
        "n_routed_experts": 8,
        "use_dynamic_ntk": True,
        "use_logn_attn": True,
        "logits_soft_cap": 30.0,
        "residual_scale": 2.0,
        "attention_sink_size": 4,
        "nope_layer_interval": 4,
        "vision_config": "x",
    }
    for name, value in changing.items():
        with pytest.raises(ConfigurationError, match=f"{name} is {value!r}"):
            from_hf_config(CONFIG | {name: value})


def test_part_of_a_head_is_refused_wherever_transformers_keeps_it():
    """transformers 5 has `partial_rotary_factor` among the `rope_parameters`."""
    whole = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}
    assert from_hf_config(CONFIG | {"rope_parameters": whole}).rope_theta == 1e4
    for kind in ({"rope_type": "default"}, {"rope_type": "linear", "factor": 2.0}):
        half = {**kind, "rope_theta": 1e4, "partial_rotary_factor": 0.5}
        with pytest.raises(ConfigurationError, match=r"partial_rotary_factor is 0\.5, expected 1"):
            from_hf_config(CONFIG | {"rope_parameters": half})
