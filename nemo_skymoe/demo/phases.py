"""The demo's phases. Each is a function that runs on every rank of a world of its own."""

import resource
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from nemo_skymoe.checkpoint import convert
from nemo_skymoe.checkpoint.convert import TargetOptions
from nemo_skymoe.checkpoint.sources import open_source
from nemo_skymoe.checkpoint.upcycling.options import BASE, Upcycling
from nemo_skymoe.data.corpus import Corpus, validation_batches
from nemo_skymoe.demo.door import Door, door_of
from nemo_skymoe.demo.progress import Bar
from nemo_skymoe.experiments.demonstration import SKYWORK_MOE_TINY

SEQUENCE = 256
BATCH = 8
BATCHES = 16


def train(frontdoor: str, recipe: Any, title: str, later: float = 0.0) -> dict[str, Any]:
    """Run a recipe, and return this rank's peak memory in bytes and the mesh that it trained on.

    `progress.Bar` explains `later`.
    """
    mesh = door_of(frontdoor).train(recipe, Bar(title, later))
    return {"memory": peak_memory(), "mesh": mesh}


def upcycle_and_compare(frontdoor: str, corpus: Corpus, dense: Path, moe: Path) -> dict[str, float]:
    """Upcycle `dense` to `moe`, and return the losses on held-out text before the first step."""
    door = door_of(frontdoor)
    door.start_single_rank()
    experts = SKYWORK_MOE_TINY.num_moe_experts
    assert experts is not None
    if distributed.get_rank() == 0:
        options = Upcycling(experts, SKYWORK_MOE_TINY.moe_router_topk)
        convert.plan({BASE: open_source(dense)}, TargetOptions(door.FORMAT), options).run(moe)
    distributed.barrier()
    return held_out_losses(door, corpus, dense, moe)


def compare(frontdoor: str, corpus: Corpus, dense: Path, moe: Path) -> dict[str, float]:
    """Return the losses on held-out text of two trained checkpoints."""
    door = door_of(frontdoor)
    door.start_single_rank()
    return held_out_losses(door, corpus, dense, moe)


def held_out_losses(door: Door, corpus: Corpus, dense: Path, moe: Path) -> dict[str, float]:
    """Return the mean loss per token of a dense checkpoint, and of an MoE without dropping and at its capacity factor.

    Every rank takes its share of the batches, with whole models.
    """
    rank, world = distributed.get_rank(), distributed.get_world_size()
    assert BATCHES % world == 0, f"{BATCHES} batches on {world} ranks"
    models: dict[str, tuple[Path, dict[str, Any]]] = {
        "dense": (dense, {"experts": False}),
        "MoE, nothing dropped": (moe, {"experts": True}),
        "MoE, capacity factor 1.25": (moe, {"experts": True, "capacity_factor": 1.25}),
    }
    losses = [
        mean_loss(
            door.load(checkpoint, corpus.vocab_size, **options),
            islice(validation_batches(corpus, SEQUENCE, BATCH, BATCHES), rank, None, world),
        )
        for checkpoint, options in models.values()
    ]
    device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    total = torch.tensor(losses, dtype=torch.float64, device=device)
    distributed.all_reduce(total)
    return dict(zip(models, (total / world).tolist(), strict=True))


@torch.no_grad()
def mean_loss(model: torch.nn.Module, batches: Iterable[dict[str, torch.Tensor | None]]) -> float:
    """Compute the mean cross-entropy per token over all batches, in nats."""
    model.eval()
    device = next(model.parameters()).device
    total, tokens = 0.0, 0
    for batch in batches:
        there = {name: None if value is None else value.to(device) for name, value in batch.items()}
        losses = model(
            input_ids=there["tokens"],
            position_ids=there["position_ids"],
            attention_mask=there["attention_mask"],
            labels=there["labels"],
        )
        total += float(losses.double().sum())
        tokens += losses.numel()
    return total / tokens


def peak_memory() -> int:
    """Return the largest resident size of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
