"""The CPU's Adam against torch's, its count in the parameter group."""

import copy

import torch

from nemo_skymoe.patches.cpu_adam import FusedAdam
from tests.cases import every


@every("step", [None, 0, 3])
def test_it_goes_on_from_a_groups_count(step: int | None) -> None:
    """None is what Megatron-Core 0.14 writes to every group before the first step, on its way to load a checkpoint."""
    ours, torchs = (torch.nn.Parameter(torch.tensor([1.0, -2.0])) for _ in range(2))
    optimizers = FusedAdam([ours], lr=0.1), torch.optim.AdamW([torchs], lr=0.1, weight_decay=0)
    moments = {"exp_avg": torch.tensor([0.5, 0.1]), "exp_avg_sq": torch.tensor([0.2, 0.3])}
    for optimizer in optimizers:
        state = optimizer.state_dict()
        state["state"] = {0: copy.deepcopy(moments)}
        if isinstance(optimizer, FusedAdam):
            state["param_groups"][0]["step"] = step
        else:
            state["state"][0]["step"] = torch.tensor(float(step or 0))
        optimizer.load_state_dict(state)
    for parameter, optimizer in zip((ours, torchs), optimizers, strict=True):
        parameter.grad = torch.tensor([0.3, -0.7])
        optimizer.step()
    assert torch.equal(ours, torchs)
    assert optimizers[0].param_groups[0]["step"] == (step or 0) + 1
