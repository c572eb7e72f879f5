"""What models in Hugging Face's form compute, in transformers: logits beside the dense model's, and held-out losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

COMPARED = 2
"""Sequences whose logits are compared."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Return a model, with its own code where it has some."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=True).eval()


@torch.no_grad()
def logits(model: Any, tokens: Tensor) -> Tensor:
    """Return logits [sequences, length, vocabulary] in float32 of `tokens` [sequences, length]."""
    return torch.cat([model(row[None]).logits.float() for row in tokens])


def difference(found: Tensor, expected: Tensor) -> dict[str, float]:
    """Return the largest difference over the largest logit, and the share of logits that are equal to the bit."""
    return {
        "relative": float((found - expected).abs().max() / expected.abs().max()),
        "equal": float((found == expected).double().mean()),
    }


@torch.no_grad()
def loss(model: Any, tokens: Tensor) -> float:
    """Return the mean loss of `tokens` [sequences, length + 1], in nats a token."""
    losses = [
        cross_entropy(model(row[None, :-1]).logits[0].double(), row[1:], reduction="mean") for row in tokens
    ]
    return float(torch.stack(losses).mean())


def beside_dense(dense: Path, moe: Path, tokens: Tensor) -> dict[str, Any]:
    """Compare an MoE with the dense model: logits in both precisions, and losses of the held-out `tokens` in float32."""
    few = tokens[:COMPARED, :-1]
    found: dict[str, Any] = {}
    for name, dtype in DTYPES.items():
        model = load(dense, dtype)
        expected = logits(model, few)
        if dtype == torch.float32:
            found["dense loss"] = loss(model, tokens)
        model = load(moe, dtype)
        found[name] = difference(logits(model, few), expected)
        if dtype == torch.float32:
            found["loss"] = loss(model, tokens)
    return found
