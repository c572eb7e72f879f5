"""A run that Bridge resumes continues bit for bit: losses, weights, optimizer and coefficients, from every kind of checkpoint."""

from pathlib import Path
from typing import Any

import pytest

import nemo_skymoe.bridge  # noqa: F401  (before Bridge is imported)
from nemo_skymoe.ranks import run_ranks
from tests.bridge.recorded import Record, same_bits, train
from tests.bridge.tiny import tiny_config, tiny_provider
from tests.cases import every

EDP = {
    "tensor_model_parallel_size": 2,
    "expert_model_parallel_size": 2,
    "expert_tensor_parallel_size": 1,
    "sequence_parallel": True,
}
STAGES = {"pipeline_model_parallel_size": 2}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {}),
    "edp": (2, EDP),
    "pipeline": (2, STAGES),
}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "in the background": {"async_save": True},
    "only the last two": {"most_recent_k": 2, "save_interval": 1},
    "reshardable": {"dist_ckpt_optim_fully_reshardable": True},
}


def run(
    ranks: int, model: dict[str, Any], folder: Path | None, steps: int, **checkpoint: Any
) -> list[Record]:
    def world() -> Record:
        config = tiny_config(
            folder, steps=steps, model=tiny_provider(**model), overrides={"checkpoint": checkpoint}
        )
        return train(config)

    return run_ranks(world, ranks)


@every(layout=list(LAYOUTS), kind=list(KINDS))
def test_a_resumed_run_is_the_run_left_alone(layout: str, kind: str, tmp_path: Path):
    ranks, model = LAYOUTS[layout]
    if layout != "one rank" and kind not in ("plain", "in the background"):
        pytest.skip("kinds are tried on one rank")
    alone = run(ranks, model, None, steps=5)
    first = run(ranks, model, tmp_path, steps=3, **KINDS[kind])
    second = run(ranks, model, tmp_path, steps=5, **KINDS[kind])
    for whole, part, rest in zip(alone, first, second, strict=True):
        assert (part.steps, rest.steps) == ([0, 1, 2], [3, 4])
        assert part.losses + rest.losses == whole.losses
        assert part.coefficients + rest.coefficients[1:] == whole.coefficients
        assert rest.coefficients[0] == part.coefficients[-1] != part.coefficients[0]
        assert same_bits(rest.weights, whole.weights)
        assert same_bits(rest.optimizer, whole.optimizer) and rest.optimizer
    if kind == "only the last two":
        assert sorted(path.name for path in tmp_path.glob("iter_*")) == ["iter_0000004", "iter_0000005"]
