"""`skymoe plan` as a user meets it."""

import json
import re
import shlex
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from nemo_skymoe.cli import app
from tests.cases import every
from tests.checkpoint import hf_models

SKYMOE = str(Path(sys.executable).with_name("skymoe"))
REPORT = shlex.split(
    "--model skywork-moe-146b --hardware A800-80G --num-gpus 1536 --tp 4 --ep 4 --pp 12 --seq-length 8192"
    " --global-batch-size 2048 --capacity-factor 1.25"
)


def run(*options: str) -> Result:
    return CliRunner().invoke(app, ["plan", *options])


def planned(*options: str) -> dict:
    answer = run(*options, "--json")
    assert answer.exit_code == 0, answer.stderr
    return json.loads(answer.stdout)


@pytest.fixture(scope="module")
def report() -> dict:
    return planned(*REPORT)


def test_the_table_says_what_the_json_says():
    padded = [*REPORT, "--pad-to-capacity"]
    answer, report = run(*padded), planned(*padded)
    assert (answer.exit_code, answer.stderr) == (0, "")
    rows = [line.split() for line in answer.stdout.splitlines() if re.match(r" *\d+ ", line)]
    assert [int(row[1]) for row in rows] == [sum(stage["layers"]) for stage in report["stages"]]
    assert "embedding" in rows[0] and "head" in rows[-1]
    assert [row[-2] for row in rows] == [f"{stage['memory'] / 1e9:.1f}" for stage in report["stages"]]
    assert f"layout      {report['layout']}\n" in answer.stdout
    assert f"{report['tokens_per_gpu_per_second']:.0f} tokens/GPU/s" in answer.stdout
    assert f"{report['mfu']['value']:.1%}" in answer.stdout
    assert report["mfu"]["formula"] in answer.stdout
    assert f"{report['padded_mfu']['value']:.1%} with the experts' padded capacity" in answer.stdout
    assert "not measured" in answer.stdout


def test_the_146b_is_planned_without_what_takes_seconds_to_import():
    """How many layouts are tried for it: tests/pipeline/test_planner.py."""
    code = """
import sys
from nemo_skymoe import cli
try:
    cli.app(sys.argv[1:])
except SystemExit as exit:
    assert not exit.code
heavy = {"torch", "megatron", "transformers", "nemo", "matplotlib", "scipy", "pandas"} & set(sys.modules)
assert not heavy, heavy
"""
    command = [sys.executable, "-c", code, "plan", *REPORT]
    answer = subprocess.run(command, capture_output=True, text=True)
    assert (answer.returncode, answer.stderr) == (0, "")


def test_a_model_by_its_dimensions_and_a_layout_of_ones_own():
    sizes = "num_layers=24,hidden_size=4608,ffn_hidden_size=12288,num_attention_heads=36,vocab_size=65536"
    options = ["--model", sizes, "--hardware", "H100", "--dp", "8", "--seq-length", "4096"]
    found = planned(*options, "--pp", "5", "--global-batch-size", "256", "--layers", "5,5,5,5,4")
    assert found["layout"] == "Et*5|(t*5|)*3t*4L"
    assert found["model"]["num_layers"] == 24
    assert found["training"]["num_gpus"] == 40


def planned_alone(*options: str) -> dict:
    """In a process of its own: what other tests import may write into the log of this one."""
    command = [sys.executable, "-m", "nemo_skymoe", "plan", *options, "--json"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_a_model_by_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    hf_models.llama(Path("skywork-13b"), num_key_value_heads=2)
    options = ["--hardware", "H100", "--dp", "1", "--seq-length", "256", "--global-batch-size", "4"]
    dimensions = "num_layers=2,hidden_size=64,ffn_hidden_size=96,num_attention_heads=4,vocab_size=419,num_query_groups=2"
    expected = planned("--model", dimensions, *options)
    for folder in ("./skywork-13b", str(tmp_path / "skywork-13b")):
        assert planned_alone("--model", folder, *options) == expected
    assert planned("--model", "skywork-13b", *options, "--pp", "4")["model"]["num_layers"] == 52  # the name
    for folder, message in (
        ("./nowhere", "'nowhere' is not a folder"),
        (".", "is no checkpoint itself: give"),
    ):
        answer = run("--model", folder, *options)
        assert answer.exit_code == 2 and message in answer.stderr and answer.stderr.count("\n") == 1


def test_memory_and_recomputation(report: dict):
    found = planned(*REPORT, "--memory-limit", "40")
    assert max(stage["memory"] for stage in found["stages"]) <= 40e9
    assert sum(map(sum, found["recompute"])) > 0 == sum(map(sum, report["recompute"]))


def test_a_profile_replaces_times(report: dict, tmp_path: Path):
    profile = tmp_path / "profile.json"
    profile.write_text(json.dumps({"layer": {"forward": 0.02, "backward": 0.04}}))
    found = planned(*REPORT, "--profile", str(profile))
    transfers = 2 * 2 * 4608 * 8192 / 4 / (12.5e9 * 0.8)
    stage = found["stages"][1]
    assert stage["time"] == pytest.approx(sum(stage["layers"]) * 0.06 + transfers)


def test_the_schedule_is_drawn(tmp_path: Path):
    picture = tmp_path / "schedule.svg"
    assert run(*REPORT, "--svg", str(picture)).exit_code == 0
    assert ElementTree.parse(picture).getroot().tag.endswith("svg")


def test_the_plan_is_written_into_a_file(report: dict, tmp_path: Path):
    file = tmp_path / "plans" / "report.json"
    for _ in range(2):
        assert run(*REPORT, "--output", str(file)).exit_code == 0
        assert json.loads(file.read_text()) == report
    assert list(file.parent.iterdir()) == [file]


@every(
    ("options", "message"),
    [
        (
            ["--tp", "5"],
            "num_gpus is 1536, expected a multiple of tensor_parallel (5) x pipeline_parallel (12)",
        ),
        (["--ep", "5"], "expert_parallel is 5, expected a divisor of num_moe_experts (16)"),
        (["--hardware", "V100"], "hardware is 'V100', expected one of A800-80G"),
        (["--model", "gpt"], "model is 'gpt', expected one of skywork-13b"),
        (["--model", "num_layers=x"], "num_layers is 'x', expected an integer"),
        (["--layers", "5,x"], "layers is 'x', expected an integer"),
        (["--profile", "absent.json"], "profile absent.json cannot be read: No such file"),
        (
            ["--svg", "absent/schedule.svg"],
            "svg is absent/schedule.svg, expected a file in an existing folder",
        ),
        (["--pp", "64", "--num-gpus", "1024"], "12 of them empty: expected at least one layer each"),
    ],
)
def test_what_cannot_be_planned_is_refused_by_name(options: list[str], message: str, tmp_path: Path):
    answer = run(*REPORT, *options)
    assert answer.exit_code == 2
    assert answer.stdout == ""
    assert answer.stderr.startswith("skymoe: ") and message in answer.stderr
    assert answer.stderr.count("\n") == 1


def test_what_is_missing_is_said_with_how_much():
    answer = run(*REPORT, "--memory-limit", "20")
    assert answer.exit_code == 2
    assert re.search(r"needs \d+\.\d\d GB more on stage \d+ of 12", answer.stderr)


def test_help_answers_before_anything_heavy_is_imported():
    code = """
import sys
from nemo_skymoe import cli
try:
    cli.app(["plan", "--help"])
except SystemExit as exit:
    assert exit.code == 0
assert not {"numpy", "rich", "torch"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_a_search_prints_its_best_and_writes_the_first(tmp_path: Path):
    model = "num_layers=4,hidden_size=512,ffn_hidden_size=1024,num_attention_heads=8,vocab_size=1000,num_moe_experts=4"
    options = ["--model", model, "--hardware", "H100", "--num-gpus", "4", "--seq-length", "1024"]
    options += ["--global-batch-size", "8", "--search", "--pp", "2"]
    best = planned(*options)
    assert [one["step_time"] for one in best] == sorted(one["step_time"] for one in best) and len(best) == 10
    assert {one["training"]["pipeline_parallel"] for one in best} == {2}
    answer = run(*options, "--output", str(tmp_path / "plan.json"))
    assert answer.exit_code == 0 and json.loads((tmp_path / "plan.json").read_text()) == best[0]
    [again] = re.findall(r"the first   (.*)", answer.stdout)
    assert planned(*options[:-3], *shlex.split(again)) == best[0]
    refused = run(*options, "--layers", "2,2")
    assert refused.exit_code == 2 and "layers is 2,2, expected none with search" in refused.stderr
