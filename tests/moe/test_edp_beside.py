"""EDP beside data, pipeline, virtual pipeline and context parallelism, per-token losses and the distributed optimizer."""

import functools
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from torch import Tensor, distributed

from nemo_skymoe.ranks import run_ranks
from tests.cases import every
from tests.moe import edp_worlds
from tests.moe.edp_worlds import Case
from tests.moe.worlds import Layout, Training, groups, in_world, relative_errors

DISPATCHERS = ("replicated", "allgather", "alltoall")
PER_TOKEN = {"calculate_per_token_loss": True}
Key = tuple[Layout, str, bool]
CASES: dict[int, list[Key]] = {
    2: [(Layout(tp=2, ep=2), name, True) for name in DISPATCHERS],
    4: [(Layout(tp=2, ep=2, pp=2, vpp=2), name, False) for name in DISPATCHERS]
    + [(Layout(tp=2, ep=2), "replicated", False), (Layout(tp=2, ep=2), "alltoall", True)]
    + [(Layout(tp=2, ep=2, cp=2), name, True) for name in DISPATCHERS],
}


def gradients(layout: Layout, dispatcher: str, per_token: bool) -> dict[str, Tensor]:
    """Of two micro-batches through Megatron's schedule."""
    options = {"moe_z_loss_coeff": 0.3, "moe_edp": True, "edp_dispatcher": dispatcher}
    options |= {"sequence_parallel": layout.tp > 1 and dispatcher != "replicated"}
    with groups(layout):
        training = Training(layout, num_layers=4, **options, **(PER_TOKEN if per_token else {}))
        training.run()
        return training.gradients()


def all_gradients(keys: list[Key]) -> list[dict[str, Tensor]]:
    return [gradients(*key) for key in keys]


@functools.cache
def results(world_size: int) -> dict[Key, dict[str, Tensor]]:
    keys = CASES.get(world_size) or [(Layout(), "auto", per_token) for per_token in (False, True)]
    return dict(zip(keys, run_ranks(in_world, world_size, all_gradients, keys)[0], strict=True))


@every(
    ("world_size", "key"),
    [(size, key) for size, keys in CASES.items() for key in keys],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, tuple) else str(value),
)
def test_gradients_are_those_of_one_rank(world_size: int, key: Key):
    errors = relative_errors(results(world_size)[key], results(1)[Layout(), "auto", key[2]])
    assert {name: error for name, error in errors.items() if not error <= 1e-10} == {}


def losses_of_training(case: Case) -> list[float]:
    """Three steps of Adam in float32, its state spread over data parallelism."""
    edp_worlds.start_world()
    with edp_worlds.layout(case):
        model = edp_worlds.build(case)
        ddp = DistributedDataParallel(
            model.config, DistributedDataParallelConfig(use_distributed_optimizer=True), model
        )
        config = OptimizerConfig(optimizer="adam", lr=1e-2, use_distributed_optimizer=True)
        optimizer: Any = get_megatron_optimizer(config, [ddp])
        losses = []
        for _ in range(3):
            ddp.zero_grad_buffer()
            optimizer.zero_grad()
            loss = edp_worlds.loss(edp_worlds.forward(ddp, case, 0, 2), case, 0, 2)
            loss.backward()
            finalize_model_grads([ddp])
            assert optimizer.step()[0]
            # Each rank has the share of its part of the vocabulary; data-parallel ranks see the same batch.
            total = loss.detach().clone()
            distributed.all_reduce(total)
            losses.append(total.item() * case.n / distributed.get_world_size())
        return losses


@every("dispatcher", DISPATCHERS)
def test_with_the_distributed_optimizer_it_learns_what_one_rank_learns(dispatcher: str):
    expected = run_ranks(losses_of_training, 1, Case(1, "auto", dtype=torch.float32))[0]
    found = run_ranks(losses_of_training, 4, Case(2, dispatcher, dtype=torch.float32))
    assert found == [pytest.approx(expected, rel=1e-4)] * 4
    assert expected[2] < 0.9 * expected[0]
