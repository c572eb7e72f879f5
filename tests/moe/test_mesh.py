"""EDP's meshes: live on four ranks, and against Megatron's rank generator for sizes that no test can start."""

from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.parallel_state import RankGenerator
from torch import distributed

from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.moe.mesh import (
    check_edp_groups,
    edp_device_meshes,
    edp_mesh_rows,
    mesh_table,
    report_mesh_rows,
)
from nemo_skymoe.patches import cpu_runtime
from nemo_skymoe.ranks import run_ranks
from tests.cases import every

ORDER = "tp-cp-ep-dp-pp"
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2-tp2": {},
    "pp2-tp2": {"pipeline_model_parallel_size": 2},
    "cp2-tp2": {"context_parallel_size": 2},
    "tp4": {"tensor_model_parallel_size": 4, "expert_model_parallel_size": 4},
    "pp before dp": {"pipeline_model_parallel_size": 2, "order": "tp-cp-ep-pp-dp"},
    "dp before tp": {"order": "dp-tp-ep-cp-pp"},
    "dp between": {"order": "tp-dp-ep-cp-pp"},
    "ETP unset": {"expert_model_parallel_size": 1, "expert_tensor_parallel_size": None},
    "EP 4": {"expert_model_parallel_size": 4},
}
REFUSED = {
    "dp between": "group to be the tensor-parallel group",
    "ETP unset": "group to be the tensor-parallel group",
    "EP 4": "group to be the tensor-parallel group",
}


def observe_layouts() -> dict[str, Any]:
    """What this rank sees in every layout, in one world."""
    cpu_runtime.apply()
    distributed.init_process_group("gloo")
    seen = {}
    for name, sizes in LAYOUTS.items():
        edp = {
            "tensor_model_parallel_size": 2,
            "expert_model_parallel_size": 2,
            "expert_tensor_parallel_size": 1,
        }
        parallel_state.initialize_model_parallel(**{**edp, **sizes})
        seen[name] = observe()
        parallel_state.destroy_model_parallel()
    return seen


def observe() -> dict[str, Any]:
    groups = len(distributed.distributed_c10d._world.pg_map)
    try:
        attention, experts = edp_device_meshes("cpu")
    except ConfigurationError as error:
        return {"refused": str(error)}
    return {
        "new groups": len(distributed.distributed_c10d._world.pg_map) - groups,
        "names": (attention.mesh_dim_names, experts.mesh_dim_names),
        "meshes": (attention.mesh.tolist(), experts.mesh.tolist()),
        "same groups": [
            attention.get_group("tp") is parallel_state.get_tensor_model_parallel_group(),
            attention.get_group("pp") is parallel_state.get_pipeline_model_parallel_group(),
            attention.get_group("dp") is parallel_state.get_data_parallel_group(with_context_parallel=True),
            experts.get_group("ep") is parallel_state.get_expert_model_parallel_group(),
            experts.get_group("dp") is parallel_state.get_expert_data_parallel_group(),
        ],
        "built once": edp_device_meshes("cpu")[0] is attention,
        "place": (attention.get_coordinate(), experts.get_coordinate()),
        "rows": edp_mesh_rows(),
    }


@pytest.fixture(scope="module")
def seen() -> list[dict[str, Any]]:
    return run_ranks(observe_layouts, 4)


@every("name", [name for name in LAYOUTS if name not in REFUSED])
def test_meshes_are_views_of_megatrons_groups(seen: list[dict[str, Any]], name: str):
    for rank, here in enumerate(found[name] for found in seen):
        assert here["new groups"] == 0
        assert here["names"] == (("pp", "dp", "tp"), ("pp", "dp", "ep"))
        assert all(here["same groups"]) and here["built once"]
        assert here["meshes"][0] == here["meshes"][1]
        pp, dp, tp = here["place"][0]
        assert here["meshes"][0][pp][dp][tp] == rank
        assert here["place"][0] == here["place"][1]
        assert here["rows"] == seen[0][name]["rows"]


def test_the_meshes_of_two_layouts(seen: list[dict[str, Any]]):
    assert seen[0]["pp2-tp2"]["meshes"][0] == [[[0, 1]], [[2, 3]]]
    assert seen[0]["cp2-tp2"]["meshes"][0] == [[[0, 1], [2, 3]]]
    assert seen[0]["dp before tp"]["meshes"][0] == [[[0, 2], [1, 3]]]


@every("name", REFUSED)
def test_other_layouts_are_refused_on_every_rank(seen: list[dict[str, Any]], name: str):
    for rank, found in enumerate(seen):
        assert REFUSED[name] in found[name]["refused"]
        assert f"on rank {rank}" in found[name]["refused"]


def without_collectives() -> list[dict[str, int]]:
    """Meshes where no rank waits for another: every collective is refused."""
    cpu_runtime.apply()
    distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(2, expert_model_parallel_size=2, expert_tensor_parallel_size=1)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a collective")

    for name in (
        "all_gather_object",
        "all_gather",
        "all_gather_into_tensor",
        "all_reduce",
        "broadcast",
        "barrier",
    ):
        setattr(distributed, name, refuse)
        setattr(distributed.distributed_c10d, name, refuse)
    with torch.device("meta"):  # as models are built whose weights are loaded later
        edp_device_meshes("cpu")
    return edp_mesh_rows()


def test_meshes_are_built_without_a_collective() -> None:
    expected = [
        {"rank": rank, "pp": 0, "dp": rank // 2, "tp": rank % 2, "expert dp": rank // 2, "ep": rank % 2}
        for rank in range(4)
    ]
    assert run_ranks(without_collectives, 4) == [expected] * 4


def split_experts() -> None:
    cpu_runtime.apply()
    distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(2, expert_model_parallel_size=1)
    distributed.barrier()  # the first rank serves the store, without which the other's groups are not made
    pair: Any = parallel_state.get_tensor_model_parallel_group()
    with pytest.raises(ConfigurationError, match="expert_tensor_parallel_size=1, unset it is"):
        check_edp_groups(pair, pair)


def test_experts_split_over_ranks_are_refused():
    run_ranks(split_experts, 2)


@every("context", (1, 2))
@every(("pipeline", "data", "tensor"), [(1, 2, 2), (2, 4, 4), (12, 32, 4), (4, 8, 8)])
def test_reported_meshes_are_those_of_megatrons_rank_generator(
    pipeline: int, data: int, tensor: int, context: int
):
    """The report's cluster among them: PP 12, DP 32, EDP 4."""

    def places(size: int, *, tp: int = 1, ep: int = 1, dp: int = 1, cp: int = 1, axis: str) -> list[int]:
        groups = RankGenerator(tp, ep, dp, pipeline, cp, ORDER).get_ranks(axis)
        found = {rank: place for group in groups for place, rank in enumerate(group)}
        return [found[rank] for rank in range(size)]

    world = pipeline * data * tensor
    rows = report_mesh_rows(pipeline, data, tensor)
    attention = {"tp": tensor, "cp": context, "dp": data // context}
    expected = {
        "pp": places(world, axis="pp", **attention),
        "dp": places(world, axis="dp-cp", **attention),
        "tp": places(world, axis="tp", **attention),
        "EDP dp": places(world, axis="dp", ep=tensor, dp=data),
        "EDP ep": places(world, axis="ep", ep=tensor, dp=data),
        "ETP ep": places(world, axis="ep", tp=tensor, ep=data),
        "ETP etp": places(world, axis="tp", tp=tensor, ep=data),
        "EP ep": places(world, axis="ep", ep=data * tensor),
    }
    assert {name: [row[name] for row in rows] for name in expected} == expected
    assert [row["rank"] for row in rows] == list(range(world))


def test_the_table_is_aligned_and_has_a_line_a_rank():
    lines = mesh_table(report_mesh_rows(1, 5, 2)).splitlines()
    assert len(lines) == 11 and len({len(line) for line in lines}) == 1
    assert lines[0].split() == [
        "rank",
        "pp",
        "dp",
        "tp",
        "EDP",
        "dp",
        "EDP",
        "ep",
        "ETP",
        "ep",
        "ETP",
        "etp",
        "EP",
        "ep",
    ]
    assert lines[-1].split() == ["9", "0", "4", "1", "4", "1", "4", "1", "9"]


def test_meshes_default_to_the_device_there_is():
    def device() -> str:
        cpu_runtime.apply()
        distributed.init_process_group("gloo")
        parallel_state.initialize_model_parallel(1, expert_tensor_parallel_size=1)
        return edp_device_meshes()[0].device_type

    assert run_ranks(device, 1) == ["cuda" if torch.cuda.is_available() else "cpu"]
