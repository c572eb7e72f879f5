"""A checkpoint of Transformer Engine's layers is loaded into Megatron's own, and one of Megatron's own into those.

Upstream: megatron/core/models/gpt/gpt_layer_specs.py, 0.14 to 0.19. `get_gpt_layer_local_spec` stores every norm before an MLP
as `mlp.linear_fc1.layer_norm_weight`, the name that it has in Transformer Engine's dense layer. In its MoE layer the name is
`pre_mlp_layernorm.weight`, as post_training/modelopt/gpt/model_specs.py minds and this file does not. Beside that, Transformer
Engine's norms have extra states, and a load fails where one that the model has is not in the checkpoint.
"""

import copy
import functools
from pathlib import Path
from typing import Any

from .targets import replace

LOCAL, TRANSFORMER_ENGINE = ".mlp.linear_fc1.layer_norm_weight", ".pre_mlp_layernorm.weight"
"""The ends of the name of the norm before an MoE."""


def apply() -> bool:
    """Look for the norm of an MoE layer under either name at every load, and say whether that was not done yet."""
    from megatron.core import dist_checkpointing

    load = dist_checkpointing.load
    if hasattr(load, "either_layers"):
        return False

    @functools.wraps(load)
    def load_either(sharded_state_dict: Any, checkpoint_dir: Any, *args: Any, **kwargs: Any) -> Any:
        return load(as_stored(sharded_state_dict, checkpoint_dir), checkpoint_dir, *args, **kwargs)

    setattr(load_either, "either_layers", True)  # noqa: B010
    replace(dist_checkpointing, "load", load_either)
    return True


def as_stored(sharded_state_dict: Any, checkpoint_dir: Any) -> Any:
    """Return a state to load with the names that it has in a `torch_dist` checkpoint, and without missing extra states.

    What is in the checkpoint under neither name is left for Megatron to refuse. A missing extra state stays the model's
    own, which is empty before the first step in FP8.
    """
    from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace
    from megatron.core.dist_checkpointing.mapping import (
        LocalNonpersistentObject,
        ShardedObject,
        ShardedTensor,
    )
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    if not Path(checkpoint_dir, ".metadata").is_file():
        return sharded_state_dict
    stored = FileSystemReader(checkpoint_dir).read_metadata().state_dict_metadata.keys()

    def found(part: Any) -> Any:
        if isinstance(part, ShardedTensor) and part.key not in stored:
            other = _other_name(part.key)
            if other in stored:
                part = copy.copy(part)
                part.key = other
        missing = isinstance(part, ShardedObject) and part.unique_key not in stored
        return LocalNonpersistentObject(part.data) if missing and part.key.endswith("._extra_state") else part

    return dict_list_map_outplace(found, sharded_state_dict)


def _other_name(key: str) -> str:
    names = (LOCAL, TRANSFORMER_ENGINE) if key.endswith(LOCAL) else (TRANSFORMER_ENGINE, LOCAL)
    return key.replace(*names)
