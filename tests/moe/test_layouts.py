"""Every small layout is either refused by name or has the gradients of one rank."""

import itertools
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.ranks import run_ranks
from tests.moe.worlds import (
    LENGTH,
    Layout,
    Training,
    configuration,
    groups,
    in_world,
    local_part,
    on_ranks,
    parameters,
)

SHARED = {"moe_shared_expert_intermediate_size": 24, "moe_z_loss_coeff": 0.3}


@dataclass(frozen=True)
class Case:
    """A layout and who dispatches its tokens."""

    layout: Layout
    edp: bool
    dispatcher: str

    def options(self) -> dict[str, Any]:
        chosen = (
            {"edp_dispatcher": self.dispatcher}
            if self.edp
            else {"moe_token_dispatcher_type": self.dispatcher}
        )
        return {"moe_edp": self.edp, **chosen, **SHARED}


def cases(world_size: int) -> list[Case]:
    """All of them: tokens over TP and CP ranks, experts over EP and ETP ranks, data parallelism over the rest."""
    sizes = [size for size in (1, 2, 4) if size <= world_size]
    found = []
    for tp, cp, ep, etp in itertools.product(sizes, repeat=4):
        if world_size % (tp * cp) or world_size % (ep * etp) or LENGTH % (2 * tp * cp):
            continue
        layout = Layout(tp=tp, cp=cp, ep=ep, etp=etp)
        for sp in (False, True) if tp > 1 else (False,):
            placed = replace(layout, sp=sp)
            found += [Case(placed, False, name) for name in ("allgather", "alltoall")]
            found += [Case(placed, True, name) for name in ("auto", "replicated", "allgather", "alltoall")]
    return found


def all_gather(tensors: list[Tensor], tensor: Tensor, group: Any) -> None:
    """Of pieces of unequal size, which NCCL gathers and gloo refuses: Megatron's all-to-all with split experts."""
    for piece, rank in zip(tensors, torch.distributed.get_process_group_ranks(group), strict=True):
        if rank == torch.distributed.get_rank():
            piece.copy_(tensor)
        torch.distributed.broadcast(piece, src=rank, group=group)


def reduce_scatter(output: Tensor, pieces: list[Tensor], group: Any) -> None:
    """Likewise back."""
    for piece, rank in zip(pieces, torch.distributed.get_process_group_ranks(group), strict=True):
        total = piece.clone()
        torch.distributed.all_reduce(total, group=group)
        if rank == torch.distributed.get_rank():
            output.copy_(total)


def train(case: Case) -> Training:
    with (
        mock.patch.object(torch.distributed, "all_gather", all_gather),
        mock.patch.object(torch.distributed, "reduce_scatter", reduce_scatter),
    ):
        training = Training(case.layout, 4, **case.options())
        training.run()
        return training


def gradients() -> dict[str, Tensor]:
    """On one rank."""
    with groups():
        return train(Case(Layout(), False, "alltoall")).gradients()


def errors_of(asked: list[Case], one: dict[str, Tensor]) -> list[float]:
    """The worst |g - g1| / |g1| of what this rank holds, so that replicas which drift apart are seen too."""
    worst = []
    for case in asked:
        with groups(case.layout):
            held = {
                name: (parameter.main_grad, local_part(name, parameter, one[name]))
                for name, parameter in parameters(train(case).chunks).items()
            }
        worst.append(max(float((found - here).norm() / here.norm()) for found, here in held.values()))
    return worst


def is_refused(case: Case) -> bool:
    """By name, before there is a process group."""
    try:
        configuration(case.layout, **case.options()).check_training()
    except ConfigurationError:
        return True
    return overwrites_gathered_tokens(case)


def overwrites_gathered_tokens(case: Case) -> bool:
    """What the layer refuses with Megatron-Core 0.14, where a test below sees it do so."""
    old = not hasattr(MoELayer, "shared_experts_compute")
    return old and case.layout.sequence_parallel and not case.edp and case.dispatcher == "allgather"


@pytest.mark.skipif(hasattr(MoELayer, "shared_experts_compute"), reason="needs Megatron-Core 0.14")
@on_ranks(2)
def test_shared_experts_beside_the_all_gather_are_refused() -> None:
    layout = Layout(tp=2, ep=2)
    with groups(layout), pytest.raises(ConfigurationError, match="overwrites the gathered tokens"):
        train(Case(layout, False, "allgather"))


def check(world_size: int, asked: list[Case]) -> tuple[int, int]:
    """How many layouts are right and how many refused."""
    one = run_ranks(in_world, 1, gradients)[0]
    assert len(one) > 2 * 8
    accepted = [case for case in asked if not is_refused(case)]
    wrong = []
    for first in range(0, len(accepted), 8):  # every layout leaves threads of gloo behind in its world
        some = accepted[first : first + 8]
        by_rank = run_ranks(in_world, world_size, errors_of, some, one, timeout=600)
        errors = (max(of_ranks) for of_ranks in zip(*by_rank, strict=True))
        wrong += [pair for pair in zip(some, errors, strict=True) if not pair[1] <= 1e-10]
    assert not wrong, "\n".join(map(str, wrong))
    return len(accepted), len(asked) - len(accepted)


def test_two_ranks() -> None:
    right, refused = check(2, cases(2))
    assert right >= 10 and refused >= 10


@pytest.mark.long
def test_four_ranks() -> None:
    right, refused = check(4, cases(4))
    assert right >= 30 and refused >= 100


def test_some_of_four_ranks() -> None:
    """Data parallelism beside each way of spreading experts, and context parallelism under EDP."""
    some = [
        Case(Layout(tp=2, ep=2), False, "alltoall"),
        Case(Layout(tp=2, ep=2), True, "alltoall"),
        Case(Layout(tp=2, ep=2, sp=False), True, "replicated"),
        Case(Layout(tp=2, cp=2, ep=2), True, "allgather"),
        Case(Layout(tp=2, ep=2, etp=2), False, "allgather"),
        Case(Layout(tp=1, ep=2, etp=2), False, "alltoall"),
    ]
    some = [case for case in some if not overwrites_gathered_tokens(case)]
    assert check(4, some)[0] == len(some)
