"""`plan`: what comes out for the report's 146B model and others, and what is refused."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from nemo_skymoe.architecture import SKYWORK_13B, SKYWORK_MOE_146B, Architecture
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.pipeline import plan
from nemo_skymoe.pipeline.hardware import A800_80G, H200
from tests.cases import every

REPORT: dict[str, Any] = {
    "model": "skywork-moe-146b",
    "hardware": "A800-80G",
    "num_gpus": 1536,
    "tensor_parallel": 4,
    "expert_parallel": 4,
    "pipeline_parallel": 12,
    "seq_length": 8192,
    "global_batch_size": 2048,
    "capacity_factor": 1.25,
    "pad_to_capacity": True,
    "overlap_grad_reduce": False,
}


def report(**options: Any):
    return plan(**{**REPORT, **options})


def megatron_layers(layout: str) -> list[str]:
    """Megatron's grammar for what we print: (..)*n repeats, x*n repeats a letter, | ends a chunk."""
    layout = re.sub(r"\(([^()]*)\)\*(\d+)", lambda match: match[1] * int(match[2]), layout)
    layout = re.sub(r"(\w)\*(\d+)", lambda match: match[1] * int(match[2]), layout)
    return layout.split("|")


def test_the_reports_run_is_planned():
    found = report()
    chunks = megatron_layers(found.layout)
    assert len(chunks) == 12
    assert chunks[0].startswith("E") and chunks[-1].endswith("L")
    assert "".join(chunks).count("t") == 52
    assert [chunk.count("t") for chunk in chunks] == [sum(stage.layers) for stage in found.stages]
    assert all(stage.memory <= found.memory_limit == A800_80G.memory for stage in found.stages)
    assert found.training.data_parallel == 32
    assert found.training.sequence_parallel
    # No layer has to be recomputed, so none is, although there is slack for it.
    assert sum(map(sum, found.recompute)) == 0
    assert sum(stage.free_recompute for stage in found.stages) > 0


def test_the_reports_throughput_is_predicted_within_ten_percent():
    """690 tokens/GPU/s are published, padding, capacity and batch are not: padded to 1.25 and 16M tokens are assumed."""
    assert report(overlap_grad_reduce=True).tokens_per_gpu_per_second == pytest.approx(690, rel=0.1)


def test_figures_belong_together():
    found = report()
    tokens = 2048 * 8192
    assert found.tokens_per_gpu_per_second == pytest.approx(tokens / found.step_time / 1536)
    assert found.mfu == pytest.approx(found.tokens_per_gpu_per_second * 157.888e9 / 312e12, rel=1e-4)
    assert found.padded_mfu == pytest.approx(found.tokens_per_gpu_per_second * 184.39e9 / 312e12, rel=1e-4)
    slowest = max(stage.time for stage in found.stages)
    for stage in found.stages:
        assert stage.slack == pytest.approx(slowest - stage.time)
        assert stage.memory + stage.memory_slack == pytest.approx(80e9)
    busy = sum(stage.time for stage in found.stages)
    assert found.step_time >= 63 * slowest + busy / 12
    assert 0 < found.bubble < 1


def test_free_recomputation_fits_into_the_slack():
    found = report()
    layer = found.solution.problem.blocks[1]
    for stage in found.stages:
        assert stage.free_recompute == min(sum(stage.layers), int(stage.slack / layer.recompute))


def test_less_memory_is_bought_with_other_layouts_then_with_recomputation():
    limits = (80e9, 50e9, 45e9, 40e9)
    found = [report(memory_limit=limit) for limit in limits]
    for limit, plan_ in zip(limits, found, strict=True):
        assert max(stage.memory for stage in plan_.stages) <= limit
    times = [plan_.step_time for plan_ in found]
    assert times == sorted(times) and times[0] < times[1]
    spent = [sum(map(sum, plan_.recompute)) for plan_ in found]
    assert spent[:2] == [0, 0] and 0 < spent[2] < spent[3]
    # The first stages hold most micro-batches, so that is where layers recompute.
    assert sum(found[2].recompute[0]) > sum(found[2].recompute[-1])


def test_what_is_missing_is_said():
    with pytest.raises(ConfigurationError) as refused:
        report(memory_limit=20e9)
    found = re.search(r"needs ([\d.]+) GB more on stage \d+ of 12", str(refused.value))
    assert found, refused.value
    missing = float(found[1])
    assert "memory_limit of 20.0 GB less 3.5 GB" in str(refused.value)
    # Exactly that much: with it there is a plan, with 20 MB less there is none.
    report(memory_limit=20e9 + missing * 1e9 + 0.01e9)
    with pytest.raises(ConfigurationError):
        report(memory_limit=20e9 + missing * 1e9 - 0.02e9)


def test_recomputation_can_be_forbidden():
    with pytest.raises(ConfigurationError, match="recompute is off") as refused:
        report(memory_limit=40e9, recompute=False)
    assert "recomputed" not in str(refused.value)
    assert report(recompute=False).layout == report().layout


def test_a_given_layout_is_predicted():
    planned = report()
    layers = [sum(stage.layers) for stage in planned.stages]
    assert report(layers=layers).step_time == pytest.approx(planned.step_time)
    late = report(layers=[4] * 8 + [5] * 4)
    assert late.step_time > planned.step_time
    assert late.layout == "Et*4|(t*4|)*7(t*5|)*3t*5L"


def test_a_given_layout_recomputes_only_until_it_fits():
    found = report(layers=[4] * 8 + [5] * 4, memory_limit=42e9)
    assert all(stage.memory <= 42e9 for stage in found.stages)
    first = found.stages[0]
    fewer = replace(found.solution, recomputed=(first.recomputed[0] - 1, *found.solution.recomputed[1:]))
    assert fewer.memory_slack[0] < 0
    with pytest.raises(ConfigurationError, match=r"stage 0 of 12 needs \d+\.\d\d GB more"):
        report(layers=[41] + [1] * 11)


@every("layers", [[4] * 12, [52], [5, 5, 5, 5, 4, 4, 4, 4, 4, 4, 4, 5]])
def test_a_given_layout_has_to_add_up(layers: list[int]):
    with pytest.raises(ConfigurationError, match=r"expected 52 in 12 stages x 1 virtual stages"):
        report(layers=layers)


def test_virtual_stages():
    once = report(global_batch_size=60 * 32)
    found = report(global_batch_size=60 * 32, virtual_pipeline=2)
    assert len(megatron_layers(found.layout)) == 24
    assert all(len(stage.layers) == len(stage.recomputed) == 2 for stage in found.stages)
    # Half the bubble in filling and draining, more micro-batches in flight.
    assert found.step_time < once.step_time
    assert found.stages[0].memory > once.stages[0].memory


def test_the_13b_on_its_published_cluster():
    """Planned freely, the model is no slower than with the even split it was fitted to."""
    options: dict[str, Any] = {"pipeline_parallel": 2, "num_gpus": 512, "global_batch_size": 4096}
    options["overlap_grad_reduce"] = False  # as it was fitted
    planned = plan(SKYWORK_13B, A800_80G, seq_length=4096, **options)
    even = plan(SKYWORK_13B, A800_80G, seq_length=4096, layers=[26, 26], **options)
    assert even.tokens_per_gpu_per_second == pytest.approx(1873, abs=0.5)
    assert planned.step_time <= even.step_time
    assert planned.mfu == planned.padded_mfu


def test_faster_hardware_is_faster():
    assert report(hardware=H200).step_time < report().step_time / 2


def test_a_model_by_its_dimensions():
    sizes: dict[str, Any] = {
        "num_layers": 24,
        "hidden_size": 2048,
        "ffn_hidden_size": 8192,
        "num_attention_heads": 16,
        "vocab_size": 32000,
    }
    options: dict[str, Any] = {
        "pipeline_parallel": 4,
        "num_gpus": 8,
        "seq_length": 4096,
        "global_batch_size": 64,
    }
    found = plan(sizes, "H100", **options)
    assert found.layout == plan(Architecture(**sizes), "h100", **options).layout
    with pytest.raises(
        ConfigurationError, match=r"model has \['layers'\], expected some of \[.*'ffn_hidden_size'"
    ):
        plan({**sizes, "layers": 24}, "H100", **options)
    with pytest.raises(ConfigurationError, match="missing 1 required positional argument: 'vocab_size'"):
        plan({name: size for name, size in sizes.items() if name != "vocab_size"}, "H100", **options)


def test_a_measured_profile_replaces_what_is_counted():
    counted = report()
    layer = counted.solution.problem.blocks[1]
    slower = report(profile={"layer": {"forward": 2 * layer.forward, "backward": 2 * layer.backward}})
    measured = slower.solution.problem.blocks[1]
    assert measured == replace(
        layer, forward=2 * layer.forward, backward=2 * layer.backward, recompute=2 * layer.forward
    )
    assert slower.step_time > 1.9 * counted.step_time
    rows = [{"forward": layer.forward * (1 + (index >= 26))} for index in range(52)]
    uneven = report(profile={"layer": rows})
    assert sum(uneven.stages[0].layers) > sum(uneven.stages[-1].layers)


@every(
    ("profile", "message"),
    [
        ({"layers": {}}, r"profile has \['layers'\], expected embedding, layer and head"),
        ({"layer": [{}] * 51}, "profile has 51 layers, expected the model's 52"),
        ({"layer": {"time": 1.0}}, "layer has 'time', expected forward, backward"),
        ({"head": {"forward": -1.0}}, "forward of head is -1.0, expected a number of at least 0"),
        ({"head": 1.0}, "head is 1.0, expected an object"),
    ],
)
def test_a_wrong_profile_is_refused(profile: dict, message: str):
    with pytest.raises(ConfigurationError, match=message):
        report(profile=profile)


@every(
    ("options", "message"),
    [
        ({"model": "gpt"}, "model is 'gpt', expected one of skywork-13b, skywork-moe-146b"),
        ({"hardware": "V100"}, "hardware is 'V100', expected one of A800-80G"),
        (
            {"num_gpus": 1000},
            r"num_gpus is 1000, expected a multiple of tensor_parallel \(4\) x pipeline_parallel",
        ),
        ({"num_gpus": None}, "neither num_gpus nor data_parallel is given"),
        (
            {"data_parallel": 16},
            "num_gpus is 1536, expected tensor_parallel x context_parallel x pipeline_parallel x data_parallel",
        ),
        ({"expert_parallel": 3}, "expert_parallel is 3, expected a divisor of num_moe_experts"),
        (
            {"pipeline_parallel": 64, "num_gpus": 256 * 4},
            "12 of them empty: expected at least one layer each",
        ),
        ({"memory_limit": 3e9}, "memory_limit is 3.0 GB, expected more than the 3.5 GB for context"),
        ({"zero": 1}, r"plan has no option \['zero'\]"),
    ],
)
def test_inconsistent_requests_are_refused_by_name(options: dict, message: str):
    with pytest.raises(ConfigurationError, match=message):
        report(**options)


def test_the_dictionary_is_json_with_everything_asked_and_found():
    found = report()
    table = json.loads(json.dumps(found.to_dict()))
    assert table["layout"] == found.layout
    assert table["stages"][0]["layers"] == list(found.stages[0].layers)
    assert table["stages"][11]["head"] and not table["stages"][11]["embedding"]
    assert table["model"]["parameters"] == SKYWORK_MOE_146B.parameters
    assert table["training"]["num_gpus"] == 1536
    assert table["mfu"]["value"] == found.mfu
    assert table["efficiency"]["compute"] == found.efficiency.compute


def test_the_package_does_not_load_numpy_until_something_is_planned():
    code = "import sys, nemo_skymoe.pipeline; assert not {'numpy', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
