"""Checkpoints reshard between EDP and other layouts bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel

from nemo_skymoe.moe.layer import get_skywork_block_spec
from nemo_skymoe.ranks import run_ranks
from tests.cases import every
from tests.moe import edp_worlds
from tests.moe.edp_worlds import Case

LAYOUTS: dict[str, dict[str, Any]] = {
    "one rank": {},
    "edp 2": {"tp": 2, "ep": 2},
    "edp 4": {"tp": 4, "ep": 4},
    "edp 2 pp 2": {"tp": 2, "ep": 2, "pp": 2},
    "ep 2 of dp 4": {"ep": 2},
    "ep 4": {"ep": 4},
    "etp 2 ep 2": {"tp": 2, "ep": 2, "etp": 2},
    "etp 4": {"tp": 4, "etp": 4},
}
# (layout, checkpoint to load, or none to start from the named weights, checkpoint to save)
STEPS: dict[int, list[tuple[str, str | None, str | None]]] = {
    2: [("edp 2", None, "from edp 2")],
    4: [
        ("edp 4", "from edp 2", None),
        ("edp 2", "from edp 2", None),
        ("edp 2 pp 2", "from edp 2", "from edp 2 pp 2"),
        ("ep 2 of dp 4", "from edp 2", None),
        ("ep 4", "from edp 2 pp 2", "from ep 4"),
        ("edp 4", "from ep 4", "from edp 4"),
        ("etp 2 ep 2", "from edp 4", "from etp 2"),
        ("edp 4", "from etp 2", None),
        ("etp 4", "from edp 4", "from etp 4"),
        ("edp 2", "from etp 4", "last"),
    ],
    1: [("one rank", "from edp 4", None), ("one rank", "last", None)],
}


def follow(steps: list[tuple[str, str | None, str | None]], folder: Path) -> list[dict[str, bool]]:
    """Load, compare and save along `steps`: for each, whether each parameter has the bits of its name."""
    edp_worlds.start_world()
    found = []
    for name, source, destination in steps:
        sizes = {"tp": 1, "ep": 1, "pp": 1, "etp": 1, **LAYOUTS[name]}
        parallel_state.initialize_model_parallel(
            sizes["tp"],
            sizes["pp"],
            expert_model_parallel_size=sizes["ep"],
            expert_tensor_parallel_size=sizes["etp"],
        )
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        model = build(sizes)
        if source is None:
            fill(model, sizes)
        else:
            state = dist_checkpointing.load(model.sharded_state_dict(), str(folder / source))
            model.load_state_dict({key: value for key, value in state.items() if "_extra_state" not in key})
        found.append({} if sizes["etp"] > 1 else same_bits(model, sizes))
        if destination is not None:
            (folder / destination).mkdir(exist_ok=True)
            torch.distributed.barrier()
            dist_checkpointing.save(model.sharded_state_dict(), str(folder / destination))
        parallel_state.destroy_model_parallel()
    return found


def build(sizes: dict[str, int]) -> GPTModel:
    edp = sizes["tp"] == sizes["ep"] and sizes["etp"] == 1
    config = edp_worlds.configuration(
        Case(1, "auto", dtype=torch.float32),
        tensor_model_parallel_size=sizes["tp"],
        sequence_parallel=sizes["tp"] > 1,
        expert_model_parallel_size=sizes["ep"],
        expert_tensor_parallel_size=sizes["etp"],
        pipeline_model_parallel_size=sizes["pp"],
        pipeline_dtype=torch.float32,
        moe_edp=edp,
    )
    return GPTModel(
        config,
        get_skywork_block_spec(config),
        edp_worlds.VOCABULARY,
        edp_worlds.SEQUENCE,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )


def expected(name: str, parameter: torch.nn.Parameter, sizes: dict[str, int]) -> torch.Tensor:
    """The bits of this rank's part of a parameter, by the name it has in the whole model."""
    layers = 2 // sizes["pp"]
    head, found, tail = name.partition("decoder.layers.")
    if found:
        index, _, rest = tail.partition(".")
        first = layers * parallel_state.get_pipeline_model_parallel_rank()
        name = f"{head}{found}{int(index) + first}.{rest}"
    name = edp_worlds.global_name(name)
    whole = edp_worlds.weight(name, edp_worlds.global_shape(parameter)).to(parameter.dtype)
    return edp_worlds.local_part(parameter, whole)


def fill(model: GPTModel, sizes: dict[str, int]) -> None:
    for name, parameter in model.named_parameters():
        parameter.data.copy_(expected(name, parameter, sizes))


def same_bits(model: GPTModel, sizes: dict[str, int]) -> dict[str, bool]:
    return {
        name: torch.equal(parameter.data, expected(name, parameter, sizes))
        for name, parameter in model.named_parameters()
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[list[dict[str, bool]]]]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {size: run_ranks(follow, size, steps, folder) for size, steps in STEPS.items()}


@every(
    ("size", "index"),
    [(size, i) for size, steps in STEPS.items() for i, step in enumerate(steps) if "etp" not in step[0]],
    ids=lambda value: str(value),
)
def test_a_checkpoint_has_the_same_bits_in_every_layout(found: dict, size: int, index: int):
    for rank in found[size]:
        assert len(rank[index]) > 10
        assert [name for name, same in rank[index].items() if not same] == []
