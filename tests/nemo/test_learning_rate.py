"""Learning rates by step and by kind of parameter."""

import pytest
import torch
from torch.optim.lr_scheduler import LRScheduler

from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.nemo.learning_rate import LearningRateSchedule, is_expert_parameter
from tests.cases import every


def test_cosine_against_torchs() -> None:
    peak, end, warmup, steps = 2.0, 0.5, 3, 20
    schedule = LearningRateSchedule("cosine", warmup, steps, end / peak)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - warmup, eta_min=end)
    # NeMo's warm-up: the first step is not for nothing, the peak is one step after the last of it.
    assert [schedule.factor(step) for step in range(warmup + 1)] == [0.25, 0.5, 0.75, 1.0]
    for step in range(warmup, steps + 1):
        assert peak * schedule.factor(step) == pytest.approx(cosine.get_last_lr()[0])
        optimizer.step()
        cosine.step()
    assert schedule.factor(steps + 5) == end / peak


def test_linear_then_to_zero() -> None:
    schedule = LearningRateSchedule("linear", 0, 310, 0.1, decay_steps=10)
    factors = [schedule.factor(step) for step in (0, 150, 300, 305, 310, 311)]
    assert factors == pytest.approx([1.0, 0.55, 0.1, 0.05, 0.0, 0.0])


def test_constant_has_a_warm_up_only() -> None:
    schedule = LearningRateSchedule("constant", 1, 10)
    assert [schedule.factor(step) for step in (0, 1, 5, 10)] == [0.5, 1.0, 1.0, 1.0]


def test_groups_keep_their_proportion_to_the_end_and_through_a_resume() -> None:
    def begin(max_steps: int) -> tuple[torch.optim.Optimizer, LRScheduler]:
        groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (4.0, 1.0)]
        schedule = LearningRateSchedule("linear", 0, max_steps, 0.1)
        optimizer = torch.optim.SGD(groups)
        return optimizer, schedule.scheduler(None, optimizer)["lr_scheduler"]["scheduler"]

    def steps(
        optimizer: torch.optim.Optimizer, scheduler: LRScheduler, count: int
    ) -> list[tuple[float, ...]]:
        seen = []
        for _ in range(count):
            optimizer.step()
            scheduler.step()
            seen.append(tuple(scheduler.get_last_lr()))
        return seen

    whole = steps(*begin(10), 10)
    assert [first / second for first, second in whole] == pytest.approx([4.0] * 10)
    assert whole[-1] == pytest.approx((0.4, 0.1))
    _, cut = (first := begin(10))
    assert steps(*first, 4) == whole[:4]
    resumed = begin(10)
    resumed[1].load_state_dict(cut.state_dict())
    resumed[0].load_state_dict(first[0].state_dict())
    assert steps(*resumed, 6) == whole[4:]


@every(
    ("arguments", "message"),
    [
        ({"shape": "step"}, "shape is 'step', expected one of cosine, linear, constant"),
        ({"final_fraction": 1.5}, "final_fraction is 1.5, expected 0 to 1"),
        ({"warmup_steps": -1}, "warmup_steps is -1 and decay_steps 0, expected no negative number"),
    ],
)
def test_bad_values_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        LearningRateSchedule(**arguments)


@every(
    ("name", "expected"),
    [
        ("module.module.decoder.layers.0.mlp.experts.local_experts.3.linear_fc1.weight", True),
        ("module.module.decoder.layers.0.mlp.experts.linear_fc2.weight7", True),
        ("module.module.decoder.layers.0.mlp.shared_experts.linear_fc1.weight", False),
        ("module.module.decoder.layers.0.mlp.router.weight", False),
        ("module.module.decoder.layers.0.mlp.linear_fc1.weight", False),
    ],
)
def test_experts_are_the_routed_ones(name: str, expected: bool) -> None:
    assert is_expert_parameter(name, torch.nn.Parameter(torch.zeros(1))) == expected
