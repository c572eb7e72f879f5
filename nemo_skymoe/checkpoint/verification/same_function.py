"""Compare the function of two checkpoints: their logits on real text, each computed by its own framework."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_skymoe.checkpoint.formats import form_of
from nemo_skymoe.checkpoint.hugging_face import configuration
from nemo_skymoe.checkpoint.hugging_face.storage import SafetensorsStorage
from nemo_skymoe.checkpoint.run_folder import checkpoint_of, receipt_folder
from nemo_skymoe.checkpoint.sources import Source, open_source
from nemo_skymoe.checkpoint.verification.files import written_receipt
from nemo_skymoe.checkpoint.verification.hugging_face_tensors import HuggingFaceModel
from nemo_skymoe.durable.errors import CheckpointError, ConfigurationError

TOLERANCE = 1e-5
MOST_TOKENS = 512


@dataclass(frozen=True)
class LogitDifference:
    """max|difference| / max|logit| in float32."""

    relative: float
    tokens: int
    preserved: bool
    """Whether the conversion is one that keeps the function: noise, redrawn weights and specialists do not."""

    @property
    def problem(self) -> str | None:
        """The complaint, or None where nothing is wrong."""
        if self.relative <= TOLERANCE or not self.preserved:
            return None
        return f"the logits differ by {self.relative:.1e} of the largest, expected at most {TOLERANCE:.0e}"


def compare_logits(source: Path, target: Path, text: Path, config: Path | None = None) -> LogitDifference:
    """Compute both models on the beginning of a text. Both are held in memory in float32, one after the other.

    Args:
        source: The base.
        target: Written by skymoe, or the folder of a run whose last checkpoint was.
        text: UTF-8; read by the source's tokenizer, or byte by byte where it has none.
        config: The same as for `verify`.

    Raises:
        ConfigurationError: The text is empty, or its tokens are not of this vocabulary.
    """
    opened, target = open_source(source, config), checkpoint_of(target)
    token_ids = tokens_of(text, opened)
    expected = logits_of(checkpoint_of(source), token_ids, config)
    difference = (logits_of(target, token_ids) - expected).abs().max() / expected.abs().max()
    return LogitDifference(
        float(difference),
        token_ids.shape[1],
        preserves_function(written_receipt(receipt_folder(target))["job"]["upcycling"]),
    )


def preserves_function(upcycling: Mapping[str, Any] | None) -> bool:
    """Say whether the upcycled model computes what the dense one does."""
    if upcycling is None or upcycling["init"] in ("copy", "granular"):
        return True
    return (upcycling["noise"], upcycling["drop_ratio"]) in ((0, None), (None, 0))


def tokens_of(text: Path, source: Source) -> Tensor:
    """Token ids [1, tokens] of the beginning of a text."""
    content = text.read_bytes()
    ids = _encode(content, source.tokenizer)[: min(MOST_TOKENS, source.description.max_position_embeddings)]
    vocabulary = source.description.architecture.vocab_size
    if not ids or max(ids) >= vocabulary:
        raise ConfigurationError(
            f"'{text}' gives {f'token {max(ids)}' if ids else 'no tokens'}, expected some below {vocabulary:,}"
        )
    return torch.tensor([ids])


def _encode(content: bytes, folder: Path | None) -> list[int]:
    if folder is not None and (file := folder / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(file)).encode(content.decode(errors="replace")).ids
    if folder is not None and (file := folder / "tokenizer.model").is_file():
        from sentencepiece import SentencePieceProcessor

        return SentencePieceProcessor(model_file=str(file)).encode(content.decode(errors="replace"))
    return list(content)


def logits_of(folder: Path, token_ids: Tensor, config: Path | None = None) -> Tensor:
    """Logits [1, tokens, vocabulary] in float32: by transformers, or by Megatron for its own formats.

    Raises:
        CheckpointError: The weights have names, or a form of 8 bits, that transformers does not load.
    """
    if form_of(folder) == "hf":
        return _transformers_logits(folder, token_ids)
    from nemo_skymoe.checkpoint.verification.megatron_logits import megatron_logits

    return megatron_logits(folder, token_ids, config)


@torch.no_grad()
def _transformers_logits(folder: Path, token_ids: Tensor) -> Tensor:
    from transformers import AutoModelForCausalLM

    from nemo_skymoe.checkpoint.hugging_face.export.configuration_skywork import SkyworkConfig
    from nemo_skymoe.checkpoint.hugging_face.export.modeling_skywork import SkyworkForCausalLM

    SafetensorsStorage(folder)  # says how to make some of pickles
    description = configuration.read(folder)
    stored = HuggingFaceModel(folder, description.architecture)
    if stored.has_eight_bits:
        raise CheckpointError(
            f"'{folder}' holds weights of 8 bits, which transformers does not compute with here: convert it with --to hf,"
            " which widens them, and compare the logits of that result"
        )
    # No code of the folder, and no pickle.
    options: dict[str, Any] = {
        "torch_dtype": torch.float32,
        "output_loading_info": True,
        "trust_remote_code": False,
        "use_safetensors": True,
        "attn_implementation": "sdpa",  # whatever code from elsewhere the configuration names
    }
    kind: Any = AutoModelForCausalLM
    if description.family == "skywork":
        # The package's own classes: nothing in the folder is run.
        kind, options["config"] = SkyworkForCausalLM, SkyworkConfig.from_pretrained(folder)
    model, loaded = kind.from_pretrained(folder, **options)
    missing = set(loaded["missing_keys"])
    if stored.head_stands_for_both:
        # transformers looks for the embedding alone, and leaves it empty or random.
        model.get_input_embeddings().weight = torch.nn.Parameter(stored.tensor("embedding").float())
        model.tie_weights()
        missing -= {"model.embed_tokens.weight", "lm_head.weight"}
    if missing:
        raise CheckpointError(
            f"transformers does not find '{min(missing)}' in '{folder}': its logits cannot be computed"
        )
    return model.eval()(token_ids).logits.float()
