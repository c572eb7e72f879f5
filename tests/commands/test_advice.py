"""`skymoe advise` as a user meets it."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from nemo_skymoe.cli import app
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.quantities import parse_tokens
from tests.cases import every
from tests.checkpoint import hf_models

REPORT = shlex.split(
    "--model skywork-moe-146b --hardware A800-80G --num-gpus 1536 --seq-length 8192 --global-batch-size 2048"
)


def run(*options: str) -> Result:
    return CliRunner().invoke(app, ["advise", *REPORT, *options])


def test_the_text_says_what_the_json_says() -> None:
    options = (
        "--dense-tokens",
        "3.2T",
        "--moe-tokens",
        "500B",
        "--dense-max-lr",
        "6e-4",
        "--dense-min-lr",
        "6e-5",
    )
    answer = run(*options)
    found = json.loads(run(*options, "--json").stdout)
    assert (answer.exit_code, answer.stderr) == (0, "")
    assert answer.stdout.startswith("upcycle, sunk cost\n") and found["answer"] == "upcycle"
    assert all(line in answer.stdout for line in found["reasons"] + found["evidence"])
    for model in (found["dense"], found["moe"]):
        assert f"{model['gpu_hours']:,.0f}" in answer.stdout and f"{model['flops']:.3g}" in answer.stdout
        assert f"{model['tokens_per_gpu_per_second']:,.0f} tokens/GPU/s" in answer.stdout
    decides = [measure for measure in found["measures"] if measure["decides"]]
    assert [measure["ratio"] for measure in decides] == [0.3125]
    assert f"{found['activated_parameters_ratio']:.2f} times" in answer.stdout
    assert found["activated_parameters_ratio"] == pytest.approx(20 / 12, rel=1e-3)
    assert found["report"] == {"gpu_hours": 2, "activated_parameters": 1.7}
    assert (
        "cosine from 4 times the dense model's last rate, at most its peak, to its last rate (0.00024 to 6e-05)"
        in (answer.stdout)
    )


def test_without_the_dense_models_rates_there_is_none() -> None:
    options = ("--dense-tokens", "3.2T", "--moe-tokens", "500B")
    text = run(*options).stdout
    assert (
        "the report gives rates for its 0.3B model alone" in text
        and "--dense-max-lr and --dense-min-lr" in text
    )
    (schedule,) = json.loads(run(*options, "--json").stdout)["schedules"]
    assert (schedule["max_lr"], schedule["min_lr"]) == (None, None)
    assert schedule["peak"].startswith("4 times the dense model's last rate")


def test_no_dense_checkpoint() -> None:
    answer = run("--moe-tokens", "1T")
    assert answer.exit_code == 0 and answer.stdout.startswith(
        "from scratch, sunk cost\nThere is no dense checkpoint"
    )


def test_a_dense_model_by_its_folder(tmp_path: Path) -> None:
    hf_models.llama(tmp_path / "dense")
    given = ["--hardware", "A800-80G", "--num-gpus", "1", "--seq-length", "256", "--global-batch-size", "64"]
    given += ["--dense-tokens", "1B", "--moe-tokens", "1B"]
    sizes = "num_layers=2,hidden_size=64,ffn_hidden_size=96,num_attention_heads=4,vocab_size=419"
    answers = [
        subprocess.run(
            [sys.executable, "-m", "nemo_skymoe", "advise", *given, *model, "--json"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for model in (
            ["--dense", str(tmp_path / "dense"), "--num-experts", "8", "--moe-router-topk", "1"],
            ["--model", f"{sizes},num_moe_experts=8,moe_router_topk=1"],
        )
    ]
    assert json.loads(answers[0]) == json.loads(answers[1])
    hf_models.skywork_moe(tmp_path / "moe")
    for model, message in (
        ([], "model and dense are both absent, expected one of --model and --dense"),
        (
            ["--dense", str(tmp_path / "dense"), "--model", "skywork-moe-146b"],
            "model and dense are both given",
        ),
        (["--dense", str(tmp_path / "moe")], "an MoE of 4 experts, expected a dense checkpoint"),
        (["--dense", str(tmp_path / "nowhere")], "is not a folder"),
    ):
        answer = CliRunner().invoke(app, ["advise", *given, *model])
        assert (answer.exit_code, answer.stdout) == (2, "") and message in answer.stderr


def test_cumulative() -> None:
    answer = run("--dense-tokens", "3.2T", "--moe-tokens", "500B", "--cost", "cumulative")
    assert answer.stdout.startswith("from scratch, cumulative cost\n") and "decides" not in answer.stdout
    assert "2,100B tokens of the MoE from scratch" in answer.stdout


@every(
    ("options", "message"),
    [
        (["--moe-tokens", "many"], "moe_tokens is 'many', expected a number of tokens such as 300B"),
        (
            ["--moe-tokens", "1B", "--dense-tokens", "-3B"],
            "dense_tokens is '-3B', expected a number of tokens",
        ),
        (
            ["--moe-tokens", "1B", "--dense-tokens", "1e400"],
            "dense_tokens is '1e400', expected a number of tokens",
        ),
        (
            ["--moe-tokens", "1B", "--capacity-factor", "nan"],
            "capacity_factor is nan, expected a finite number",
        ),
        (
            ["--moe-tokens", "1B", "--dense-max-lr", "1e400", "--dense-min-lr", "1"],
            "dense_max_lr is inf, expected",
        ),
        (["--moe-tokens", "1B", "--cost", "free"], "cost is 'free', expected sunk or cumulative"),
        (["--moe-tokens", "1B", "--model", "skywork-13b"], "model has no num_moe_experts"),
    ],
)
def test_bad_input_is_one_sentence(options: list[str], message: str) -> None:
    answer = run(*options)
    assert (answer.exit_code, answer.stdout) == (2, "")
    assert answer.stderr.startswith("skymoe: ") and message in answer.stderr
    assert answer.stderr.count("\n") == 1


@every(
    ("text", "tokens"),
    [("300B", 300 * 10**9), ("1.2t", 12 * 10**11), ("3e11", 3 * 10**11), ("5", 5), ("0.1M", 10**5)],
)
def test_tokens(text: str, tokens: int) -> None:
    assert parse_tokens("tokens", text) == tokens


@every(
    "text",
    [
        "",
        "B",
        "0",
        "nanB",
        "infinity",
        "1.5",
        "1 000B",
        "3Q",
        "1e400",
        "1e999999999",
        "-1e400",
        "9" * 500,
        "1e19",
    ],
)
def test_what_is_no_number_of_tokens(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"tokens is .*, expected a number of tokens"):
        parse_tokens("tokens", text)
