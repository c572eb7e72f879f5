"""A checkpoint of the toy MoE in Megatron's format, saved by all ranks and read back."""

from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from torch import distributed

from nemo_skymoe.selfcheck.finding import Finding
from nemo_skymoe.selfcheck.toy import toy
from nemo_skymoe.selfcheck.world import world


def check(folder: Path) -> list[Finding]:
    """Save the model in `folder`, read it into another, and compare every bit."""
    with world():
        ranks = distributed.get_world_size()
        sizes: dict[str, Any] = {
            "tensor_model_parallel_size": ranks,
            "expert_model_parallel_size": ranks,
            "expert_tensor_parallel_size": 1,
            "sequence_parallel": ranks > 1,
        }
        saved, read = (toy(torch.float32, moe_edp=True, **sizes) for _ in range(2))
        dist_checkpointing.save(saved.sharded_state_dict(), str(folder))
        for parameter in read.parameters():
            parameter.data.fill_(float("nan"))
        found: Any = dist_checkpointing.load(read.sharded_state_dict(), str(folder))
        read.load_state_dict(found)
        pairs = list(zip(saved.named_parameters(), read.parameters(), strict=True))
        differing = [name for (name, before), after in pairs if not torch.equal(before, after)]
    what = f"a checkpoint of {len(pairs)} tensors a rank, saved and read by {ranks} ranks"
    return [Finding("WRONG" if differing else "ok", what, f"{len(differing)} differ")]
