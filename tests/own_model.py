"""A Llama that no recipe of the report can start from, its corpus, and the job that trains it through either front door."""

from pathlib import Path
from typing import Any

from nemo_skymoe.data.corpus import build_corpus
from tests.checkpoint import hf_models

VOCABULARY = 512
LLAMA: dict[str, Any] = {
    "rope_theta": 5e5, "rms_norm_eps": 1e-2, "tie_word_embeddings": True, "num_key_value_heads": 2, "head_dim": 24,
    "vocab_size": VOCABULARY,
}  # fmt: skip
JOB: dict[str, Any] = {
    "precision": "32", "num_gpus_per_node": 1, "max_steps": 1, "global_batch_size": 2, "micro_batch_size": 2,
    "seq_length": 48, "warmup_steps": 0,
}  # fmt: skip


def make_llama_and_corpus(folder: Path) -> Path:
    """Write both into `folder`, and return the folder of the Llama."""
    hf_models.llama(folder / "llama", **LLAMA)
    build_corpus(folder / "corpus", VOCABULARY, 0.3, files=["argparse.py", "typing.py", "ast.py"])
    return folder / "llama"
