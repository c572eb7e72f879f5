"""The text: Python's standard library, tokenised by the model's own tokenizer."""

from __future__ import annotations

import json
import zlib
from typing import Any

import numpy as np
import torch

from benchmarks.paper import text
from benchmarks.real_model.commands import Workplace
from benchmarks.real_model.published import DENSE, END_OF_DOCUMENT
from nemo_skymoe.data.manifest import read_manifest
from nemo_skymoe.data.standard_library import read_sources

CORPUS, DOMAIN = "corpus", "code"
HELD_OUT = 0.03
"""Share of the documents, the last ones, on which nothing is trained."""
SEQUENCE = 128
SEQUENCES = 32
"""Sequences of held-out text on which losses are compared."""


def measure(place: Workplace) -> dict[str, Any]:
    """Write the corpus, and return its size."""
    # The last documents are held out: the order must not follow the alphabet.
    texts = sorted(read_sources().items(), key=lambda item: zlib.crc32(item[0].encode()))
    lines = [json.dumps({"text": content}) for _, content in texts]
    (place.folder / "standard_library.jsonl").write_text("\n".join(lines) + "\n")
    if not (place.folder / CORPUS).is_dir():
        place.run(
            "skymoe",
            "preprocess",
            f"{DOMAIN}=standard_library.jsonl",
            CORPUS,
            "--tokenizer",
            DENSE,
            "--end-of-document",
            END_OF_DOCUMENT,
        )
    found = read_manifest(place.folder / CORPUS)[DOMAIN]
    return {"documents": found.documents, "tokens": found.tokens, "bytes": found.text_bytes}


def held_out(place: Workplace) -> torch.Tensor:
    """Return tokens [SEQUENCES, SEQUENCE + 1] of the documents that the trainings keep for validation."""
    tokens = text.held_out(DOMAIN, HELD_OUT, SEQUENCES * SEQUENCE + 1, place.folder / CORPUS)
    begins = np.arange(SEQUENCES) * SEQUENCE
    return torch.from_numpy(np.stack([tokens[begin : begin + SEQUENCE + 1] for begin in begins]))
