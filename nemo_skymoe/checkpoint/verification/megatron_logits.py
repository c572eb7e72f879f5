"""Megatron itself computes the logits of a `torch_dist` checkpoint: its own code loads it into its own model."""

from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from torch import Tensor

from nemo_skymoe import gpus
from nemo_skymoe.checkpoint.description import Description
from nemo_skymoe.checkpoint.formats import open_torch_dist
from nemo_skymoe.checkpoint.torch_dist import names as torch_dist_names
from nemo_skymoe.checkpoint.torch_dist.pickle_check import check_checkpoint
from nemo_skymoe.checkpoint.torch_dist.storage import TorchDistStorage, weights_folder
from nemo_skymoe.checkpoint.verification.gpt_model import gpt_model, one_rank
from nemo_skymoe.ranks import run_ranks

_LONG = 7 * 86400.0
"""Seconds: a large model on a CPU takes what it takes."""


def megatron_logits(folder: Path, token_ids: Tensor, config: Path | None = None) -> Tensor:
    """Logits in float32, whatever the checkpoint's data type; the whole model is held in float32.

    By Megatron's own layers, whichever the checkpoint was made for; on a GPU where there is one. None of the tables
    that conversion uses is involved, except to find the model's sizes. Unless this process is a rank already, it
    happens in a process of its own: Megatron's groups leave threads behind, which a later fork would not survive.

    Args:
        folder: Checkpoint of NeMo 2 or Megatron-LM.
        token_ids: [batch, tokens].
        config: The same as for `open_torch_dist`.

    Returns:
        [batch, tokens, vocab_size], without the padding of the vocabulary.

    Raises:
        ConfigurationError: The same as from `open_torch_dist`, or the checkpoint names a class that no checkpoint needs.
    """
    _, description = open_torch_dist(folder, config)
    check_checkpoint(folder)
    storage = TorchDistStorage(folder)
    model = (folder, torch_dist_names.layout(storage), description, frozenset(storage.tensors))
    if torch.distributed.is_initialized():
        return _logits(token_ids, *model)
    [logits] = run_ranks(_logits, 1, token_ids, *model, timeout=_LONG)
    return logits


@torch.no_grad()
def _logits(
    token_ids: Tensor,
    folder: Path,
    saved: torch_dist_names.Layout,
    description: Description,
    stored: frozenset[str],
) -> Tensor:
    device = gpus.device()
    with one_rank():
        model = gpt_model(description, saved.padded_vocab_size, stacked=saved.stacked).to(device).eval()
        state: dict[str, Any] = {
            name: part
            for name, part in model.sharded_state_dict(prefix=saved.prefix).items()
            if not name.endswith("_extra_state")
        }
        embedding, head = (
            saved.prefix + name for name in (torch_dist_names.EMBEDDING, torch_dist_names.HEAD)
        )
        if description.architecture.tied_embeddings and head in stored and embedding not in stored:
            state[embedding].key = head  # the one that was saved stands for both
        loaded: Any = dist_checkpointing.load(state, str(weights_folder(folder)))
        found = {name.removeprefix(saved.prefix): loaded[name] for name in state}
        missing, unexpected = model.load_state_dict(found, strict=False)
        assert not [name for name in (*missing, *unexpected) if not name.endswith("_extra_state")]
        positions = torch.arange(token_ids.shape[1], device=device).expand_as(token_ids)
        logits = model(token_ids.to(device), positions, attention_mask=None)
    return logits[..., : description.architecture.vocab_size].float().cpu().clone()
