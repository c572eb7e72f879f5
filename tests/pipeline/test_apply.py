"""A plan on a Megatron model: the results of one stage bit for bit, and the recomputation that was asked for."""

import functools
from typing import Any

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.patches import cpu_runtime
from nemo_skymoe.pipeline.apply import apply_layout, apply_recompute
from nemo_skymoe.ranks import RankFailed, run_ranks
from tests.cases import every
from tests.moe.worlds import configuration, groups, in_world
from tests.pipeline.staged_gpt import LAYERS, Case, Found, Run, mesh, train

SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "moe"]}
TWO, TWO_VIRTUAL, FOUR = "Ett|ttttL", "Ett|t|tt|tL", "E|ttt|tt|tL"
# By ranks and name.
ONE_STAGE = {
    1: {"dense": Case(moe=False), "moe": Case()},
    2: {"edp": Case(edp=2)},
}
PLANNED = {
    2: {
        "dense": Case(TWO, [[2], [1]], moe=False),
        "moe": Case(TWO, [[0], [3]]),
        "nothing recomputed": Case(TWO, [[0], [0]]),
        "dense, virtual stages": Case(TWO_VIRTUAL, [[1, 2], [0, 1]], moe=False),
        "moe, virtual stages": Case(TWO_VIRTUAL, [[2, 0], [1, 0]]),
        "a chunk of the head alone": Case("Et|ttt|tt|L", [[1, 1], [2, 0]]),
        "selective in every layer": Case(TWO, [[1], [2]], more=SELECTIVE),
    },
    4: {
        "dense": Case(FOUR, [[0], [1], [2], [0]], moe=False),
        "moe": Case(FOUR, [[0], [2], [0], [1]]),
        "virtual stages, empty ones among them": Case("Ett|t||t|t||t|L", [[1, 0], [0, 0], [0, 1], [1, 0]]),
        "edp": Case(TWO_VIRTUAL, [[1, 2], [0, 1]], edp=2),
    },
}
planned = every(("ranks", "name"), [(ranks, name) for ranks, cases in PLANNED.items() for name in cases])


def train_all(cases: dict[str, Case]) -> dict[str, Found]:
    return {name: train(case) for name, case in cases.items()}


@functools.cache
def one_stage(ranks: int) -> dict[str, Found]:
    return run_ranks(in_world, ranks, train_all, ONE_STAGE[ranks])[0]


@functools.cache
def results(ranks: int) -> dict[str, Found]:
    return run_ranks(in_world, ranks, train_all, PLANNED[ranks])[0]


def reference(case: Case) -> Found:
    return one_stage(case.edp)["edp" if case.edp > 1 else "moe" if case.moe else "dense"]


def different(found: Found, expected: Found) -> list[str]:
    """Names of the gradients of any step that are not the same bits."""
    return [
        name
        for ours, theirs in zip(found.gradients, expected.gradients, strict=True)
        for name in sorted(ours.keys() | theirs.keys())
        if not torch.equal(ours[name], theirs[name])
    ]


@planned
def test_losses_and_gradients_are_those_of_one_stage(ranks: int, name: str) -> None:
    found, expected = results(ranks)[name], reference(PLANNED[ranks][name])
    assert found.losses == expected.losses
    assert len({loss for step in found.losses for loss in step}) == 8
    assert different(found, expected) == []
    assert all(gradient.any() for gradient in found.gradients[0].values())


@planned
def test_recomputation_is_seen_once_by_the_routers(ranks: int, name: str) -> None:
    found, expected = results(ranks)[name], reference(PLANNED[ranks][name])
    assert found.sums == expected.sums
    assert found.metrics == expected.metrics
    assert found.coefficients == expected.coefficients
    if PLANNED[ranks][name].moe:
        assert found.coefficients[0] != found.coefficients[1]
        assert all(metrics.drop_rate > 0 for metrics in found.metrics[0].values())


# Global layers by stage and virtual stage, as the layouts have them.
PLACES: dict[str, list[list[list[int]]]] = {
    TWO: [[[1, 2]], [[3, 4, 5, 6]]],
    TWO_VIRTUAL: [[[1, 2], [4, 5]], [[3], [6]]],
    "Et|ttt|tt|L": [[[1], [5, 6]], [[2, 3, 4], []]],
    FOUR: [[[]], [[1, 2, 3]], [[4, 5]], [[6]]],
    "Ett|t||t|t||t|L": [[[1, 2], [5]], [[3], []], [[], [6]], [[4], []]],
}


@planned
def test_every_chunk_has_its_layers_and_recomputes_the_first_of_them(ranks: int, name: str) -> None:
    case, found = PLANNED[ranks][name], results(ranks)[name]
    assert case.layout is not None and case.recompute is not None
    places = {(s, v): chunk for s, row in enumerate(PLACES[case.layout]) for v, chunk in enumerate(row)}
    assert found.layers == places
    assert found.embedding == {(0, 0)}
    assert found.head == {(len(case.recompute) - 1, len(case.recompute[0]) - 1)}
    recomputed = {n for (s, v), chunk in places.items() for n in chunk[: case.recompute[s][v]]}
    # A layer runs a second time in the backward pass of every micro-batch.
    assert found.calls == {n: 2 if n in recomputed else 1 for n in range(1, LAYERS + 1)}


def without_the_ordered_messages(case: Case) -> Found:
    for name, substitute in cpu_runtime.substitutions().items():
        if name != "cpu_megatron.batched_p2p":
            substitute()
    torch.distributed.init_process_group("gloo")
    return train(case)


def test_batched_messages_between_two_stages_are_wrong_and_the_plan_turns_them_off() -> None:
    """Megatron's default for virtual stages on two ranks, with its own p2p_communication.py."""
    case = PLANNED[2]["moe, virtual stages"]
    batched = Case(case.layout, case.recompute, more={"batch_p2p_comm": True})
    wrong = run_ranks(without_the_ordered_messages, 2, batched)[0]
    assert wrong.losses != reference(case).losses
    assert len(different(wrong, reference(case))) > 50
    right = run_ranks(without_the_ordered_messages, 2, case)[0]
    assert right.losses == reference(case).losses
    assert different(right, reference(case)) == []


def hook_on_one_rank() -> dict[str, Any]:
    """What `apply_recompute` does to configurations, called again and with what does not fit."""
    refused = []
    with groups(mesh(Case())):
        run = Run(Case("E" + "t" * LAYERS + "L", [[4]]))
        (model,) = run.models
        block, shared = model.decoder, run.config
        seen: dict[str, Any] = {
            "block": [block.config.recompute_granularity, block.config.recompute_method, block.config.recompute_num_layers],
            "shared": [shared.recompute_granularity, shared.recompute_method, shared.recompute_num_layers],
            "others have the shared one": model.config is shared and all(layer.config is shared for layer in block.layers),
        }  # fmt: skip
        for recompute in ([[7]], [[1], [1]], [[1, 1]]):
            try:
                apply_recompute(run.chunks, recompute)
            except ConfigurationError as reason:
                refused.append(str(reason))
        seen["after refusals"] = block.config.recompute_num_layers
        for count in (1, 0):
            apply_recompute(model, [[count]])
            run.calls.clear()
            run.forward_and_backward(0)
            seen[f"calls with {count}"] = dict(run.calls)
        try:
            apply_recompute([model, model], [[1]])
        except ConfigurationError as reason:
            refused.append(str(reason))
        late = Run(Case())
        late.config.num_layers += 1
        apply_layout(late.config, "E" + "t" * (LAYERS + 1) + "L")
        try:
            apply_recompute(late.models, [[1]])
        except ConfigurationError as reason:
            refused.append(str(reason))
    return {**seen, "refused": refused}


def test_the_blocks_alone_get_a_configuration_of_their_own() -> None:
    [seen] = run_ranks(in_world, 1, hook_on_one_rank)
    assert seen["block"] == ["full", "block", 4]
    assert seen["shared"] == [None, None, None]
    assert seen["others have the shared one"]
    assert seen["after refusals"] == 4
    assert seen["calls with 1"] == {1: 8, **{n: 4 for n in range(2, 7)}}
    assert seen["calls with 0"] == {n: 4 for n in range(1, 7)}
    beginnings = [
        "recompute is 7 on stage 0, virtual stage 0, expected 0 to its 6 layers",
        "recompute has 2 stages, expected pipeline_model_parallel_size = 1",
        "recompute has 2 virtual stages on stage 0, the model has a TransformerBlock for [0]",
        "the model has 2 TransformerBlocks in 1 chunks",
        "stage 0, virtual stage 0 was built with 6 layers, expected 7",
    ]
    for message, beginning in zip(seen["refused"], beginnings, strict=True):
        assert message.startswith(beginning)


def adapters_behind_a_frozen_embedding() -> list[dict[str, Any]]:
    """Gradients of the MLPs' second matrices, which alone are trained, without and with recomputation."""
    found = []
    with groups(mesh(Case())):
        for count in (0, 3):
            run = Run(Case("E" + "t" * LAYERS + "L", [[count]], moe=False))
            for name, parameter in run.parameters.items():
                parameter.requires_grad_("linear_fc2" in name)
            run.forward_and_backward(0)
            found.append(
                {name: gradient for name, gradient in run.gradients().items() if "linear_fc2" in name}
            )
    return found


def test_recomputed_layers_are_trained_behind_a_frozen_embedding() -> None:
    [(plain, recomputed)] = run_ranks(in_world, 1, adapters_behind_a_frozen_embedding)
    assert len(plain) == LAYERS and all(gradient.any() for gradient in plain.values())
    assert all((recomputed[name] == gradient).all() for name, gradient in plain.items())


def dense(**options: Any) -> TransformerConfig:
    return configuration(
        **{"num_moe_experts": None, "num_layers": 6, "pipeline_model_parallel_size": 2, **options}
    )


FULL = {"recompute_granularity": "full", "recompute_num_layers": 2}
REFUSED: list[tuple[str, dict[str, Any], Any, str]] = [
    ("Ett|x|ttttL", {}, None, "pipeline_model_parallel_layout is 'Ett|x|ttttL': Invalid layer character: x"),
    ("Ett|tt|ttL", {}, None, "with 3 chunks, expected a multiple of pipeline_model_parallel_size = 2"),
    ("Et|t|t|tttL", {"pipeline_model_parallel_size": 1}, None, "4 chunks, expected pipeline_model_parallel_size = 1"),
    ("Ettt|tttL", {"virtual_pipeline_model_parallel_size": 2}, None, "2 chunks, expected .* x virtual_pipeline_model_parallel_size = 2"),
    ("Ettt|ttL", {}, None, "with 5 layers, expected num_layers = 6"),
    ("|Etttttt|t|L", {}, None, "expected one 'E', first in the first chunk"),
    ("ttt|tttL", {}, None, "expected one 'E', first in the first chunk"),
    ("Ettt|tttL|", {"pipeline_model_parallel_size": 3}, None, "expected one 'L', last in the last chunk"),
    ("Ettt|tttmL", {}, None, "expected no 'm': a plan places no multi-token prediction"),
    ("Ettt|tttL", {"mtp_num_layers": 1}, None, "mtp_num_layers is 1, expected None with pipeline_model_parallel_layout"),
    ("Ett|ttttL", {"num_layers_in_first_pipeline_stage": 2}, None, "num_layers_in_first_pipeline_stage is 2, expected None"),
    ("Ett|ttttL", {"account_for_loss_in_pipeline_split": True, "num_layers": 7}, None, "with 6 layers, expected num_layers = 7"),
    ("Ett|tttttL", {"account_for_loss_in_pipeline_split": True, "num_layers": 7}, None, "account_for_loss_in_pipeline_split is True, expected False"),
    ("Ett|ttttL", {}, [[2]], r"recompute has \[1\] virtual stages by stage, the layout \[1, 1\]"),
    ("Ett|ttttL", {}, [[2], [1, 1]], r"recompute has \[1, 2\] virtual stages by stage, the layout \[1, 1\]"),
    ("Ett|ttttL", {}, [[3], [0]], "recompute is 3 on stage 0, virtual stage 0, expected 0 to its 2 layers"),
    ("Ett|t|tt|tL", {}, [[0, 0], [0, -1]], "recompute is -1 on stage 1, virtual stage 1, expected 0 to its 1 layers"),
    ("Ett|ttttL", {**FULL, "recompute_method": "uniform"}, [[1], [1]], r"recompute_granularity is 'full' \(recompute_method='uniform'"),
    ("Ett|ttttL", {**FULL, "recompute_method": "block"}, [[1], [1]], r"recompute_granularity is 'full' \(recompute_method='block'"),
    ("Ettt|tttL", {**FULL, "recompute_method": "uniform"}, None, "recompute_method='uniform' with recompute_num_layers=2 does not divide the 3 layers of stage 0"),
]  # fmt: skip


def refusal(config: TransformerConfig, layout: str, recompute: Any) -> str:
    before = dict(vars(config))
    with pytest.raises(ConfigurationError) as refused:
        apply_layout(config, layout, recompute)
    assert vars(config) == before
    return str(refused.value)


@every(("layout", "options", "recompute", "message"), REFUSED)
def test_what_does_not_fit_is_refused_by_name(
    layout: str, options: dict[str, Any], recompute: Any, message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        apply_layout(dense(**options), layout, recompute)
    assert "\n" not in refusal(dense(**options), layout, recompute)


@every(
    ("option", "value"),
    [
        ("overlap_moe_expert_parallel_comm", True),
        ("enable_cuda_graph", True),
        ("external_cuda_graph", True),
        ("cuda_graph_impl", "local"),
        ("cpu_offloading", True),
    ],
)
def test_what_megatron_cannot_do_beside_recomputation_is_refused(option: str, value: Any) -> None:
    config = dense()
    setattr(
        config, option, value
    )  # as a whole, each would need a GPU, Transformer Engine or expert parallelism
    assert refusal(config, TWO, [[1], [0]]).startswith(f"{option} is {value!r}, expected")
    apply_layout(config, TWO, [[0], [0]])


def test_distributed_activations_are_refused_under_sequence_parallelism() -> None:
    config = dense(tensor_model_parallel_size=2, sequence_parallel=True)
    config.distribute_saved_activations = True
    assert refusal(config, TWO, [[1], [0]]).startswith("distribute_saved_activations is True, expected False")


def test_the_uniform_method_stays_where_it_divides_every_chunk() -> None:
    config = dense(**FULL, recompute_method="uniform")
    apply_layout(config, TWO)
    assert (config.recompute_granularity, config.recompute_method, config.recompute_num_layers) == (
        "full",
        "uniform",
        2,
    )


def uniform_on_an_odd_stage() -> bool:
    """Whether the gradients are the same bits with a number that does not divide the layers."""
    with groups(mesh(Case())):
        run = Run(
            Case(
                "E" + "t" * LAYERS + "L",
                more={**FULL, "recompute_num_layers": 3, "recompute_method": "uniform"},
            )
        )
        run.forward_and_backward(0)
        even = run.gradients()
        run.config.recompute_num_layers = 4
        run.forward_and_backward(0)
        return all((even[name] == gradient).all() for name, gradient in run.gradients().items())


def test_the_uniform_method_where_its_number_does_not_divide() -> None:
    """What the refusal is about: Megatron looks for a layer after the last, or from 0.17 on stops there."""
    try:
        assert run_ranks(in_world, 1, uniform_on_an_odd_stage) == [True]
    except RankFailed as failure:
        assert "IndexError" in str(failure)


def test_the_configuration_says_what_megatron_reads() -> None:
    config = dense()
    apply_layout(config, TWO_VIRTUAL, [[1, 2], [0, 1]])
    assert str(config.pipeline_model_parallel_layout) == TWO_VIRTUAL
    assert config.virtual_pipeline_model_parallel_size == 2
    assert not config.batch_p2p_comm
    config = dense(pipeline_model_parallel_size=3)
    apply_layout(config, "Et|ttt|ttL")
    assert config.virtual_pipeline_model_parallel_size is None
    assert config.batch_p2p_comm
