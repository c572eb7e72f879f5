"""Check what Megatron-Core needs of a layout and of recomputed layers, and name the option that does not fit."""

from collections.abc import Sequence
from typing import Any

from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.transformer.transformer_config import TransformerConfig

from nemo_skymoe.config import ConfigurationError

Recompute = Sequence[Sequence[int]]
"""`recompute[stage][virtual_stage]` is the number of layers of that chunk, from its first, that are recomputed."""

_GRAPHS = "Megatron (up to 0.15) captures no layer that is recomputed"
# Option, the only value that it may have, and why.
_WITH_LAYOUT = (
    (
        "mtp_num_layers",
        None,
        "a plan places no multi-token prediction, which Megatron's 'block' method skips",
    ),
    ("num_layers_in_first_pipeline_stage", None, "pipeline_model_parallel_layout says it"),
    ("num_layers_in_last_pipeline_stage", None, "pipeline_model_parallel_layout says it"),
    ("account_for_embedding_in_pipeline_split", False, "pipeline_model_parallel_layout says it"),
    ("account_for_loss_in_pipeline_split", False, "pipeline_model_parallel_layout says it"),
)
_WITH_RECOMPUTATION = (
    (
        "overlap_moe_expert_parallel_comm",
        False,
        "its schedule runs layers past the block that recomputes them",
    ),
    ("cuda_graph_impl", "none", _GRAPHS),
    ("enable_cuda_graph", False, _GRAPHS),
    ("external_cuda_graph", False, _GRAPHS),
    ("cpu_offloading", False, "Megatron either recomputes activations or offloads them"),
)


def check_plan(
    config: TransformerConfig, layout: str, recompute: Recompute | None
) -> PipelineParallelLayerLayout:
    """Check a plan against a configuration that knows `pipeline_model_parallel_size`.

    The arguments are those of `apply_layout`.

    Returns:
        The layout as Megatron parses it: `layout[stage][virtual_stage]` is a list of layer types.

    Raises:
        ConfigurationError: The plan does not fit; the message names the option and what was expected.
    """
    chunks = _parse(config, layout)
    _require(config, _WITH_LAYOUT, "pipeline_model_parallel_layout")
    layers = [[chunk.count(LayerType.decoder) for chunk in stage] for stage in chunks.layout]
    if recompute is None:
        _check_uniform(config, layers)
    else:
        _check_recompute(config, layers, recompute)
    return chunks


def check_count(stage: int, virtual_stage: int, count: int, layers: int) -> None:
    """Refuse to recompute more layers than a chunk has."""
    if not 0 <= count <= layers:
        raise ConfigurationError(
            f"recompute is {count} on stage {stage}, virtual stage {virtual_stage}, expected 0 to its {layers} layers"
        )


def _parse(config: TransformerConfig, layout: str) -> PipelineParallelLayerLayout:
    stages, virtual = config.pipeline_model_parallel_size, config.virtual_pipeline_model_parallel_size
    try:
        count = len(PipelineParallelLayerLayout.parse_str_to_list(layout))
    except AssertionError as reason:
        raise ConfigurationError(f"pipeline_model_parallel_layout is {layout!r}: {reason}") from reason
    expected, fits = f"pipeline_model_parallel_size = {stages}", count == stages
    if virtual is not None:
        expected += f" x virtual_pipeline_model_parallel_size = {virtual}"
        fits = count == stages * virtual
    elif stages > 1:
        expected = f"a multiple of {expected}"
        fits = count % stages == 0
    if not fits:
        raise ConfigurationError(
            f"pipeline_model_parallel_layout is {layout!r} with {count} chunks, expected {expected}"
        )
    chunks = PipelineParallelLayerLayout.from_str(layout, stages)
    _check_chunks(chunks, layout, config.num_layers)
    return chunks


def _check_chunks(chunks: PipelineParallelLayerLayout, layout: str, num_layers: int) -> None:
    flat, first, last = chunks.flatten_layout, chunks.layout[0][0], chunks.layout[-1][-1]
    # Megatron accepts them elsewhere too, but builds them here.
    for kind, letter, ends, place in (
        (LayerType.embedding, "E", first[:1], "first in the first chunk"),
        (LayerType.loss, "L", last[-1:], "last in the last chunk"),
    ):
        if flat.count(kind) != 1 or ends != [kind]:
            raise ConfigurationError(
                f"pipeline_model_parallel_layout is {layout!r}, expected one {letter!r}, {place}"
            )
    if (layers := flat.count(LayerType.decoder)) != num_layers:
        raise ConfigurationError(
            f"pipeline_model_parallel_layout is {layout!r} with {layers} layers, expected num_layers = {num_layers}"
        )
    if LayerType.mtp in flat:
        raise ConfigurationError(
            f"pipeline_model_parallel_layout is {layout!r}, expected no 'm': {_WITH_LAYOUT[0][2]}"
        )


def _check_uniform(config: TransformerConfig, layers: list[list[int]]) -> None:
    """Refuse Megatron's 'uniform' method for a chunk that its number does not divide: it looks past the end (up to
    0.16)."""
    number = config.recompute_num_layers
    if config.recompute_granularity != "full" or config.recompute_method != "uniform" or not number:
        return
    for stage, row in enumerate(layers):
        for virtual, count in enumerate(row):
            if count % number:
                raise ConfigurationError(
                    f"recompute_method='uniform' with recompute_num_layers={number} does not divide the {count} layers"
                    f" of stage {stage}, virtual stage {virtual}: expected 'block', or a plan's recompute"
                )


def _check_recompute(config: TransformerConfig, layers: list[list[int]], recompute: Recompute) -> None:
    shape, found = [len(row) for row in layers], [len(row) for row in recompute]
    if found != shape:
        raise ConfigurationError(f"recompute has {found} virtual stages by stage, the layout {shape}")
    for stage, row in enumerate(recompute):
        for virtual, count in enumerate(row):
            check_count(stage, virtual, count, layers[stage][virtual])
    if config.recompute_granularity == "full":
        raise ConfigurationError(
            f"recompute_granularity is 'full' (recompute_method={config.recompute_method!r}, the same on every stage),"
            " expected None or 'selective': the plan's recompute says what is recomputed"
        )
    if not any(any(row) for row in recompute):
        return
    _require(config, _WITH_RECOMPUTATION, "recompute")
    if config.distribute_saved_activations and config.sequence_parallel:
        raise ConfigurationError(
            "distribute_saved_activations is True, expected False with recompute under sequence_parallel: the saved"
            " activations are distributed already"
        )


def _require(config: TransformerConfig, table: Sequence[tuple[str, Any, str]], what: str) -> None:
    for option, only, reason in table:
        value = getattr(config, option, only)  # not every Megatron has them all
        if value != only:
            raise ConfigurationError(f"{option} is {value!r}, expected {only!r} with {what}: {reason}")
