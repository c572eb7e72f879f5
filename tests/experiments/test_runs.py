"""How long a training run is, and what follows from that."""

import math

import pytest

from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.experiments import choices, demonstration, dense_13b, figure_1, figure_7, figure_8, moe_146b
from nemo_skymoe.experiments.runs import Finetuning, steps


def test_steps_see_at_least_the_tokens() -> None:
    assert [steps(tokens, 8, 4) for tokens in (1, 32, 33)] == [1, 1, 2]
    for name, sizes in {
        "tokens": (0.0, 8, 4),
        "seq_length": (1e9, 0, 4),
        "global_batch_size": (1e9, 8, -1),
    }.items():
        with pytest.raises(ConfigurationError, match=f"{name} is .*, expected a finite number above 0"):
            steps(*sizes)
    with pytest.raises(ConfigurationError, match="tokens is nan"):
        steps(math.nan, 8, 4)


def test_a_decay_to_zero_comes_after_the_tokens() -> None:
    run = figure_7.MOE
    assert run.decay_steps == steps(10e9, run.seq_length, run.global_batch_size)
    assert run.max_steps == steps(300e9, run.seq_length, run.global_batch_size) + run.decay_steps
    assert figure_1.DENSE.decay_steps == 0


def test_checkpoints_are_saved_by_steps_or_by_tokens() -> None:
    assert figure_1.DENSE.save_interval == steps(10e9, choices.SEQUENCE, choices.BATCH)
    assert figure_1.moe("100b", "300b").save_interval == choices.SAVE_INTERVAL
    assert demonstration.MOE.save_interval == demonstration.MOE.max_steps


def test_a_finetuning_warms_up_for_a_tenth_of_its_steps_and_at_most_50() -> None:
    def warmup(max_steps: int) -> int:
        sizes = {"seq_length": 1, "global_batch_size": 1, "micro_batch_size": 1}
        return Finetuning(
            name="x", architecture=figure_1.SKYWORK_300M, max_steps=max_steps, **sizes
        ).warmup_steps

    assert [warmup(count) for count in (5, 100, 1000)] == [0, 10, 50]


def test_the_large_runs_have_the_reports_ranks() -> None:
    run = moe_146b.PRETRAINING
    ranks = run.num_nodes * run.num_gpus_per_node
    assert ranks == 1536 and ranks // (run.edp * run.pipeline_parallelism) == 32
    dense = dense_13b.PRETRAINING
    assert dense.num_nodes * dense.num_gpus_per_node // dense.pipeline_parallelism == 256


def test_a_specialised_source_continues_the_dense_run_where_its_learning_rate_ended() -> None:
    assert figure_8.SPECIALISED.max_lr == figure_8.SPECIALISED.min_lr == figure_8.DENSE.min_lr
    assert figure_8.SPECIALISED.architecture == figure_8.DENSE.architecture
