"""Measure the tables on Megatron's real model, on the meta device: `python -m nemo_skymoe.checkpoint.torch_dist.tables.generate`.

Writes the table of the layer spec that Megatron has here (`te` where Transformer Engine is installed) and adds the
version of Megatron-Core to those that it holds for; a version whose table differs is refused.
"""

import json
from pathlib import Path
from typing import Any

import megatron.core
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories

from nemo_skymoe.architecture import Architecture
from nemo_skymoe.checkpoint.description import Description
from nemo_skymoe.checkpoint.torch_dist.gpt_model import gpt_model, one_rank
from nemo_skymoe.checkpoint.torch_dist.tables import PREFIX, symbols
from nemo_skymoe.moe.layer import have_transformer_engine

DENSE = Architecture(5, 53, 31, 15, vocab_size=97, num_query_groups=3, kv_channels=14)
"""Sizes from which every symbol can be told, and so can its sums."""
MOE = DENSE.with_experts(7)
SPEC = "te" if have_transformer_engine() else "local"
"""The layer spec to measure: Transformer Engine's exists only where it is installed."""
Shapes = dict[str, tuple[int, ...]]


def stored(architecture: Architecture, *, stacked: bool = True) -> tuple[Shapes, Shapes]:
    """Names and global shapes of the tensors, and of the extra states, that Megatron saves of such a model."""
    with one_rank():
        with torch.device("meta"):
            model = gpt_model(Description(architecture), architecture.vocab_size, SPEC, stacked=stacked)
        state: dict[str, Any] = model.sharded_state_dict(prefix=PREFIX)
    apply_factories(state)
    tensors: Shapes = {}
    extra_states: Shapes = {}
    for part in nested_values(state):
        if isinstance(part, ShardedTensor):
            tensors[part.key] = tuple(part.global_shape)
        elif isinstance(part, ShardedObject):
            extra_states[part.unique_key] = tuple(part.global_shape)
    return tensors, extra_states


def table(architecture: Architecture) -> dict[str, dict[str, str]]:
    """`stored` with symbols in place of sizes."""
    symbol = {size: name for name, size in symbols(architecture, architecture.vocab_size).items()}
    tensors, shards = stored(architecture)
    extra_states = {shard.partition("/")[0]: shape for shard, shape in shards.items()}
    return {
        kind: {
            # (1,) is Megatron's shape of an object that is stacked along nothing.
            name.removeprefix(PREFIX): " ".join(symbol[size] for size in shape if shape != (1,))
            for name, shape in sorted(found.items())
        }
        for kind, found in (("tensors", tensors), ("extra_states", extra_states))
    }


def main() -> None:
    """Write the table beside this file."""
    measured = {"dense": table(DENSE), "moe": table(MOE)}
    file = Path(__file__).with_name(f"{SPEC}.json")
    versions = {megatron.core.__version__}
    if file.exists():
        before = json.loads(file.read_text())
        others = set(before.pop("megatron_core")) - versions
        if others and before != measured:
            raise SystemExit(
                f"megatron-core {megatron.core.__version__} differs from {sorted(others)} in {file}"
            )
        versions |= others
    file.write_text(json.dumps({"megatron_core": sorted(versions), **measured}, indent=1) + "\n")


if __name__ == "__main__":
    main()
