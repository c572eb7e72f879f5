"""Put a pipeline plan on any Megatron-Core model: the layout on its configuration, recomputation on its blocks.

Megatron takes one `recompute_num_layers` for the whole model. But its TransformerBlock reads the number from its own
`config` in every forward pass. A block that gets a copy of the configuration can therefore have a number of its own.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.pipeline.check_plan import Recompute, check_count, check_plan


def apply_layout(config: TransformerConfig, layout: str, recompute: Recompute | None = None) -> None:
    """Put a layout on a model's configuration before the model is built, after checking it and `recompute`.

    The function sets `pipeline_model_parallel_layout` and `virtual_pipeline_model_parallel_size`, which is None for one
    chunk per stage. Give both to `parallel_state.initialize_model_parallel` too. For two stages with several chunks it
    also sets `batch_p2p_comm=False`. After the model is built, `apply_recompute` puts `recompute` into its blocks.

    Args:
        config: A configuration with `pipeline_model_parallel_size` and `num_layers`. It stays unchanged if anything is
            refused.
        layout: Megatron's string, such as "Et*5|(t*5|)*3t*4L". Chunk c is virtual stage c // PP of stage c % PP.
        recompute: Recomputed layers of every chunk, `recompute[stage][virtual_stage]`. None leaves the configuration's
            own recomputation as it is.

    Raises:
        ConfigurationError: The plan does not fit the configuration, or Megatron cannot do it.
    """
    chunks = check_plan(config, layout, recompute)
    virtual = chunks.virtual_pipeline_model_parallel_size
    config.pipeline_model_parallel_layout = chunks
    config.virtual_pipeline_model_parallel_size = virtual if virtual > 1 else None
    if virtual > 1 and config.pipeline_model_parallel_size == 2:
        # The two are each other's neighbour on both sides, and Megatron's batches of messages pair by order alone:
        # activations arrive as gradients, silently. Its own training script refuses this, its core does not.
        config.batch_p2p_comm = False


def apply_recompute(model: nn.Module | Sequence[nn.Module], recompute: Recompute) -> None:
    """Let every TransformerBlock of this rank recompute its own number of layers, in full, by the 'block' method.

    The function replaces the block's `config` by a copy with its own `recompute_*`. The block's layers and the rest of
    the model keep the shared configuration, so that selective recomputation inside layers stays as it was. You may call
    it again.

    Args:
        model: The chunks of this rank, or one of them, wrapped (DDP, Float16Module) or not. If a chunk has several
            blocks, the one whose configuration has the pipeline layout is meant.
        recompute: Recomputed layers of every chunk of the whole pipeline, `recompute[stage][virtual_stage]`.

    Raises:
        ConfigurationError: The numbers do not fit the model, or Megatron cannot do it.
    """
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    stage = parallel_state.get_pipeline_model_parallel_rank()
    if len(recompute) != stages:
        raise ConfigurationError(
            f"recompute has {len(recompute)} stages, expected pipeline_model_parallel_size = {stages}"
        )
    blocks = _blocks(model)
    if sorted(blocks) != list(range(len(recompute[stage]))):
        raise ConfigurationError(
            f"recompute has {len(recompute[stage])} virtual stages on stage {stage}, the model has a TransformerBlock"
            f" for {sorted(blocks)}: expected all model chunks of this rank, with one block each"
        )
    for virtual, block in blocks.items():
        check_count(stage, virtual, recompute[stage][virtual], _built_layers(block, stage, virtual))
    for virtual, block in blocks.items():
        _recompute_first_layers(block, recompute[stage][virtual])


def _blocks(model: nn.Module | Sequence[nn.Module]) -> dict[int, TransformerBlock]:
    """Return the pipeline's blocks on this rank by virtual stage."""
    chunks = [model] if isinstance(model, nn.Module) else model
    found = [module for chunk in chunks for module in chunk.modules() if isinstance(module, TransformerBlock)]
    found = [b for b in found if b.config.pipeline_model_parallel_layout is not None] or found
    blocks = {block.vp_stage or 0: block for block in found}
    if len(blocks) != len(found):
        raise ConfigurationError(
            f"the model has {len(found)} TransformerBlocks in {len(blocks)} chunks of this rank, expected one a chunk,"
            " or one whose configuration has pipeline_model_parallel_layout"
        )
    return blocks


def _built_layers(block: TransformerBlock, stage: int, virtual_stage: int) -> int:
    layers, layout = len(block.layers), block.config.pipeline_model_parallel_layout
    if isinstance(layout, PipelineParallelLayerLayout):
        expected = layout.layout[stage][virtual_stage].count(LayerType.decoder)
        if layers != expected:
            raise ConfigurationError(
                f"stage {stage}, virtual stage {virtual_stage} was built with {layers} layers, expected {expected} by"
                " its pipeline_model_parallel_layout: set it before the model is built"
            )
    return layers


def _recompute_first_layers(block: TransformerBlock, count: int) -> None:
    if not count and block.config.recompute_granularity != "full":
        return
    # A shallow copy: dataclasses.replace would run __post_init__ again, which is not idempotent in every option.
    config = copy.copy(block.config)
    config.recompute_granularity = "full" if count else None
    config.recompute_method = "block" if count else None
    config.recompute_num_layers = count or None
    block.config = config
    if _require_input_gradient not in block._forward_pre_hooks.values():
        block.register_forward_pre_hook(_require_input_gradient, with_kwargs=True)


def _require_input_gradient(block: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    """Let the input of a recomputed block have a gradient, also behind a frozen embedding.

    If no input of a checkpoint has a gradient, its weights get none either. Adapters in recomputed layers behind a
    frozen embedding would not be trained, and nothing would say so.
    """
    hidden_states = kwargs.get("hidden_states", args[0] if args else None)
    recomputes = block.training and block.config.recompute_granularity == "full"
    if recomputes and torch.is_grad_enabled() and isinstance(hidden_states, torch.Tensor):
        hidden_states.requires_grad_()
