"""Replicas that disagree and partners that die: said with the layer and the group, not trained on."""

import os
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from torch import distributed

from nemo_skymoe.moe import expert_group
from nemo_skymoe.moe.dispatch_replicated import RoutingDiverged
from nemo_skymoe.moe.expert_group import CollectiveFailed
from nemo_skymoe.patches import cpu_runtime
from nemo_skymoe.ranks import run_ranks
from tests.cases import every
from tests.moe import edp_worlds
from tests.moe.edp_crafted import (
    EXPERTS,
    HIDDEN,
    TOKENS,
    config_for,
    dispatch_and_combine,
    dispatcher_for,
    start,
    top_weights,
)
from tests.waiting import wait_until


def diverging(interval: int, calls: int) -> list[str]:
    """Rank 1 routes its second micro-batch otherwise; what each call said."""
    start(2)
    dispatcher = dispatcher_for(config_for("replicated", 2, edp_replica_check_interval=interval))
    said = []
    for call in range(calls):
        generator = torch.Generator().manual_seed(call)
        scores = torch.randn(TOKENS, EXPERTS, generator=generator, dtype=torch.float64)
        if call >= 1 and distributed.get_rank() == 1:
            scores[3] = scores[3].roll(1)
        try:
            dispatcher.dispatch_preprocess(torch.ones(TOKENS, 1, HIDDEN), scores > 9, top_weights(scores))
            said.append("")
        except RoutingDiverged as error:
            said.append(str(error))
    return said


def test_replicas_that_route_differently_are_found_on_every_rank():
    for said in run_ranks(diverging, 2, 1, 2):
        assert said[0] == ""
        assert "MoE layer 7" in said[1] and "ranks [0, 1]" in said[1] and "its ranks [1]" in said[1]


def test_replicas_are_compared_at_the_interval_only():
    for said in run_ranks(diverging, 2, 3, 3):
        assert [bool(text) for text in said] == [False, False, True]
    assert run_ranks(diverging, 2, 0, 3)[0] == ["", "", ""]


def dying(how: str, folder: Path) -> str:
    """Rank 0 is told what happens when rank 1 dies, or stays away, before layer 7's second all-to-all."""
    told = folder / "told"
    cpu_runtime.apply()
    rank = int(os.environ["RANK"])
    if rank == 1 and how == "dies":
        # A process of its own, so that this one can report: `run_ranks` would end everyone at once.
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            return ""
    distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(2, expert_model_parallel_size=2, expert_tensor_parallel_size=1)
    dispatcher = dispatcher_for(config_for("alltoall", 2))
    weights = top_weights(torch.randn(TOKENS, EXPERTS, dtype=torch.float64))
    hidden = torch.ones(TOKENS, HIDDEN, dtype=torch.float64)
    dispatch_and_combine(dispatcher, hidden, weights)
    if rank == 1:
        if how == "dies":
            os._exit(1)
        wait_until("the word that rank 0 has given up", told.exists)
        return ""
    if how == "is late":  # Only from here on: a busy machine needs longer to get this far.
        group = parallel_state.get_tensor_model_parallel_group()
        distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=1), group)
    with pytest.raises(CollectiveFailed) as failure:
        dispatch_and_combine(dispatcher, hidden, weights)
    told.touch()
    return str(failure.value)


@every("how", ("dies", "is late"))
def test_a_rank_that_dies_ends_the_others_naming_layer_and_group(how: str, tmp_path: Path):
    said = run_ranks(dying, 2, how, tmp_path)[0]
    assert "MoE layer 7" in said and "EDP group of ranks [0, 1]" in said and "all-to-all" in said


def layer_names() -> list[str]:
    edp_worlds.start_world()
    case = edp_worlds.Case(1, "auto")
    with edp_worlds.layout(case):
        layers: list[Any] = list(edp_worlds.build(case).decoder.layers)
        return [str(layer.mlp.token_dispatcher.ranks) for layer in layers]


def test_a_dispatcher_knows_its_layers_number():
    names = run_ranks(layer_names, 1)[0]
    assert names == [f"MoE layer {number}, EDP group of ranks [0]" for number in (1, 2)]


class Group:
    """Stands in for a group of two ranks over NCCL."""

    def size(self) -> int:
        return 2

    def rank(self) -> int:
        return 0


class Work:
    """Stands in for the handle of a collective: waiting lets the device wait, and raises if told to."""

    def __init__(self) -> None:
        self.error: str | None = None

    def wait(self) -> None:
        if self.error:
            raise RuntimeError(self.error)


class End:
    """Stands in for an event behind a collective."""

    def __init__(self) -> None:
        self.reached = False

    def query(self) -> bool:
        return self.reached


@dataclass
class Device:
    """A GPU whose host runs ahead: collectives return at once, and what they do is seen later, if at all."""

    works: list[Work] = field(default_factory=list)
    ends: list[End] = field(default_factory=list)
    broken: bool = False

    def exchange(self, *_: Any, async_op: bool, **__: Any) -> Work:
        assert async_op
        if self.broken:
            raise RuntimeError("NCCL communicator was aborted on rank 0")
        self.works.append(Work())
        return self.works[-1]

    def end(self, _: Any) -> End:
        self.ends.append(End())
        return self.ends[-1]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()
    monkeypatch.setattr(distributed, "all_to_all_single", device.exchange)
    monkeypatch.setattr(distributed, "all_reduce", device.exchange)
    monkeypatch.setattr(distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(distributed, "get_process_group_ranks", lambda group: [0, 1])
    monkeypatch.setattr(expert_group, "end_on_device", device.end)
    return device


def layers() -> list[expert_group.ExpertGroup]:
    group: Any = Group()
    return [expert_group.ExpertGroup(group, lambda number=number: number) for number in (1, 2, 3)]


def test_a_failure_that_arrives_layers_later_names_the_collective_that_failed(device: Device):
    first, second, third = layers()
    first.all_to_all(torch.ones(2))
    second.all_to_all(torch.ones(2))
    device.ends[0].reached = True
    third.all_reduce(torch.ones(2))  # sees that the first has ended, and never the second
    device.broken = True
    for end in device.ends:
        end.reached = True  # an abort ends everything that a device waits for
    with pytest.raises(CollectiveFailed) as failure:
        third.all_reduce(torch.ones(2))
    said = str(failure.value)
    assert said.startswith("MoE layer 2, EDP group of ranks [0, 1]: all-to-all failed on rank 0"), said
    assert "noticed at MoE layer 3, EDP group of ranks [0, 1]: all-reduce" in said


def test_what_a_read_by_the_host_brings_is_put_down_to_what_it_waited_for(device: Device):
    first, second, third = layers()
    first.all_to_all(torch.ones(2))
    second.all_reduce(torch.ones(2))
    tensor: Any = SimpleNamespace(cpu=Work().wait)
    third.read(tensor)
    device.works[0].error = "unspecified launch failure"
    tensor.cpu = device.works[0].wait
    with pytest.raises(
        CollectiveFailed, match=r"^MoE layer 1, .* all-to-all failed .* noticed at MoE layer 3"
    ):
        third.read(tensor)


def test_waiting_for_one_half_names_it_beside_the_other(device: Device):
    (layer, *_) = layers()
    halves = [layer.begin_all_to_all(torch.ones(2)), layer.begin_all_reduce(torch.ones(2))]
    device.works[1].error = "timed out"
    device.ends.clear()
    halves[0].wait()
    device.ends[0].reached = True
    assert halves[0].has_ended()
    with pytest.raises(CollectiveFailed, match=r"^MoE layer 1, .*: all-reduce failed on rank 0, .*timed out"):
        halves[1].wait()


def test_what_is_remembered_of_a_collective_keeps_no_memory(device: Device):
    layer = layers()[0]
    result = layer.all_to_all(torch.ones(2))
    kept = [
        value for begun in layer._begun for value in vars(begun).values() if isinstance(value, torch.Tensor)
    ]
    assert len(layer._begun) == 1 and all(value.numel() == 0 for value in kept)
    device.ends[0].reached = True
    layer.all_to_all(result)
    assert len(layer._begun) == 1
