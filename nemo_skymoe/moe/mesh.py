"""The device meshes of Expert Data Parallelism (appendix B.1): checks and views of Megatron's process groups.

Megatron uses "EDP" (and `expt_dp`) for the size of the expert-*data-parallel* group. Here EDP is the report's
Expert Data Parallelism: the expert-parallel group is the tensor-parallel group. This is a special case of what
Megatron calls MoE Parallel Folding.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from megatron.core import parallel_state
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from nemo_skymoe import gpus
from nemo_skymoe.config import ConfigurationError

ATTENTION = ("pp", "dp", "tp")
EXPERTS = ("pp", "dp", "ep")


def check_group_sizes(config: Any, **groups: ProcessGroup | None) -> None:
    """Refuse process groups whose sizes differ from the configuration's, because layers cut their weights by those.

    Args:
        config: The layer's configuration.
        groups: The group for each option of the configuration that is a size; None if there is no such group.

    Raises:
        ConfigurationError: A group has another size than its option says.
    """
    for option, group in groups.items():
        if group is not None and group.size() != getattr(config, option):
            unset = " (unset, it is tensor_model_parallel_size)" if option.startswith("expert_tensor") else ""
            raise ConfigurationError(
                f"{option} is {getattr(config, option)}, but Megatron's process groups were made for {group.size()}:"
                f" give the configuration and initialize_model_parallel the same {option}{unset}"
            )


def check_edp_groups(
    tensor: ProcessGroup | None = None,
    expert: ProcessGroup | None = None,
    expert_tensor: ProcessGroup | None = None,
) -> None:
    """Refuse process groups that are not EDP's, on the rank that finds them.

    Args:
        tensor: Tensor-parallel group of attention. Here and below, None stands for Megatron's own group.
        expert: Expert-parallel group, which must list the same ranks in the same order.
        expert_tensor: Tensor-parallel group within an expert, which must be this rank alone.

    Raises:
        ConfigurationError: The groups are not EDP's.
    """
    tensor = tensor or cast(ProcessGroup, parallel_state.get_tensor_model_parallel_group())
    expert = expert or cast(ProcessGroup, parallel_state.get_expert_model_parallel_group())
    expert_tensor = expert_tensor or cast(ProcessGroup, parallel_state.get_expert_tensor_parallel_group())
    ranks, experts = (torch.distributed.get_process_group_ranks(group) for group in (tensor, expert))
    if ranks != experts:
        raise ConfigurationError(
            f"moe_edp needs the expert-parallel group to be the tensor-parallel group, on rank"
            f" {torch.distributed.get_rank()} they are {experts} and {ranks}: use equal"
            " expert_model_parallel_size and tensor_model_parallel_size, expert_tensor_parallel_size=1 and an"
            " order in which no other axis comes between tp and ep"
        )
    if expert_tensor.size() > 1:
        raise ConfigurationError(
            f"moe_edp keeps every expert whole: the expert-tensor-parallel group has {expert_tensor.size()} ranks;"
            " initialise Megatron with expert_tensor_parallel_size=1, unset it is tensor_model_parallel_size"
        )


def edp_device_meshes(device_type: str | None = None) -> tuple[DeviceMesh, DeviceMesh]:
    """Return the attention mesh [pp, dp, tp] and the expert mesh [pp, dp, ep] over Megatron's own groups.

    They are built once per process, from the ranks of this rank's own groups: no collective runs, and no communicator
    is created. The axis dp contains context parallelism, as do the groups over which Megatron averages gradients.

    Args:
        device_type: "cuda" or "cpu"; None for "cuda" if it is available, else "cpu".

    Raises:
        ConfigurationError: The groups are not EDP's, or they do not lie in the world as the axes of a mesh.
    """
    check_edp_groups()
    stages = parallel_state.get_pipeline_model_parallel_group()
    attention = (
        stages,
        parallel_state.get_data_parallel_group(with_context_parallel=True),
        parallel_state.get_tensor_model_parallel_group(),
    )
    experts = (
        stages,
        parallel_state.get_expert_data_parallel_group(),
        parallel_state.get_expert_model_parallel_group(),
    )
    return _meshes(attention, experts, device_type or gpus.device())


@functools.lru_cache(maxsize=1)  # a process has one world at a time
def _meshes(
    attention: tuple[Any, ...], experts: tuple[Any, ...], device_type: str
) -> tuple[DeviceMesh, DeviceMesh]:
    return _mesh(attention, device_type, ATTENTION), _mesh(experts, device_type, EXPERTS)


def _mesh(groups: tuple[Any, ...], device_type: str, names: tuple[str, ...]) -> DeviceMesh:
    """Make the mesh in which every axis looks for all ranks as `groups` look for this one."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    axes = [
        # On the CPU also where models are built on the meta device.
        torch.tensor(torch.distributed.get_process_group_ranks(group), dtype=torch.int, device="cpu") - rank
        for group in groups
    ]
    ranks = rank + axes[0][:, None, None] + axes[1][None, :, None] + axes[2][None, None, :]
    if sorted(ranks.flatten().tolist()) != [*range(world)]:
        raise ConfigurationError(
            f"moe_edp needs process groups that are the axes of a mesh over all {world} ranks, on rank {rank} the axes"
            f" {', '.join(names)} make {ranks.tolist()}: use Megatron's initialize_model_parallel"
        )
    return DeviceMesh.from_group(list(groups), device_type, mesh=ranks, mesh_dim_names=names)


def edp_mesh_rows() -> list[dict[str, int]]:
    """Return each rank's place in the attention mesh [pp, dp, tp] and in the expert mesh [pp, expert dp, ep]."""
    attention, experts = (_places(mesh.mesh) for mesh in edp_device_meshes())
    return [
        {"rank": rank, "pp": pp, "dp": dp, "tp": tp, "expert dp": expert_dp, "ep": ep}
        for rank, ((pp, dp, tp), (_, expert_dp, ep)) in enumerate(zip(attention, experts, strict=True))
    ]


def _places(ranks: torch.Tensor) -> list[list[int]]:
    """Return the coordinates of each rank in a mesh of ranks, in the order of the ranks."""
    return ranks.ne(-1).nonzero()[ranks.flatten().argsort()].tolist()


def report_mesh_rows(pipeline: int, data: int, tensor: int) -> list[dict[str, int]]:
    """Compute the report's three expert meshes beside that of attention, from the sizes alone.

    The ranks are in Megatron's default order. The report compares three layouts of the experts within a pipeline
    stage. EP has Size_EP = Size_DP * Size_TP. ETP has Size_EP = Size_DP, and splits each expert over the
    tensor-parallel ranks. EDP has Size_EP = Size_TP, and replicates the experts over data parallelism.

    Args:
        pipeline: Number of pipeline stages.
        data: Data-parallel size, context parallelism included.
        tensor: Tensor-parallel size.

    Returns:
        One row per rank. `EDP dp` and `EDP ep` equal `dp` and `tp`, because both meshes are the same.
    """
    return [
        {
            "rank": rank,
            "pp": rank // (data * tensor),
            "dp": rank // tensor % data,
            "tp": rank % tensor,
            "EDP dp": rank // tensor % data,
            "EDP ep": rank % tensor,
            "ETP ep": rank // tensor % data,
            "ETP etp": rank % tensor,
            "EP ep": rank % (data * tensor),
        }
        for rank in range(pipeline * data * tensor)
    ]


def mesh_table(rows: Sequence[Mapping[str, int]]) -> str:
    """Format rows of `edp_mesh_rows` or `report_mesh_rows` as aligned text: a line of names, then one line per rank."""
    names = list(rows[0])
    lines = [names, *([str(row[name]) for name in names] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(names))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines
    )
