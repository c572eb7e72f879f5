"""Experts that pad their rows for FP8, behind EDP's dispatchers. The products in FP8 themselves need a GPU."""

from typing import Any

import pytest
from megatron.core.transformer.moe.experts import SequentialMLP

from nemo_skymoe.ranks import run_ranks
from nemo_skymoe.selfcheck import dispatch
from nemo_skymoe.selfcheck.dispatch import DISPATCHERS, _largest, _results
from nemo_skymoe.selfcheck.world import relative, world
from tests.waiting import HANG

PAD: Any = next(name for name in vars(SequentialMLP) if name.startswith("_pad_tensor_for"))


def differences() -> dict[str, float]:
    """By dispatcher, the largest difference that padding makes to an output or a gradient."""
    padded: list[int] = []
    build, pad = dispatch._layer, getattr(SequentialMLP, PAD)

    def recorded(self: Any, *args: Any) -> Any:
        before, after = args[0].shape[0], pad(self, *args)
        padded.append(after[0].shape[0] - before)
        assert after[0].shape[0] % 16 == 0
        return after

    def with_fp8(*args: Any, **options: Any) -> Any:
        layer: Any = build(*args, **options)
        layer.experts.config.fp8 = "hybrid"
        return layer

    found = {}
    with world(), pytest.MonkeyPatch.context() as patch:
        for one in DISPATCHERS.values():
            plain = _results(one.name, one.needs_sequence_parallel)
            with patch.context() as fp8:
                fp8.setattr(dispatch, "_layer", with_fp8)
                fp8.setattr(SequentialMLP, PAD, recorded)
                got = _results(one.name, one.needs_sequence_parallel)
            found[one.name] = _largest(max(relative(got[part], value) for part, value in plain.items()))
            assert sum(padded) > 0
            padded.clear()
    return found


def test_padding_for_fp8_changes_nothing() -> None:
    for rank in run_ranks(differences, 2, timeout=HANG):
        assert rank.keys() == DISPATCHERS.keys() and max(rank.values()) <= 1e-10, rank
