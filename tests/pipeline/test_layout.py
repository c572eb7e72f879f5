"""What a layout costs, and the string that Megatron reads it from."""

import random
from dataclasses import replace
from itertools import pairwise

import pytest
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.pipeline.layout import Chunk, Layout
from nemo_skymoe.pipeline.problem import Block, PipelineProblem
from nemo_skymoe.pipeline.schedule import stage_order
from tests.cases import every
from tests.pipeline.baselines import balanced_layout, even_layout
from tests.pipeline.objective import estimate
from tests.pipeline.random_problems import all_cuts, random_problem

LAYER = Block("layer", 1.0, 2.0, weights=10.0, activations=8.0, checkpoint=1.0, recompute=0.75, working=0.5)
EMBEDDING = Block("embedding", 0.25, 0.5, weights=20.0, activations=1.0, working=3.0)
HEAD = Block("head", 0.5, 1.0, weights=20.0, activations=2.0, working=4.0)
TYPES = {"embedding": LayerType.embedding, "layer": LayerType.decoder, "head": LayerType.loss}


def problem(layers: int, stages: int, micro_batches: int = 8, virtual_stages: int = 1, transfer: float = 0.0):
    blocks = [EMBEDDING, *[LAYER] * layers, HEAD]
    return PipelineProblem(blocks, stages, micro_batches, 200.0, virtual_stages, transfer)


def parsed(layout: Layout) -> list[list[list[LayerType]]]:
    """Types of layer by stage and virtual stage, as Megatron reads the string."""
    megatron = PipelineParallelLayerLayout(layout.to_megatron_layout(), layout.problem.stages)
    megatron.validate_layer_layout(sum(layout.layers), None)
    return megatron.layout


def test_the_string_is_short():
    cuts = (0, 5, *range(10, 26, 5), 29, 33, 37, 41, 45, 49, 54)
    assert Layout(problem(52, 12), cuts, (0,) * 12).to_megatron_layout() == "Et*4|(t*5|)*4(t*4|)*6t*4L"


def test_embedding_and_head_may_be_alone():
    layout = Layout(problem(4, 4), (0, 1, 3, 5, 6), (0,) * 4)
    assert layout.to_megatron_layout() == "E|(t*2|)*2L"
    assert parsed(layout)[0] == [[LayerType.embedding]]


@every(seed=range(100))
def test_megatron_reads_the_same_stages(seed: int):
    rng = random.Random(seed)
    stages, virtual = rng.randint(1, 5), rng.randint(1, 3)
    virtual = virtual if stages > 1 else 1
    layers = stages * virtual + rng.randint(0, 12)
    inner = sorted(rng.sample(range(1, layers + 2), stages * virtual - 1))
    layout = Layout(
        problem(layers, stages, stages, virtual), (0, *inner, layers + 2), (0,) * (stages * virtual)
    )
    expected = [
        [[TYPES[block.kind] for block in chunk.blocks] for chunk in layout.chunks_of(stage)]
        for stage in range(stages)
    ]
    assert parsed(layout) == expected


def test_times_memory_and_slack_of_stages():
    """Three stages, worked by hand: E + 1 layer; 2 layers, the first recomputed; 1 layer + L."""
    layout = Layout(problem(4, 3, transfer=0.125), (0, 2, 4, 6), (0, 1, 0))
    assert layout.times == [3.75 + 0.125, 6.0 + 0.75 + 0.25, 4.5 + 0.125]
    assert layout.slack == [7.0 - 3.875, 0.0, 7.0 - 4.625]
    assert estimate(layout) == 7 * 7.0 + 3.875 + 7.0 + 4.625
    assert (layout.layers, layout.recomputed_layers) == ([1, 2, 1], [0, 1, 0])
    assert layout.recompute == ((0,), (1,), (0,))
    first = 30 + 2 * 9 + max(1 + 3, 9 + 0.5)
    second = 20 + 1 * 9 + max(8 + 0.5, 1 + 8 + 0.5)
    last = 30 + max(8 + 0.5, 10 + 4)
    assert layout.memory == [first, second, last]
    assert layout.memory_slack == [200 - first, 200 - second, 200 - last]


def test_few_micro_batches_hold_less():
    memory = [even_layout(problem(4, 4, micro_batches)).memory[0] for micro_batches in (1, 2, 4, 8)]
    assert [b - a for a, b in pairwise(memory)] == [9.0, 18.0, 0.0]


def test_a_recomputed_layer_has_its_activations_back_when_everything_behind_it_is_freed():
    assert Chunk((LAYER, LAYER), 0).peak == 16.5
    assert Chunk((LAYER, LAYER), 1).peak == 9.5
    assert Chunk((LAYER, LAYER), 2).peak == 9.5
    assert Chunk((replace(LAYER, activations=20.0), LAYER), 1).peak == 20.5


@every("virtual", [1, 2, 3])
def test_memory_is_that_of_the_worst_moment(virtual: int):
    """Against a walk through the schedule, block by block."""
    rng = random.Random(virtual)
    for _ in range(10):
        drawn = random_problem(rng, 3 * virtual + 2, 3, 6, virtual)
        cuts = rng.choice(all_cuts(drawn))
        free = Layout(drawn, cuts, (0,) * 3 * virtual)
        layout = Layout(drawn, cuts, tuple(rng.randint(0, chunk.layers) for chunk in free.chunks))
        assert layout.memory == pytest.approx([_walked(layout, stage) for stage in range(3)])


def _walked(layout: Layout, stage: int) -> float:
    size, chunks = layout.problem, layout.chunks_of(stage)
    held = most = 0.0
    for kind, index, _ in stage_order(stage, size.stages, size.virtual_stages, size.micro_batches):
        blocks, left = chunks[index].blocks, chunks[index].recomputed
        first = next((i for i, block in enumerate(blocks) if block.kind == "layer"), 0)
        again = [first <= i < first + left for i in range(len(blocks))]
        kept = [block.checkpoint if a else block.activations for block, a in zip(blocks, again, strict=True)]
        held -= sum(kept) if kind == "backward" else 0.0
        for i, block in enumerate(blocks):
            running = block.activations if again[i] else kept[i]
            most = max(most, held + sum(kept[:i]) + running + block.working)
        held += sum(kept) if kind == "forward" else 0.0
    return most + sum(block.weights for chunk in chunks for block in chunk.blocks)


def test_even_and_balanced_layouts():
    assert even_layout(problem(8, 4)).layers == [2, 2, 2, 2]
    assert even_layout(problem(10, 4), recompute_all=True).recomputed == (3, 3, 2, 2)
    heavy = replace(problem(8, 4), blocks=[EMBEDDING, *[LAYER] * 8, replace(HEAD, forward=3.0, backward=6.0)])
    assert balanced_layout(heavy).to_megatron_layout() == "Et*2|(t*3|)*2L"


@every(
    ("cuts", "recomputed", "message"),
    [
        ((0, 2, 6), (0, 0), "3 cuts and 2 recomputed counts, expected 4 and 3"),
        ((0, 2, 4, 5), (0, 0, 0), "expected to begin with 0 and end with 6"),
        ((0, 2, 2, 6), (0, 0, 0), "a chunk holds no block"),
        ((0, 2, 4, 6), (2, 0, 0), "recomputed is 2, expected 0 to 1 layers"),
    ],
)
def test_refuses_what_is_no_layout(cuts: tuple[int, ...], recomputed: tuple[int, ...], message: str):
    with pytest.raises(ConfigurationError, match=message):
        Layout(problem(4, 3), cuts, recomputed)


@every(
    ("change", "message"),
    [
        ({"blocks": [LAYER, EMBEDDING, LAYER, HEAD]}, "blocks are out of order"),
        ({"stages": 0}, "stages is 0, expected at least 1"),
        ({"virtual_stages": 2, "micro_batches": 7}, "micro_batches is 7, expected a multiple of stages"),
        ({"virtual_stages": 2, "stages": 1}, "virtual_stages is above 1 on one stage"),
    ],
)
def test_refuses_impossible_problems(change: dict, message: str):
    with pytest.raises(ConfigurationError, match=message):
        replace(problem(4, 2), **change)


@every(
    ("change", "message"),
    [
        ({"kind": "tail"}, "kind is 'tail'"),
        ({"forward": -1.0}, "forward of a block is -1.0"),
        ({"recompute": float("nan")}, "recompute of a block is nan"),
        ({"checkpoint": 9.0}, "checkpoint of a block is 9.0, expected at most its activations"),
    ],
)
def test_refuses_impossible_blocks(change: dict, message: str):
    with pytest.raises(ConfigurationError, match=message):
        replace(LAYER, **change)
