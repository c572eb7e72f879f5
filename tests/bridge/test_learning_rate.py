"""Another learning rate for the experts, through Bridge's own optimizer: their first steps are that much longer."""

import functools
from typing import Any

import numpy
import pytest

from nemo_skymoe.bridge.learning_rate import ExpertLearningRate
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.moe import EXPERT_PARAMETERS
from nemo_skymoe.ranks import RankFailed, run_ranks
from tests.bridge.recorded import Recorder, start_alike, train
from tests.bridge.tiny import tiny_config, tiny_provider
from tests.moe.worlds import weight

MULTIPLIER = 4.0


def stepped(multiplier: float | None, edp: bool = False) -> dict[str, Any]:
    sizes = {
        "tensor_model_parallel_size": 2,
        "expert_model_parallel_size": 2,
        "expert_tensor_parallel_size": 1,
    }
    config = tiny_config(
        steps=1,
        model=tiny_provider(**({**sizes, "sequence_parallel": True} if edp else {})),
        overrides={"scheduler": {"start_weight_decay": 0.0, "end_weight_decay": 0.0}},
    )
    config.optimizer.weight_decay = 0.0
    if multiplier is not None:
        config.optimizer_config_override_provider = ExpertLearningRate(multiplier)
    start = functools.partial(start_everywhere)
    return train(config, Recorder(start=start)).weights


def start_everywhere(context: Any) -> None:
    """The same weights in the model and in the optimizer, which has copies of its own."""
    start_alike(context)
    context.optimizer.reload_model_params()


def test_only_experts_take_longer_steps():
    [plain], [same], [longer] = (run_ranks(stepped, 1, multiplier) for multiplier in (None, 1.0, MULTIPLIER))
    for name, found in plain.items():
        assert found.tobytes() == same[name].tobytes()
        start = weight(name, found.shape).float().numpy()
        steps, others = abs(found - start).max(), abs(longer[name] - start).max()
        assert steps > 0, name
        expected = MULTIPLIER if EXPERT_PARAMETERS in name else 1.0
        assert others / steps == pytest.approx(expected, rel=1e-3), name
    assert sum(EXPERT_PARAMETERS in name for name in plain) == 16


def test_experts_of_every_rank_take_them():
    """Under EDP the experts have an optimizer of their own."""
    plain, longer = run_ranks(stepped, 2, None, True), run_ranks(stepped, 2, MULTIPLIER, True)
    for before, after in zip(plain, longer, strict=True):
        differ = {name for name in before if not numpy.array_equal(before[name], after[name])}
        assert differ == {name for name in before if EXPERT_PARAMETERS in name} and len(differ) == 8


@pytest.mark.parametrize("multiplier", [0.0, -1.0, float("inf"), float("nan")])
def test_a_multiplier_that_makes_no_sense_is_refused(multiplier: float):
    with pytest.raises(ConfigurationError, match="expected a finite number above 0"):
        ExpertLearningRate(multiplier).finalize()
    with pytest.raises(RankFailed, match="expected a finite number above 0"):
        run_ranks(stepped, 1, multiplier)
