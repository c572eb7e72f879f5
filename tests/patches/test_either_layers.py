"""Checkpoints of either kind of layers in models of either: a local one, and one with the names of Transformer Engine's."""

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject

from nemo_skymoe.architecture import Architecture
from nemo_skymoe.checkpoint.description import Description
from nemo_skymoe.checkpoint.tensors.model import Key
from nemo_skymoe.checkpoint.torch_dist.names import LAYER_SPECS, PREFIX, extra_states
from nemo_skymoe.checkpoint.torch_dist.storage import WEIGHTS
from nemo_skymoe.checkpoint.verification.gpt_model import gpt_model, one_rank
from nemo_skymoe.patches import either_layers
from nemo_skymoe.ranks import RankFailed, run_ranks
from tests.checkpoint.fakes import random_weights
from tests.checkpoint.megatron_files import ROWS, save, stored_tensors, write

MODEL = Architecture(2, 8, 8, 2, vocab_size=97, num_moe_experts=3, moe_layer_freq=(0, 1), qk_layernorm=True)
NORM = f"{PREFIX}decoder.layers.1.pre_mlp_layernorm.weight"
OWN = "the model's own"


def state_to_load(layers: str) -> dict[str, Any]:
    """What a model asks of a checkpoint; `layers` "te" gives the local model the names of Transformer Engine's."""
    model: Any = gpt_model(Description(MODEL), ROWS)
    if layers == "te":
        del model.decoder.layers[1].submodules_config.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    state: dict[str, Any] = model.sharded_state_dict(prefix=PREFIX)
    asked = {part.unique_key for part in state.values() if isinstance(part, ShardedObject)}
    for name in {*extra_states(MODEL, layers)} - asked:
        key = name.partition("/")[0]
        state[key] = ShardedObject(key, OWN, (1,), (0,))
    return state


def load(folder: Path, layers: str) -> dict[str, Any]:
    with one_rank():
        state = state_to_load(layers)
        asked = {name: part.key for name, part in state.items()}
        loaded: Any = dist_checkpointing.load(state, str(folder / WEIGHTS))
        assert {name: part.key for name, part in state.items()} == asked, "the model's state was changed"
    return {name: loaded[name] for name in state}


@pytest.mark.parametrize("saved", LAYER_SPECS)
@pytest.mark.parametrize("layers", LAYER_SPECS)
def test_either_checkpoint_in_either_model(tmp_path: Path, saved: str, layers: str) -> None:
    weights = random_weights(MODEL)
    write(tmp_path, weights, torch.float32, layer_spec=saved)
    [loaded] = run_ranks(load, 1, tmp_path, layers)
    assert torch.equal(loaded[NORM], weights.read(Key("mlp_norm", 1)))
    own = {name for name, part in loaded.items() if isinstance(part, str) and part == OWN}
    missing = {*extra_states(MODEL, layers)} - {*extra_states(MODEL, saved)}
    assert own == {name.partition("/")[0] for name in missing}
    assert bool(own) == ((saved, layers) == ("local", "te"))


@pytest.mark.parametrize("saved", LAYER_SPECS)
def test_a_norm_under_neither_name_is_refused_by_megatron(tmp_path: Path, saved: str) -> None:
    tensors = stored_tensors(random_weights(MODEL), torch.float32, layer_spec=saved)
    endings = (either_layers.LOCAL, either_layers.TRANSFORMER_ENGINE)
    left = {
        name: tensor
        for name, tensor in tensors.items()
        if not name.endswith((f"layers.1{endings[0]}", endings[1]))
    }
    assert len(left) == len(tensors) - 1
    save(tmp_path, left | {name: [None] for name in extra_states(MODEL, saved)})
    with pytest.raises(RankFailed, match=f"layers.1{endings[saved == 'te']} from model not in state dict"):
        run_ranks(load, 1, tmp_path, saved)
