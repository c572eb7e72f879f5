"""A run that Bridge resumes continues bit for bit: losses, weights, optimizer and coefficients, from every kind of checkpoint."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.serialization import load_common_state_dict
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

import nemo_skymoe.bridge  # noqa: F401  (before Bridge is imported)
from nemo_skymoe.patches import chained_optimizers
from nemo_skymoe.ranks import RankFailed, run_ranks
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
DROPLESS = {"moe_expert_capacity_factor": None}  # a capacity counts the tokens of a rank
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


RESHARDABLE = KINDS["reshardable"]


def saved_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the last checkpoint, whole."""
    [reader] = [FileSystemReader(path) for path in sorted(folder.glob("iter_*"))[-1:]]
    described = reader.read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in described.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    torch.distributed.checkpoint.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def common_state(folder: Path) -> dict[str, Any]:
    """What the last checkpoint has beside tensors."""
    [path] = sorted(folder.glob("iter_*"))[-1:]
    return load_common_state_dict(str(path))


@every(("before", "after"), [("one rank", "edp"), ("edp", "pipeline"), ("pipeline", "one rank")])
def test_another_layout_continues_from_the_same_bits(before: str, after: str, tmp_path: Path):
    """The state is loaded under another TP, EP and PP, and saved again; then training goes on from it."""
    first, second = tmp_path / "first", tmp_path / "second"
    ranks, model = LAYOUTS[before]
    trained = run(ranks, {**model, **DROPLESS}, first, steps=3, **RESHARDABLE)
    ranks, model = LAYOUTS[after]
    again = {"load": str(first), "save": str(second), "save_interval": 1000, **RESHARDABLE}
    run(ranks, {**model, **DROPLESS}, None, steps=3, **again)
    old, new = saved_tensors(first), saved_tensors(second)
    assert old.keys() == new.keys() and any("exp_avg" in name for name in old)
    assert [name for name in old if not torch.equal(old[name], new[name])] == []
    key = ("opt_param_scheduler", "skywork_moe", "aux_loss_coefficients")
    kept = [functools.reduce(dict.__getitem__, key, common_state(folder)) for folder in (first, second)]
    expected = {layer: value for record in trained for layer, value in record.coefficients[-1].items()}
    assert kept == [expected, expected] and len({0.01, *expected.values()}) == 3
    alone = run(LAYOUTS[before][0], {**LAYOUTS[before][1], **DROPLESS}, None, steps=5)
    rest = run(ranks, {**model, **DROPLESS}, first, steps=5, **RESHARDABLE)
    assert {n: v for record in rest for n, v in record.coefficients[0].items()} == expected
    losses = [next(record.losses for record in records if record.losses) for records in (alone, rest)]
    assert losses[1] == pytest.approx(losses[0][3:], rel=1e-5)


@every(
    ("before", "after", "message"),
    [
        ("one rank", "edp", "Expected 2 entries in state dict, but got 4"),
        ("edp", "pipeline", "KeyError: 'optimizer'"),
    ],
)
def test_megatron_alone_cannot_begin_or_end_expert_parallelism(
    before: str, after: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """What patches/chained_optimizers.py cures."""
    run(*LAYOUTS[before], tmp_path, steps=1, **RESHARDABLE)
    monkeypatch.setattr(chained_optimizers, "apply", lambda: False)
    with pytest.raises(RankFailed, match=message):
        run(*LAYOUTS[after], tmp_path, steps=2, **RESHARDABLE)


def test_a_layout_that_the_checkpoint_was_not_saved_for_is_refused(tmp_path: Path):
    run(*LAYOUTS["one rank"], tmp_path, steps=1)
    with pytest.raises(
        RankFailed, match=r"changes model\.pipeline_model_parallel_size from 1 to 2"
    ) as refused:
        run(*LAYOUTS["pipeline"], tmp_path, steps=2)
    assert "expected the same sizes, or a checkpoint that was saved with" in str(refused.value)
