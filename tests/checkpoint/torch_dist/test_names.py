"""The table of Megatron's names against what its real model saves; what a dry run may import."""

import functools
import json
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import replace
from math import prod

import megatron.core
import pytest

from nemo_skymoe.architecture import SKYWORK_MOE_146B, Architecture
from nemo_skymoe.checkpoint.tensors.model import Key, key_shape, model_keys
from nemo_skymoe.checkpoint.torch_dist import names as torch_dist_names
from nemo_skymoe.checkpoint.torch_dist.names import MEASURED
from nemo_skymoe.checkpoint.verification.measured_names import (
    EXAMPLES,
    Stored,
    compared,
    stored_by_megatron,
    stored_by_table,
)
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.moe.layer import have_transformer_engine
from nemo_skymoe.ranks import run_ranks
from tests.calls import count_calls
from tests.checkpoint.torch_dist import transformer_engine
from tests.checkpoint.torch_dist.transformer_engine import label

SPECS = ("local", "te") if have_transformer_engine() else ("local",)
"""The layer specs to measure: Transformer Engine's exists only where it can be imported."""
DENSE, MOE = EXAMPLES["dense"], EXAMPLES["moe"]
every_model = pytest.mark.parametrize("architecture", EXAMPLES.values(), ids=EXAMPLES.keys())
every_stacking = pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "a name a layer"])
every_spec = pytest.mark.parametrize("layer_spec", torch_dist_names.LAYER_SPECS)


@functools.cache
def real(layer_spec: str) -> dict[tuple[str, bool], Stored]:
    """What the installed Megatron saves of each model."""
    [found] = run_ranks(
        lambda: {
            (name, stacked): stored_by_megatron(architecture, layer_spec, stacked=stacked)
            for name, architecture in EXAMPLES.items()
            for stacked in (True, False)
        },
        1,
    )
    return found


def test_the_installed_version_was_measured() -> None:
    assert megatron.core.__version__.partition("+")[0] in MEASURED  # behind + is a commit of ours


@every_stacking
@pytest.mark.parametrize("name", EXAMPLES)
def test_the_table_has_what_megatron_saves(name: str, stacked: bool) -> None:
    """Tied and untied head, layers stacked or not: the table has no line of its own for these."""
    for layer_spec in SPECS:
        table = stored_by_table(EXAMPLES[name], layer_spec, stacked=stacked)
        assert compared(real(layer_spec)[name, stacked], table) == []


@every_stacking
def test_the_table_has_what_megatron_saved_of_transformer_engines_layers(stacked: bool) -> None:
    """The real models of every version, as `transformer_engine.py` has measured them."""
    recorded = json.loads(transformer_engine.FILE.read_text())
    assert {*recorded} == {*MEASURED}
    for version, found in recorded.items():
        for name, architecture in EXAMPLES.items():
            table = stored_by_table(architecture, "te", stacked=stacked, megatron_core=version)
            assert transformer_engine.checksum(table) == found["checksums"][label(name, stacked)], (
                version,
                name,
            )
        spelled_out = EXAMPLES[transformer_engine.SPELLED_OUT]
        table = stored_by_table(spelled_out, "te", megatron_core=version)
        assert transformer_engine.names(table) == found["names"], version


def test_a_table_that_is_wrong_is_told_by_name() -> None:
    table = stored_by_table(MOE)
    final, router = "module.decoder.final_layernorm.weight", "module.decoder.layers.mlp.router.weight"
    tensors = {name: shape for name, shape in table.tensors.items() if name != final} | {router: (5, 7, 31)}
    [state, *_] = sorted(table.extra_states)
    assert compared(table, Stored(tensors, table.extra_states - {state} | {"other"})) == [
        "the table has 'other', the model has not",
        f"the model has '{final}', the table has not",
        f"the model has '{state}', the table has not",
        f"'{router}' is [5, 7, 53] in the model, [5, 7, 31] in the table",
    ]


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
