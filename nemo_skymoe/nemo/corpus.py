"""NeMo's data module for the demonstration corpus of `data.corpus`."""
# NeMo-Run reads the signature of `corpus_data`: no `from __future__ import annotations`, and `Optional[str]`, because
# its command line cannot parse `str | None`.

from pathlib import Path
from typing import TYPE_CHECKING, Optional

from nemo_skymoe import gpus
from nemo_skymoe.data import held_out
from nemo_skymoe.data.corpus import load_corpus

if TYPE_CHECKING:
    from nemo.collections.llm.gpt.data.pre_training import PreTrainingDataModule


class HeldOutGPTDataset(held_out.HeldOutGPTDataset):
    """The dataset under the name by which checkpoints know it."""


def corpus_data(
    corpus: str,
    seq_length: int = 256,
    global_batch_size: int = 8,
    micro_batch_size: int = 4,
    num_workers: int = 0,
    seed: int = 1,
    index_cache: Optional[str] = None,
) -> "PreTrainingDataModule":
    """Return NeMo's pre-training data module for the corpus in the folder `corpus`, for `run.Config(corpus_data, ...)`.

    Samples run across document ends: neither positions nor attention are reset there. NeMo itself adds the attention
    mask that its forward step demands where Transformer Engine is missing.

    Args:
        corpus: Directory that `skymoe corpus` wrote.
        seq_length: Tokens per sample.
        global_batch_size: Samples per optimizer step.
        micro_batch_size: Samples per forward pass of one data-parallel rank.
        num_workers: Loader processes per rank; 0 loads in the training process.
        seed: Of the order of the training samples.
        index_cache: Folder for Megatron's sample indices; default: `index` in the corpus directory.

    Raises:
        ConfigurationError: `corpus` is missing or unfinished.
    """
    found = load_corpus(Path(corpus).expanduser().resolve())
    from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer
    from nemo.collections.llm.gpt.data.pre_training import PreTrainingDataModule

    train, valid = str(found.train_prefix), str(found.valid_prefix)
    cache = Path(index_cache) if index_cache else found.directory / "index"
    return PreTrainingDataModule(
        paths={"train": [train], "validation": [valid], "test": [valid]},
        split=None,  # type: ignore[arg-type]  # NeMo warns about any other value beside a dictionary of paths
        seq_length=seq_length,
        tokenizer=AutoTokenizer(str(found.tokenizer)),
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
        num_workers=num_workers,
        seed=seed,
        persistent_workers=num_workers > 0,
        pin_memory=gpus.in_use(),
        # Megatron names an index by its path, not by its content: a rebuilt corpus must not find the old one.
        index_mapping_dir=str(cache / found.fingerprint),
        dataset_cls=HeldOutGPTDataset,
    )
