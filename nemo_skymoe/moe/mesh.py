"""Expert Data Parallelism's process groups (appendix B.1): Megatron's own, checked and shown.

Megatron's documentation uses "EDP" for the expert-*data-parallel* group; here it is the report's
Expert Data Parallelism, the layout in which the expert-parallel group is the tensor-parallel group.
"""

from typing import cast

import torch
from megatron.core import parallel_state
from torch.distributed import ProcessGroup

from nemo_skymoe.config import ConfigurationError


def check_edp_groups() -> None:
    """Refuse process groups that are not EDP's: on this rank EP and TP must list the same ranks in the same order."""
    tensor, expert = (
        torch.distributed.get_process_group_ranks(cast(ProcessGroup, group()))
        for group in (
            parallel_state.get_tensor_model_parallel_group,
            parallel_state.get_expert_model_parallel_group,
        )
    )
    if tensor != expert:
        raise ConfigurationError(
            f"moe_edp needs the expert-parallel group to be the tensor-parallel group, on rank"
            f" {torch.distributed.get_rank()} they are {expert} and {tensor}: use equal"
            " expert_model_parallel_size and tensor_model_parallel_size, expert_tensor_parallel_size=1 and an"
            " order in which no other axis comes between tp and ep"
        )


def edp_mesh_rows() -> list[dict[str, int]]:
    """One row a rank: its place in the attention mesh [pp, dp, tp] and in the expert mesh [pp, dp, ep]."""
    place = {
        "rank": torch.distributed.get_rank(),
        "pp": parallel_state.get_pipeline_model_parallel_rank(),
        "dp": parallel_state.get_data_parallel_rank(with_context_parallel=True),
        "tp": parallel_state.get_tensor_model_parallel_rank(),
        "expert dp": parallel_state.get_expert_data_parallel_rank(),
        "ep": parallel_state.get_expert_model_parallel_rank(),
    }
    rows: list[dict[str, int]] = [{} for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(rows, place)
    return rows
