"""Every small layout is either refused by name or has the gradients of one rank."""

import itertools
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from worlds import LENGTH, Layout, Training, groups, in_world, relative_errors

from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.ranks import run_ranks

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


def gradients(case: Case) -> dict[str, Tensor] | str:
    """The gradients, or the sentence in which the layout is refused."""
    try:
        with (
            groups(case.layout),
            mock.patch.object(torch.distributed, "all_gather", all_gather),
            mock.patch.object(torch.distributed, "reduce_scatter", reduce_scatter),
        ):
            training = Training(case.layout, 4, **case.options())
            training.run()
            return training.gradients()
    except ConfigurationError as reason:
        return str(reason)
    except ValueError as reason:
        # Megatron's own refusal, which its layer cannot give before it is called: it serves without.
        assert "without also enabling sequence parallelism" in str(reason), case
        return str(reason)


def errors_of(asked: list[Case], one: dict[str, Tensor]) -> list[tuple[Case, float | str]]:
    results: list[tuple[Case, float | str]] = []
    for case in asked:
        found = gradients(case)
        results.append((case, found if isinstance(found, str) else max(relative_errors(found, one).values())))
    return results


def check(world_size: int, asked: list[Case]) -> tuple[int, int]:
    """How many layouts are right and how many refused."""
    one = run_ranks(in_world, 1, gradients, Case(Layout(), False, "alltoall"))[0]
    assert len(one) > 2 * 8
    # Few layouts a world: the threads of gloo's groups stay until a process ends.
    worlds = [asked[first : first + 8] for first in range(0, len(asked), 8)]
    results = [
        result for some in worlds for result in run_ranks(in_world, world_size, errors_of, some, one)[0]
    ]
    wrong = [result for result in results if not isinstance(result[1], str) and not result[1] <= 1e-10]
    assert not wrong, "\n".join(map(str, wrong))
    refused = sum(isinstance(error, str) for _, error in results)
    return len(results) - refused, refused


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
    assert check(4, some)[0] == len(some)
