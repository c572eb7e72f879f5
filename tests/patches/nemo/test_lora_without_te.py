"""NeMo's LoRA on Megatron's modules where Transformer Engine is absent: fails without the patch, adapts with it."""

import importlib
from typing import Any

import pytest
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer.transformer_config import TransformerConfig
from nemo.collections.llm.peft import lora, module_matcher, utils
from nemo.collections.llm.peft.lora import HAVE_TE

from nemo_skymoe.patches import cpu_runtime, lora_without_te
from nemo_skymoe.ranks import RankFailed, run_ranks

pytestmark = pytest.mark.skipif(HAVE_TE, reason="Transformer Engine is installed: nothing to cure")


def lora_of_upstream(patched: bool) -> Any:
    """NeMo's LoRA in a forked rank; a dry run in this process may have patched what the rank was forked from."""
    for module in (utils, module_matcher, lora):
        importlib.reload(module)
    assert not patched or lora_without_te.apply()
    return lora.LoRA


def adapt_a_linear(patched: bool) -> set[str]:
    cpu_runtime.apply()
    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    config = TransformerConfig(
        num_layers=1, hidden_size=8, num_attention_heads=1, use_cpu_initialization=True
    )
    linear = tensor_parallel.ColumnParallelLinear(8, 16, config=config, init_method=torch.nn.init.zeros_)
    adapted = lora_of_upstream(patched)(dim=2).transform(linear, "linear_qkv", "self_attention")
    return {name for name, _ in adapted.named_parameters()}


def leave_a_norm(patched: bool) -> set[str]:
    norm = torch.nn.LayerNorm(8)
    adapter = lora_of_upstream(patched)(target_modules=[], exclude_modules=["linear_proj"])
    adapted = adapter.transform(norm, "norm", "layer")
    return {name for name, _ in adapted.named_parameters()}


def test_a_linear_is_adapted() -> None:
    with pytest.raises(RankFailed, match=r"transformer_engine.* could not be imported"):
        run_ranks(adapt_a_linear, 1, False)
    [names] = run_ranks(adapt_a_linear, 1, True)
    assert {"adapter.linear_in.weight", "adapter.linear_out.weight"} <= names


def test_what_is_no_linear_is_left() -> None:
    with pytest.raises(RankFailed, match=r"isinstance\(\) arg 2 must be a type"):
        run_ranks(leave_a_norm, 1, False)
    assert run_ranks(leave_a_norm, 1, True) == [{"weight", "bias"}]
