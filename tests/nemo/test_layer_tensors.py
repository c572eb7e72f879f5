"""What a checkpoint of a model has to hold, against what Megatron's own `sharded_state_dict` of that model holds."""

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

from nemo_skymoe.checkpoint.tensors.model import TensorInfo
from nemo_skymoe.checkpoint.torch_dist.fitting import _store_alike, check_sizes
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.nemo.model import SkyworkModel, SkyworkMoEModel, SkyworkMoETinyConfig, SkyworkTinyConfig
from nemo_skymoe.patches import nemo_cpu
from nemo_skymoe.ranks import run_ranks
from tests.cases import every

SIZES: dict[str, Any] = {
    "num_layers": 2, "hidden_size": 48, "ffn_hidden_size": 40, "num_attention_heads": 6, "seq_length": 16, "vocab_size": 5120,
}  # fmt: skip
SHARED: dict[str, dict[str, Any]] = {
    "plain": {},
    "add_qkv_bias": {"add_qkv_bias": True},
    "add_bias_linear": {"add_bias_linear": True},
    "qk_layernorm": {"qk_layernorm": True},
    "share_embeddings_and_output_weights": {"share_embeddings_and_output_weights": True},
    "num_query_groups": {"num_query_groups": 2},
    "kv_channels": {"kv_channels": 12},
    "ffn_hidden_size": {"ffn_hidden_size": 80},
    "num_layers": {"num_layers": 3},
    "hidden_size": {"hidden_size": 96},
    "vocab_size": {"vocab_size": 128},
    "position_embedding_type": {"position_embedding_type": "learned_absolute"},
}
MOE: dict[str, dict[str, Any]] = SHARED | {
    "num_moe_experts": {"num_moe_experts": 8},
    "moe_ffn_hidden_size": {"moe_ffn_hidden_size": 24},
    "moe_shared_expert_intermediate_size": {"moe_shared_expert_intermediate_size": 24},
    "moe_router_gate_bias": {"moe_router_gate_bias": True},
    "moe_router_two_layer_gate": {"moe_router_two_layer_gate": True},
    "moe_layer_freq": {"moe_layer_freq": [0, 1]},
}


def config_of(moe: bool, **changes: Any) -> Any:
    options: dict[str, Any] = SIZES | changes
    if not moe:
        return SkyworkTinyConfig(**options)
    options.setdefault("num_moe_experts", 4)
    return SkyworkMoETinyConfig(**options)


def stored(cases: list[tuple[bool, dict[str, Any]]]) -> list[dict[str, tuple[int, ...]]]:
    """Shapes by name as Megatron saves them, of one model after the other."""
    nemo_cpu.apply()
    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(expert_tensor_parallel_size=1)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    found = []
    for moe, changes in cases:
        model: Any = (SkyworkMoEModel if moe else SkyworkModel)(config_of(moe, **changes))
        model._trainer = None
        model.configure_model()
        state: Any = model.module.sharded_state_dict(prefix="module.")
        apply_factories(state)
        parts = [part for part in nested_values(state) if isinstance(part, ShardedTensor)]
        found.append({part.key: tuple(part.global_shape) for part in parts})
    return found


def infos(shapes: dict[str, tuple[int, ...]]) -> dict[str, TensorInfo]:
    return {name: TensorInfo(shape, "float32") for name, shape in shapes.items()}


@every("moe", [False, True], ids=["dense", "moe"])
def test_every_model_takes_its_own_checkpoint_and_names_what_differs_in_another(moe: bool) -> None:
    variants = MOE if moe else SHARED
    shapes = run_ranks(stored, 1, [(moe, changes) for changes in variants.values()])[0]
    by_name = dict(zip(variants, shapes, strict=True))
    for own, changes in variants.items():
        for other, found in by_name.items():
            config = config_of(moe, **changes)
            if own == other:
                check_sizes(infos(found), config, Path("checkpoint"))
                continue
            with pytest.raises(ConfigurationError, match="checkpoint 'checkpoint'") as refused:
                check_sizes(infos(found), config, Path("checkpoint"))
            said = str(refused.value)
            assert "\n" not in said
            if "plain" in (own, other):
                assert ({own, other} - {"plain"}).pop() in said, (own, other, said)


def test_layers_are_looked_for_as_they_are_stored() -> None:
    spellings: list[Any] = [1, [1, 1], [0, 1], 2, [1, 0]]
    changes = [{"moe_layer_freq": spelling} for spelling in spellings]
    dense: list[dict[str, Any]] = [{}, {"hetereogenous_dist_checkpoint": True}]
    shapes = run_ranks(stored, 1, [*((True, one) for one in changes), *((False, one) for one in dense)])[0]
    same = [("moe", [0, 1]), ("moe", [2]), ("moe", [3, 4]), ("dense", [5, 6])]
    cases: list[tuple[bool, dict[str, Any]]] = []
    expected: list[dict[str, tuple[int, ...]]] = []
    for kind, numbers in same:
        for own in numbers:
            for other in numbers:
                config = config_of(kind == "moe", **[*changes, *dense][own])
                check_sizes(infos(shapes[other]), config, Path("checkpoint"))
                _store_alike(infos(shapes[other]), config)
                options = ("moe_layer_freq", "hetereogenous_dist_checkpoint")
                cases.append((kind == "moe", {name: getattr(config, name) for name in options}))
                expected.append(shapes[other])
    assert run_ranks(stored, 1, cases)[0] == expected
