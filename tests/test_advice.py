"""`advise` against section 3.3's own examples, its bounds, and the planner."""

from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from nemo_skymoe.advice import figure1, rule
from nemo_skymoe.advice.advising import Advice, advise
from nemo_skymoe.advice.cost import Cluster, training_cost
from nemo_skymoe.advice.reasons import reasons
from nemo_skymoe.advice.rule import Answer
from nemo_skymoe.architecture import SKYWORK_13B, SKYWORK_MOE_146B, Architecture
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.experiments import figure_1
from nemo_skymoe.pipeline.planning import plan
from tests.cases import every

B = 10**9
FIGURE_1 = Architecture(24, 896, 2304, 14, vocab_size=65536, num_moe_experts=8)


def asked(moe_tokens: int, dense_tokens: int | None, **more: Any) -> Advice:
    options: dict[str, Any] = {
        "model": FIGURE_1,
        "hardware": "A800-80G",
        "num_gpus": 8,
        "dense_tokens": dense_tokens,
    }
    return advise(moe_tokens=moe_tokens, **options | more)


@every(
    ("tokens", "ratio", "answer"),
    [
        (100 * B, Fraction(2, 3), Answer.GREY),
        (300 * B, Fraction(2), Answer.SCRATCH),
        (100 * B - 1, None, Answer.UPCYCLE),
        (300 * B - 1, None, Answer.GREY),
        (B, Fraction(2, 300), Answer.UPCYCLE),
        (10_000 * B, Fraction(200, 3), Answer.SCRATCH),
    ],
)
def test_the_reports_examples_and_what_is_beside_the_bounds(
    tokens: int, ratio: Fraction | None, answer: Answer
) -> None:
    found = asked(tokens, 300 * B)
    assert found.answer is answer
    assert found.deciding is not None and ratio in (None, found.deciding.ratio)


def test_figure_1_is_the_recipes() -> None:
    dense = (figure1.DENSE_MAX_LR, figure1.DENSE_MIN_LR, figure_1.DENSE.tokens)
    assert dense == (3e-3, 3e-4, 300e9)
    settings = [(start.max_lr, start.shape) for start in figure1.STARTS]
    assert settings == [(3e-3, "cosine"), (1.8e-3, "cosine"), (3e-4, "constant"), (1.2e-3, "cosine")]
    assert set(figure1.SCRATCH.losses) == {name.upper() for name in figure_1.BUDGETS}


def test_at_figure_1s_rates_the_schedules_are_figure_1s() -> None:
    (finished,) = asked(50 * B, 300 * B).schedules
    (early,) = asked(20 * B, 100 * B, dense_schedule_tokens=300 * B).schedules
    (scratch,) = asked(300 * B, None).schedules
    assert [(s.start, s.min_lr) for s in (finished, early, scratch)] == [
        (figure1.FINISHED, 3e-4),
        (figure1.EARLY, 3e-4),
        (figure1.SCRATCH, 3e-4),
    ]
    for schedule in (finished, early, scratch):
        assert schedule.max_lr == pytest.approx(schedule.start.max_lr)


def test_schedules_follow_the_dense_models_rates() -> None:
    rates: dict[str, Any] = {"dense_max_lr": 6e-4, "dense_min_lr": 6e-5}
    (finished,) = asked(50 * B, 300 * B, **rates).schedules
    (early,) = asked(20 * B, 100 * B, dense_schedule_tokens=300 * B, **rates).schedules
    assert (finished.max_lr, early.max_lr, early.min_lr) == pytest.approx((2.4e-4, 3.6e-4, 6e-5))
    (capped,) = asked(50 * B, 300 * B, dense_max_lr=1e-4, dense_min_lr=1e-4).schedules
    assert capped.max_lr == 1e-4


def test_no_rate_is_offered_for_a_size_without_a_basis() -> None:
    for model in (SKYWORK_MOE_146B, replace(FIGURE_1, num_layers=23), replace(FIGURE_1, hidden_size=1792)):
        for schedule in asked(200 * B, 300 * B, model=model, num_gpus=512).schedules:
            assert (schedule.max_lr, schedule.min_lr) == (None, None)
            assert not any(character.isdigit() for character in str(schedule).replace("4 times", ""))
    (schedule,) = asked(
        B, 300 * B, dense_max_lr=6e-4, dense_min_lr=6e-5, model=SKYWORK_MOE_146B, num_gpus=512
    ).schedules
    assert str(schedule).endswith("(0.00024 to 6e-05)")


def test_the_projects_own_contradiction_is_told_in_its_own_figures() -> None:
    """Where the miniature's results change, so must the sentence."""
    page = (Path(__file__).parents[1] / "benchmarks" / "paper" / "results" / "figure1.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if " | " in line]
    won = {
        budget: [
            row[3].partition(" ")[0].removeprefix("-")
            for row in rows
            if row[1].startswith(budget) and row[3].startswith("-")
        ]
        for budget in figure1.MINIATURE
    }
    for budget, (least, most) in figure1.MINIATURE.items():
        assert (f"{float(min(won[budget])):.3f}", f"{float(max(won[budget])):.3f}") == (least, most)
        assert f"{least} to {most}" in reasons(asked(300 * B, 300 * B))[1]
    assert "contradicts it" in reasons(asked(300 * B, 300 * B))[1]
    assert any("contradicts it" in reason for reason in reasons(asked(B, 300 * B, cost="cumulative")))


def test_the_grey_zone_says_why_and_gives_both_schedules() -> None:
    found = asked(200 * B, 300 * B)
    assert found.answer is Answer.GREY
    assert [schedule.start for schedule in found.schedules] == [figure1.FINISHED, figure1.SCRATCH]
    assert "tried nothing in between" in reasons(found)[0]


@every("cost", ["sunk", "cumulative"])
def test_without_a_dense_checkpoint_from_scratch(cost: str) -> None:
    found = asked(B, None, cost=cost)
    assert (found.answer, found.measures, found.same_cost_tokens) == (Answer.SCRATCH, (), None)
    assert "There is no dense checkpoint" in reasons(found)[0]


def test_training_a_dense_model_to_upcycle_it_is_argued_against_with_figures() -> None:
    assert asked(50 * B, 300 * B).answer is Answer.UPCYCLE
    found = asked(50 * B, 300 * B, cost="cumulative")
    assert found.answer is Answer.SCRATCH and found.dense is not None
    assert found.same_cost_tokens == 200 * B  # 300B dense tokens are 150B of the MoE's
    text = " ".join(reasons(found))
    assert "1.33 C_dense" in text and f"{found.dense.gpu_hours + found.moe.gpu_hours:,.0f} GPU-hours" in text
    assert "200B tokens of the MoE from scratch" in text and "reached 2.285" in text


def test_gpu_hours_and_flops_are_the_planners() -> None:
    cluster = Cluster.of("A800-80G", 512, 4096, 4096)
    cost = training_cost(SKYWORK_13B, 3200 * B, cluster)
    published = plan(
        SKYWORK_13B,
        "A800-80G",
        num_gpus=512,
        pipeline_parallel=2,
        seq_length=4096,
        global_batch_size=4096,
        layers=[26, 26],
    )
    assert cost.plan.tokens_per_gpu_per_second >= published.tokens_per_gpu_per_second
    assert cost.gpu_hours * 3600 * cost.plan.tokens_per_gpu_per_second == pytest.approx(3200 * B)
    assert cost.flops == pytest.approx(3200 * B * 93.1e9, rel=1e-3)
    # 39 days of 512 GPUs (arXiv 2310.19341, Table 10), which did not hide the reduction of gradients
    exposed = plan(
        SKYWORK_13B,
        "A800-80G",
        num_gpus=512,
        pipeline_parallel=2,
        seq_length=4096,
        global_batch_size=4096,
        layers=[26, 26],
        overlap_grad_reduce=False,
    )
    assert 3200 * B / exposed.tokens_per_gpu_per_second / 3600 == pytest.approx(39 * 24 * 512, rel=0.03)
    assert cost.gpu_hours < 39 * 24 * 512


def test_the_ratio_of_flops_is_counted_on_the_given_model() -> None:
    found = asked(300 * B, 300 * B)
    flops = next(measure for measure in found.measures if measure.name == "FLOPs")
    more = 6 * FIGURE_1.num_layers * (FIGURE_1.expert_parameters + FIGURE_1.router_parameters) * 300 * B
    assert flops.moe - flops.dense == pytest.approx(more, rel=1e-9)


def test_the_reports_factor_is_of_two_experts_a_token() -> None:
    found = asked(100 * B, 300 * B, model=replace(FIGURE_1, moe_router_topk=4))
    assert found.deciding is not None and found.dense is not None
    assert [measure.name for measure in found.measures] == ["GPU-hours, predicted", "FLOPs"]
    assert found.deciding.ratio == found.moe.gpu_hours / found.dense.gpu_hours
    assert found.answer is rule.answer(found.deciding.ratio)


def test_measures_that_answer_otherwise_are_named() -> None:
    found = asked(100 * B, 300 * B)
    others = [measure for measure in found.measures if measure.answer is not found.answer]
    assert others and len(reasons(found)) == 2 + len(others)
    assert all(any(measure.name in line for line in reasons(found)) for measure in others)


@every(
    ("options", "message"),
    [
        ({"model": SKYWORK_13B}, "model has no num_moe_experts, expected the MoE"),
        ({"moe_tokens": 0}, "moe_tokens is 0, expected an integer of at least 1"),
        ({"dense_tokens": -1}, "dense_tokens is -1, expected an integer of at least 1"),
        ({"dense_schedule_tokens": 5}, r"dense_schedule_tokens is 5, expected at least dense_tokens \(300"),
        ({"dense_tokens": None, "dense_schedule_tokens": 5}, "dense_schedule_tokens is 5, expected at least"),
        ({"cost": "free"}, "cost is 'free', expected sunk or cumulative"),
        ({"dense_max_lr": 0.1, "dense_min_lr": 1.0}, r"dense_min_lr is 1, expected at most dense_max_lr \(0.1\)"),
        ({"dense_min_lr": 1.0}, "dense_min_lr is given without dense_max_lr, expected both"),
        ({"dense_max_lr": 1.0}, "dense_max_lr is given without dense_min_lr, expected both"),
        ({"dense_max_lr": float("inf"), "dense_min_lr": 1.0}, "dense_max_lr is inf, expected a finite number"),
        ({"dense_max_lr": 1.0, "dense_min_lr": float("nan")}, "dense_min_lr is nan, expected a finite number"),
        ({"dense_tokens": 10**400}, "dense_tokens is 1000.*, expected an integer of at least 1 and at most 1e.18"),
        ({"capacity_factor": float("inf")}, "capacity_factor is inf, expected a finite number"),
        ({"hardware": "V100"}, "hardware is 'V100', expected one of A800-80G"),
        ({"num_gpus": 0}, "num_gpus is 0, expected an integer of at least 1"),
        ({"model": SKYWORK_MOE_146B, "num_gpus": 8}, "num_gpus is 8 A800-80G .* no parallel sizes train the MoE"),
        ({"num_gpus": 31}, "num_gpus is 31 .* global_batch_size 1024: no parallel sizes train the MoE"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        asked(**{"moe_tokens": B, "dense_tokens": 300 * B} | options)
