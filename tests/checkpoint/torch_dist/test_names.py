"""The table of Megatron's names against what its real model saves; what a dry run may import."""

import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import replace
from math import prod
from typing import Any

import megatron.core
import pytest
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories

from nemo_skymoe.architecture import SKYWORK_MOE_146B, Architecture
from nemo_skymoe.checkpoint.description import Description
from nemo_skymoe.checkpoint.tensors.model import Key, key_shape, model_keys
from nemo_skymoe.checkpoint.torch_dist import names as torch_dist_names
from nemo_skymoe.checkpoint.verification.gpt_model import gpt_model, one_rank
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.moe.layer import have_transformer_engine
from nemo_skymoe.ranks import run_ranks
from tests.calls import count_calls

MEASURED = ("0.14.0", "0.15.3", "0.16.1", "0.17.1", "0.18.2", "0.19.2")
"""The versions of Megatron-Core that the docstring of the table names."""
SPEC = "te" if have_transformer_engine() else "local"
"""The layer spec to measure: Transformer Engine's exists only where it is installed."""
DENSE = Architecture(5, 53, 31, 15, vocab_size=97, num_query_groups=3, kv_channels=14)
"""Sizes that cannot be taken for one another."""
MOE = DENSE.with_experts(7)
TIED = Architecture(3, 53, 31, 4, vocab_size=97, kv_channels=14, tied_embeddings=True)
MODELS = {
    "dense": DENSE,
    "moe": MOE,
    "tied": TIED,
    "tied moe": TIED.with_experts(5),
    "first dense": replace(MOE, moe_layer_freq=(0, 1, 1, 0, 1), moe_ffn_hidden_size=17),
    "every second": replace(TIED.with_experts(5), moe_layer_freq=2),
    "biases and norms of heads": replace(DENSE, add_qkv_bias=True, qk_layernorm=True),
    "the same as an moe": replace(MOE, add_qkv_bias=True, qk_layernorm=True),
}
every_model = pytest.mark.parametrize("architecture", MODELS.values(), ids=MODELS.keys())
every_stacking = pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "a name a layer"])
every_spec = pytest.mark.parametrize("layer_spec", torch_dist_names.LAYER_SPECS)


Shapes = dict[str, tuple[int, ...]]


def stored(architecture: Architecture, *, stacked: bool) -> tuple[Shapes, Shapes]:
    """Names and global shapes of the tensors, and of the extra states, that Megatron saves of such a model."""
    with one_rank():
        with torch.device("meta"):
            model = gpt_model(Description(architecture), architecture.vocab_size, SPEC, stacked=stacked)
        state: dict[str, Any] = model.sharded_state_dict(prefix=torch_dist_names.PREFIX)
    apply_factories(state)
    parts = [*nested_values(state)]
    return (
        {part.key: tuple(part.global_shape) for part in parts if isinstance(part, ShardedTensor)},
        {part.unique_key: tuple(part.global_shape) for part in parts if isinstance(part, ShardedObject)},
    )


def measure() -> dict[tuple[Architecture, bool], tuple[Shapes, Shapes]]:
    return {
        (architecture, stacked): stored(architecture, stacked=stacked)
        for architecture in MODELS.values()
        for stacked in (True, False)
    }


@pytest.fixture(scope="module")
def real() -> dict[tuple[Architecture, bool], tuple[Shapes, Shapes]]:
    """What the installed Megatron saves of each model."""
    [found] = run_ranks(measure, 1)
    return found


def test_the_versions_that_were_measured_are_named() -> None:
    assert megatron.core.__version__.partition("+")[0] in MEASURED  # behind + is a commit of ours
    assert all(version in (torch_dist_names.__doc__ or "") for version in MEASURED)


@every_stacking
@every_model
def test_chunks_are_the_tensors_that_megatron_saves(
    real: dict[tuple[Architecture, bool], tuple[Shapes, Shapes]], architecture: Architecture, stacked: bool
) -> None:
    """Tied and untied head, layers stacked or not: the table has no line of its own for these."""
    tensors, extra_states = real[architecture, stacked]
    chunks = torch_dist_names.chunks(architecture, architecture.vocab_size, SPEC, stacked=stacked)
    assert {chunk.tensor: chunk.shape for chunk in chunks} == tensors
    listed = torch_dist_names.extra_states(architecture, SPEC, stacked=stacked)
    assert set(listed) == {*extra_states} and len(listed) == len(extra_states)


@every_stacking
@every_spec
@every_model
def test_chunks_fill_every_tensor_with_every_row_once(
    architecture: Architecture, layer_spec: str, stacked: bool
) -> None:
    rows: dict[Key, list[int]] = defaultdict(list)
    seen = set()
    chunks = torch_dist_names.chunks(architecture, 128, layer_spec, stacked=stacked)
    for chunk in chunks:
        assert (chunk.tensor, chunk.index) not in seen
        seen.add((chunk.tensor, chunk.index))
        assert sum(part.stop - part.start for part in chunk.parts) == chunk.chunk_shape[0]
        for part in chunk.parts:
            if part.key is not None:
                rows[part.key] += range(part.start, part.stop)
                assert chunk.chunk_shape[1:] == key_shape(architecture, part.key)[1:]
    assert rows.keys() == set(model_keys(architecture))
    assert all(sorted(found) == [*range(key_shape(architecture, key)[0])] for key, found in rows.items())
    slices = Counter(name for name, _ in seen)
    for chunk in chunks:
        assert slices[chunk.tensor] == prod(chunk.shape[: len(chunk.index)])


def test_only_the_transformer_engine_norm_of_an_moe_has_another_name() -> None:
    local, te = (
        {chunk.tensor for chunk in torch_dist_names.chunks(MOE, 128, spec)}
        for spec in torch_dist_names.LAYER_SPECS
    )
    assert te - local == {"module.decoder.layers.pre_mlp_layernorm.weight"}
    assert local - te == {"module.decoder.layers.mlp.linear_fc1.layer_norm_weight"}


@pytest.mark.parametrize(
    ("rows", "spec", "message"),
    [
        (96, "local", r"padded_vocab_size is 96, expected at least vocab_size \(97\)"),
        (97, "mcore", "layer_spec is 'mcore'"),
    ],
)
def test_what_no_checkpoint_has_is_refused(rows: int, spec: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        torch_dist_names.chunks(DENSE, rows, spec)


def test_a_dry_run_of_146b_needs_no_torch() -> None:
    code = """
import sys
from math import prod
from nemo_skymoe.architecture import SKYWORK_MOE_146B
from nemo_skymoe.checkpoint.torch_dist import names
chunks = names.chunks(SKYWORK_MOE_146B, 65536)
elements = sum(prod(chunk.chunk_shape) for chunk in chunks)
states = names.extra_states(SKYWORK_MOE_146B)
print(len(chunks), elements, len(states), sorted({"torch", "numpy", "megatron"} & sys.modules.keys()))
"""
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    count, elements, names, heavy = output.split(maxsplit=3)
    # A layer has two norms, two attention matrices, a router and two matrices an expert; three more are beside them.
    assert int(count) == 52 * (5 + 2 * 16) + 3
    assert int(elements) == 146_356_167_168
    assert int(names) == 52 * (2 + 2 * 16)
    assert heavy.strip() == "[]"


def test_listing_a_model_takes_work_in_proportion_to_its_layers() -> None:
    once, twice = (
        count_calls(
            lambda layers=layers: torch_dist_names.chunks(replace(SKYWORK_MOE_146B, num_layers=layers), 65536)
        )
        for layers in (26, 52)
    )
    assert 1.8 * once < twice < 2.2 * once
