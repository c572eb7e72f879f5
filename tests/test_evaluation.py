"""Evaluation: what is refused without the harness, and with it a toy model on a task from a local file."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from nemo_skymoe import evaluation
from nemo_skymoe.checkpoint.hugging_face.exported_files import extras
from nemo_skymoe.checkpoint.hugging_face.opening import open_hugging_face
from nemo_skymoe.cli import app
from nemo_skymoe.config import ConfigurationError
from tests.cases import every
from tests.checkpoint import hf_models

harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="lm-evaluation-harness (extra `eval`) is not installed",
)
WORDS = [f"w{number}" for number in range(hf_models.VOCAB_SIZE - 3)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Skywork-MoE as it is exported, with its modeling files and a tokenizer of words."""
    folder = tmp_path_factory.mktemp("exported") / "moe"
    hf_models.skywork_moe(folder, dtype=torch.float32, num_experts=[4])
    vocab = {word: number for number, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    words: Any = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    made = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    made.save_pretrained(folder)
    _, description = open_hugging_face(folder)
    for name, content in extras(description, folder).items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def questions() -> list[dict[str, Any]]:
    """Each with four answers of one word."""
    draw = torch.Generator().manual_seed(1)
    numbers = torch.randint(len(WORDS), (24, 10), generator=draw).tolist()
    return [
        {
            "question": " ".join(WORDS[n] for n in row[:6]),
            "choices": [WORDS[n] for n in row[6:]],
            "answer": row[0] % 4,
        }
        for row in numbers
    ]


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory, questions: list[dict[str, Any]]) -> Path:
    folder = tmp_path_factory.mktemp("task")
    (folder / "data.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    (folder / "toy.yaml").write_text(f"""
task: toy_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder / "data.jsonl"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
""")
    return folder / "toy.yaml"


def accuracy(model: Path, questions: list[dict[str, Any]]) -> float:
    """The same by transformers alone: the answer whose one token is likeliest."""
    loaded = AutoModelForCausalLM.from_pretrained(model, trust_remote_code=True).eval()
    right = 0
    for question in questions:
        ids = torch.tensor([[WORDS.index(word) + 3 for word in question["question"].split()]])
        with torch.no_grad():
            logits = loaded(ids).logits[0, -1]
        answers = [logits[WORDS.index(word) + 3].item() for word in question["choices"]]
        right += answers.index(max(answers)) == question["answer"]
    return right / len(questions)


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))


@harness
@pytest.mark.usefixtures("offline")
def test_a_toy_model_on_a_task_from_a_local_file(
    model: Path, task: Path, questions: list[dict[str, Any]]
) -> None:
    expected = accuracy(model, questions)
    assert 0 < expected < 1
    (score,) = evaluation.evaluate(model, [str(task)], batch_size=2)
    assert (score.task, score.metric, score.reported) == ("toy_choices", "acc,none", None)
    assert score.value == expected
    answer = CliRunner().invoke(app, ["evaluate", str(model), "--tasks", str(task), "--limit", "3", "--json"])
    assert answer.exit_code == 0, answer.output
    (limited,) = json.loads(answer.stdout.splitlines()[-1])
    assert limited["value"] == accuracy(model, questions[:3])


@harness
@pytest.mark.usefixtures("offline")
def test_a_benchmark_stands_beside_the_reports_figure(
    model: Path, task: Path, questions: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark = evaluation.Benchmark("Toy", "toy_choices", 0, "acc,none", 82.2)
    monkeypatch.setattr(evaluation, "TABLE_1", (benchmark,))
    answer = CliRunner().invoke(app, ["evaluate", str(model), "--tasks", str(task)])
    assert answer.exit_code == 0, answer.output
    heading, line = answer.stdout.splitlines()[-2:]
    assert heading.split() == ["task", "shots", "metric", "score", "report"]
    assert line.split()[:3] == ["Toy", "0", "acc,none"] and line.split()[-1] == "82.2"
    assert line.split()[3] == f"{100 * accuracy(model, questions):.1f}"


@harness
def test_the_harness_has_the_tasks_of_table_1() -> None:
    from lm_eval.tasks import TaskManager  # type: ignore[import-not-found]

    manager = TaskManager()
    assert {benchmark.task for benchmark in evaluation.TABLE_1} <= set(manager.all_tasks)


@harness
@every(
    ("tasks", "options", "message"),
    [
        (["no_such_task"], {}, "lm-evaluation-harness has no task 'no_such_task', expected table1"),
        (["missing.yaml"], {}, "the task 'missing.yaml' is not there"),
        (["table1"], {}, "'humaneval' runs the programs that the model writes"),
        (["table1"], {"num_fewshot": 3}, "num_fewshot is 3, expected none for table1"),
    ],
)
def test_what_cannot_be_evaluated_is_named(
    model: Path, tasks: list[str], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        evaluation.evaluate(model, tasks, **options)


def test_folders_that_are_no_exported_model_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(ConfigurationError, match=r"has no config.json"):
        evaluation.evaluate(tmp_path, ["table1"])
    (tmp_path / "weights").mkdir()
    with pytest.raises(ConfigurationError, match=r"export it first with skymoe convert .* --to hf"):
        evaluation.evaluate(tmp_path, ["table1"])


def test_without_the_harness_the_answer_is_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    answer = CliRunner().invoke(app, ["evaluate", str(tmp_path)])
    assert answer.exit_code == 2
    assert answer.output.strip() == (
        "skymoe: evaluation needs lm-evaluation-harness, which is not installed: pip install -e '.[nemo,eval]'"
    )


def test_table_1_is_the_reports() -> None:
    assert {benchmark.title: benchmark.reported for benchmark in evaluation.TABLE_1} == {
        "C-Eval": 82.2, "CMMLU": 79.5, "MMLU": 77.4, "GSM8K": 76.1, "MATH": 31.9, "HumanEval": 43.9,
    }  # fmt: skip
