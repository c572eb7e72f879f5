"""The demo's phases. Each is a function that runs on every rank of a world of its own."""

import resource
from itertools import islice
from pathlib import Path
from typing import Any

import fiddle as fdl
import nemo_run as run
import torch
from torch import distributed

from nemo_skymoe.checkpoint import convert
from nemo_skymoe.checkpoint.convert import TargetOptions
from nemo_skymoe.checkpoint.sources import open_source
from nemo_skymoe.checkpoint.upcycling.options import BASE, Upcycling
from nemo_skymoe.data.corpus import Corpus, validation_batches
from nemo_skymoe.demo.output import redirect_output
from nemo_skymoe.demo.progress import TerminalProgress
from nemo_skymoe.moe.mesh import edp_mesh_rows
from nemo_skymoe.nemo.evaluate import load_model, mean_loss, start_single_rank
from nemo_skymoe.nemo.model import SkyworkMoETinyConfig, SkyworkTinyConfig
from nemo_skymoe.patches import nemo_cpu

SEQUENCE = 256
BATCH = 8
BATCHES = 16


def train(recipe: Any, title: str, terminal: int, log: Path, later: float = 0.0) -> dict[str, Any]:
    """Run a recipe, and return this rank's peak memory in bytes and the mesh that it trained on.

    `TerminalProgress` explains `later`.
    """
    redirect_output(log)
    nemo_cpu.apply()
    recipe.trainer.callbacks.append(run.Config(TerminalProgress, title=title, terminal=terminal, later=later))
    fdl.build(recipe)()
    return {"memory": peak_memory(), "mesh": edp_mesh_rows()}


def upcycle_and_compare(corpus: Corpus, dense: Path, moe: Path, log: Path) -> dict[str, float]:
    """Upcycle `dense` to `moe`, and return the losses on held-out text before the first step."""
    redirect_output(log)
    start_single_rank()
    config: Any = SkyworkMoETinyConfig()
    options = Upcycling(config.num_moe_experts, config.moe_router_topk, router_std=config.init_method_std)
    if distributed.get_rank() == 0:
        convert.plan({BASE: open_source(dense)}, TargetOptions("nemo"), options).run(moe)
    distributed.barrier()
    return held_out_losses(corpus, dense, moe)


def compare(corpus: Corpus, dense: Path, moe: Path, log: Path) -> dict[str, float]:
    """Return the losses on held-out text of two trained checkpoints."""
    redirect_output(log)
    start_single_rank()
    return held_out_losses(corpus, dense, moe)


def held_out_losses(corpus: Corpus, dense: Path, moe: Path) -> dict[str, float]:
    """Return the mean loss per token of a dense checkpoint, and of an MoE without dropping and at its capacity factor.

    Every rank takes its share of the batches, with whole models.
    """
    rank, world = distributed.get_rank(), distributed.get_world_size()
    assert BATCHES % world == 0, f"{BATCHES} batches on {world} ranks"
    models: dict[str, tuple[Any, Path]] = {
        "dense": (SkyworkTinyConfig(), dense),
        "MoE, nothing dropped": (SkyworkMoETinyConfig(moe_expert_capacity_factor=None), moe),
        "MoE, capacity factor 1.25": (SkyworkMoETinyConfig(moe_expert_capacity_factor=1.25), moe),
    }
    losses = [
        mean_loss(
            load_model(config, checkpoint, corpus.vocab_size),
            islice(validation_batches(corpus, SEQUENCE, BATCH, BATCHES), rank, None, world),
        )
        for config, checkpoint in models.values()
    ]
    total = torch.tensor(losses, dtype=torch.float64)
    distributed.all_reduce(total)
    return dict(zip(models, (total / world).tolist(), strict=True))


def peak_memory() -> int:
    """Return the largest resident size of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
