import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset
from transformers import AutoTokenizer

from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.data.corpus import (
    Corpus,
    build_corpus,
    is_held_out,
    load_corpus,
    validation_batches,
)
from nemo_skymoe.ranks import RankFailed, run_ranks

HELD_OUT = ["calendar.py", "html/parser.py", "json/decoder.py"]
# zoneinfo/_zoneinfo.py spells "<s>" in its text.
TRAIN = ["argparse.py", "code.py", "csv.py", "queue.py", "textwrap.py", "zoneinfo/_zoneinfo.py"]


def build_small(directory: Path, **changes) -> Corpus:
    request = {"vocab_size": 384, "valid_fraction": 0.3, "files": TRAIN + HELD_OUT}
    return build_corpus(directory, **(request | changes))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    return build_small(tmp_path_factory.mktemp("corpus"))


def documents(prefix: Path) -> list[np.ndarray]:
    dataset = IndexedDataset(str(prefix))
    assert np.array_equal(dataset.document_indices, np.arange(len(dataset) + 1))
    return [dataset[i].copy() for i in range(len(dataset))]


def snapshot(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize("split, names", [("train", TRAIN), ("valid", HELD_OUT)])
def test_documents_are_the_files_of_their_split(corpus, split, names):
    tokenizer = AutoTokenizer.from_pretrained(corpus.tokenizer)
    assert {*tokenizer("text")} == {"input_ids", "attention_mask"}  # `generate` takes nothing else
    found = documents(getattr(corpus, f"{split}_prefix"))
    stdlib = Path(os.__file__).parent
    for name, document in zip(names, found, strict=True):
        assert document.dtype == np.uint16
        assert document[-1] == 2
        assert document[:-1].min() > 2, "a special token inside the text"
        assert tokenizer.decode(document[:-1]) == (stdlib / name).read_bytes().decode()
    assert getattr(corpus, f"{split}_files") == len(names)
    assert getattr(corpus, f"{split}_tokens") == sum(map(len, found))
    assert getattr(corpus, f"{split}_bytes") == sum((stdlib / name).stat().st_size for name in names)


def test_split_depends_on_the_name_alone():
    names = [f"package/module_{i}.py" for i in range(2000)]
    held_out = {name for name in names if is_held_out(name, 0.05)}
    assert 70 <= len(held_out) <= 130
    assert held_out < {name for name in names if is_held_out(name, 0.1)}
    # Pinned: a corpus made by another version of this code must hold out the same files.
    assert [name for name in names[:100] if is_held_out(name, 0.05)] == [
        "package/module_12.py",
        "package/module_80.py",
    ]


def test_the_same_request_writes_the_same_bytes(corpus, tmp_path):
    build_small(tmp_path / "again")
    assert snapshot(tmp_path / "again") == snapshot(corpus.directory)


def test_tokenizer_loads_with_transformers(corpus):
    tokenizer = AutoTokenizer.from_pretrained(corpus.tokenizer)
    assert len(tokenizer) == tokenizer.vocab_size == corpus.vocab_size == 384
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    text = "  def f(x):\r\n\treturn 'Ünïcode \U0001f600'\x00"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_load_returns_what_build_returned(corpus):
    assert load_corpus(corpus.directory) == corpus


def test_second_build_reuses_the_corpus(corpus):
    def times():
        return {path: path.stat().st_mtime_ns for path in corpus.directory.rglob("*")}

    before = times()
    assert build_small(corpus.directory) == corpus
    assert times() == before


@pytest.mark.parametrize(
    "change", [{"vocab_size": 400}, {"valid_fraction": 0.4}, {"files": TRAIN + HELD_OUT[:2]}]
)
def test_a_finished_corpus_is_not_overwritten(corpus, change):
    before = snapshot(corpus.directory)
    with pytest.raises(
        ConfigurationError, match=r"holds another corpus \(vocab_size 384, valid_fraction 0.3"
    ):
        build_small(corpus.directory, **change)
    assert snapshot(corpus.directory) == before


def test_a_build_killed_at_any_step_does_not_load(corpus, tmp_path):
    steps = []
    build_small(tmp_path / "whole", progress=steps.append)
    assert len(steps) == 4

    def build_and_die(directory: Path, step: int) -> None:
        def progress(line: str) -> None:
            if line == steps[step]:
                os.kill(os.getpid(), signal.SIGKILL)

        build_small(directory, progress=progress)

    directory = tmp_path / "killed"
    for step in range(len(steps)):
        with pytest.raises(RankFailed, match="SIGKILL"):
            run_ranks(build_and_die, 1, directory, step, env={"TOKENIZERS_PARALLELISM": "false"})
        with pytest.raises(ConfigurationError, match="no finished corpus"):
            load_corpus(directory)
    build_small(directory)
    assert snapshot(directory) == snapshot(corpus.directory)


@pytest.mark.parametrize(
    "name", ["corpus.json", "train_text_document.bin", "valid_text_document.idx", "tokenizer/tokenizer.json"]
)
def test_a_damaged_corpus_is_refused_and_rebuilt(corpus, tmp_path, name):
    build_small(tmp_path)
    damaged = tmp_path / name
    if name.endswith((".bin", "corpus.json")):
        damaged.write_bytes(damaged.read_bytes()[:-10])
    else:
        damaged.unlink()
    with pytest.raises(ConfigurationError, match="no finished corpus"):
        load_corpus(tmp_path)
    build_small(tmp_path)
    assert snapshot(tmp_path) == snapshot(corpus.directory)


def test_missing_corpus_names_the_command(tmp_path):
    with pytest.raises(ConfigurationError, match=f"skymoe corpus {tmp_path}/none$"):
        load_corpus(tmp_path / "none")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"vocab_size": 258}, "vocab_size is 258: expected 259 to 65536"),
        ({"vocab_size": 65537}, "vocab_size is 65537"),
        ({"vocab_size": 60000}, "vocab_size is 60000: expected at most"),
        ({"valid_fraction": 0.0}, "valid_fraction is 0.0: expected"),
        ({"valid_fraction": 1}, "valid_fraction is 1: expected"),
        ({"valid_fraction": 0.01}, "splits 9 files into 9 for training and 0 held out"),
    ],
)
def test_bad_requests_leave_nothing_behind(tmp_path, change, message):
    with pytest.raises(ConfigurationError, match=message):
        build_small(tmp_path, **change)
    assert snapshot(tmp_path) == {}


def test_a_file_in_the_place_of_the_directory(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match=r"corpus directory .*/file: File exists"):
        build_small(tmp_path / "file")


def test_a_stripped_python_is_refused(tmp_path, monkeypatch):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "os.py").write_text("import sys\n")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / "lib"))
    with pytest.raises(ConfigurationError, match=r"0\.0 MB of source text: expected at least 8 MB"):
        build_corpus(tmp_path / "corpus")
    assert not (tmp_path / "corpus").exists()


def test_validation_batches_are_the_held_out_stream_in_order(corpus):
    stream = torch.from_numpy(np.concatenate(documents(corpus.valid_prefix)).astype(np.int64))
    batches = list(validation_batches(corpus, seq_length=16, batch_size=3, count=4))
    assert len(batches) == 4
    read = torch.cat([batch["tokens"].flatten() for batch in batches])
    assert torch.equal(read, stream[: 4 * 3 * 16])
    for batch in batches:
        assert torch.equal(batch["tokens"][:, 1:], batch["labels"][:, :-1])
        assert torch.equal(batch["position_ids"], torch.arange(16).repeat(3, 1))
        assert torch.equal(batch["loss_mask"], torch.ones(3, 16))
        assert batch["attention_mask"] is None
    assert torch.equal(
        torch.cat([batch["labels"].flatten() for batch in batches]), stream[1 : 4 * 3 * 16 + 1]
    )


def test_validation_batches_never_wrap(corpus):
    all_of_it = corpus.valid_tokens - 1
    (batch,) = validation_batches(corpus, seq_length=all_of_it, batch_size=1, count=1)
    assert batch["labels"][0, -1] == 2
    with pytest.raises(ConfigurationError, match=f"need {all_of_it + 2} tokens: expected at most the"):
        validation_batches(corpus, seq_length=all_of_it + 1, batch_size=1, count=1)


@pytest.mark.long
def test_full_corpus_size(tmp_path):
    corpus = build_corpus(tmp_path / "corpus")
    assert corpus.vocab_size == 2048
    assert corpus.text_bytes >= 8_000_000
    assert corpus.train_tokens + corpus.valid_tokens > 2_000_000
    assert 0.02 < corpus.valid_bytes / corpus.text_bytes < 0.1
    assert 2.5 < corpus.text_bytes / (corpus.train_tokens + corpus.valid_tokens) < 4
    assert replace(corpus, directory=Path()) == replace(load_corpus(tmp_path / "corpus"), directory=Path())
