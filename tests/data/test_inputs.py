"""Files, folders and tokenizers as users have them: damaged, linked, of other names."""

import gzip
import json
import os
import random
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from pyarrow import parquet
from transformers import AutoTokenizer
from typer.testing import CliRunner

from nemo_skymoe.cli import app
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.data.inputs import find_inputs
from nemo_skymoe.data.tokenizer import load
from tests.data.texts import COMPRESS, TEXTS, jsonl, read, run


def test_a_damaged_file_is_named_whatever_its_compression(tmp_path: Path, tokenizer: Path) -> None:
    # Not by chance: zstd has no checksum here, and of 400 random texts 3 are damaged to another text of the same length.
    draw = random.Random(0).randbytes
    lines = [json.dumps({"text": draw(99).hex()}).encode() + b"\n" for _ in range(3000)]
    half = b"".join(lines[:1500]), b"".join(lines[1500:])
    cases = []
    for suffix in (".gz", ".bz2", ".zst"):
        first, second = (COMPRESS[suffix](part) for part in half)
        middle = bytearray(first)
        middle[len(first) // 2 : len(first) // 2 + 200] = bytes(range(200))
        cases += [
            (suffix, first[:-1], "cut off"),
            # Not in half: that is where the first of two frames may end.
            (suffix, first[: len(first) // 3], "cut to a third"),
            (suffix, first + second[:5], "a second stream that only begins"),
            (suffix, first + b"xx" + second, "a second stream with a damaged head"),
            (suffix, bytes(middle), "a bad block"),
        ]
    table = pyarrow.table({"text": [draw(99).hex() for _ in range(999)]})
    parquet.write_table(table, tmp_path / "whole.parquet", row_group_size=300, write_page_checksum=True)
    whole = (tmp_path / "whole.parquet").read_bytes()
    page = bytearray(whole)
    page[len(whole) // 2 : len(whole) // 2 + 400] = bytes(400)
    (tmp_path / "whole.parquet").unlink()
    cases += [(".parquet", whole[:-1], "cut off"), (".parquet", whole[: len(whole) // 2], "cut in half")]
    for number, (suffix, data, what) in enumerate(cases):
        name = f"{number}{'' if suffix == '.parquet' else '.jsonl'}{suffix}"
        (tmp_path / name).write_bytes(data)
        for count in (1, 2):
            inputs = [f"zh={tmp_path / name}", f"en={jsonl(tmp_path / 'en.jsonl', TEXTS)}"]
            message = f"{name}' (cannot be read|is no parquet file)"
            with pytest.raises(ConfigurationError, match=message):
                run(tmp_path, tokenizer, *inputs, workers=count)
                pytest.fail(f"{suffix}, {what}, was read")


def test_marks_and_numbers_beside_the_text_do_not_matter(tmp_path: Path, tokenizer: Path) -> None:
    first = b'\xef\xbb\xbf{"text": "one"}\n'
    long = b'{"id": %s, "text": "two"}\n' % (b"7" * 5000)
    (tmp_path / "a.jsonl").write_bytes(
        long + first + b'{"id": 1e999, "text": "three"}\n{"text": ' + b"[" * 10**5
    )
    found = run(tmp_path, tokenizer, str(tmp_path / "a.jsonl"))
    assert read(tmp_path / "out") == ["two", "one", "three"] and found["text"].undecodable == 1
    assert "a.jsonl:4: undecodable: the JSON is nested" in (tmp_path / "out" / "rejected.txt").read_text()


@pytest.mark.parametrize("content", [None, "{}", "[", ""])
def test_a_damaged_or_missing_tokenizer_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigurationError, match=r"the tokenizer '.*' (is not there|cannot be loaded)"):
        load(tmp_path)


def test_a_tokenizers_file_alone_is_enough(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "mine.json").write_bytes((tokenizer / "tokenizer.json").read_bytes())
    jsonl(tmp_path / "a.jsonl", TEXTS)
    run(tmp_path, tmp_path / "mine.json", str(tmp_path / "a.jsonl"))
    assert read(tmp_path / "out") == TEXTS
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "tokenizer")
    assert tokenizer.eos_token == "</s>" and {*tokenizer("a")} == {"input_ids", "attention_mask"}


def test_sentencepiece(tmp_path: Path) -> None:
    from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

    (tmp_path / "text").write_text("\n".join(["天工 is a model", "ein Satz", "def f(): return"] * 20))
    SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=300, byte_fallback=True,
        minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    jsonl(tmp_path / "a.jsonl", TEXTS[:3])
    run(tmp_path, tmp_path / "tokenizer.model", str(tmp_path / "a.jsonl"))
    processor: Any = SentencePieceProcessor(
        model_file=str(tmp_path / "out" / "tokenizer" / "tokenizer.model")
    )
    dataset = IndexedDataset(str(tmp_path / "out" / "text"))
    found = [[int(number) for number in dataset[document]] for document in range(3)]
    assert found == [[*ids, processor.eos_id()] for ids in processor.encode(TEXTS[:3])]
    with pytest.raises(ConfigurationError, match="has no '<eod>'"):
        load(tmp_path / "tokenizer.model", "<eod>")


def test_folders_take_what_they_know_and_tell_the_rest(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("data/sub", "data/.cache", "elsewhere/deep", "sibling"):
        Path(folder).mkdir(parents=True)
    line = b'{"text": "x"}\n'
    for name in (
        "data/b.jsonl",
        "data/C.JSONL",
        "data/sub/d.Json",
        "elsewhere/deep/e.ndjson",
        "sibling/g.jsonl",
    ):
        Path(name).write_bytes(line)
    Path("data/A.JSONL.GZ").write_bytes(gzip.compress(line))
    for name in ("README.md", "n.csv", "c.parquet.tmp", "noext", ".hidden.jsonl", ".cache/f.jsonl"):
        Path("data", name).write_bytes(line)
    Path("data/void.jsonl").touch()
    Path("data/linked").symlink_to("../elsewhere")
    Path("data/sub/up").symlink_to("..")
    Path("data/twice").symlink_to("sub")
    Path("data/again.jsonl").symlink_to("b.jsonl")
    os.link("data/b.jsonl", "data/z.jsonl")
    Path("data/sub/outside.jsonl").symlink_to("../../sibling/g.jsonl")

    left_out: dict[str, str] = {}
    found = find_inputs(["zh=data"], "text", (), lambda path, reason: left_out.update({str(path): reason}))
    assert [(str(each.path), each.domain) for each in found] == [
        (f"data/{name}", "zh")
        for name in (
            *("A.JSONL.GZ", "C.JSONL", "b.jsonl", "linked/deep/e.ndjson"),
            *("sub/d.Json", "sub/outside.jsonl"),
        )
    ]
    again = "read already under another path"
    assert left_out == {
        **{f"data/{name}": "of unknown format" for name in ("README.md", "n.csv", "c.parquet.tmp", "noext")},
        **{f"data/{name}": "hidden" for name in (".hidden.jsonl", ".cache")},
        "data/void.jsonl": "empty",
        "data/sub/up": "a link back to a folder that it lies in",
        "data/twice": f"{again} (data/sub)",
        "data/again.jsonl": f"{again} (data/b.jsonl)",
        "data/z.jsonl": f"{again} (data/b.jsonl)",
    }
    # A pattern takes folders too, any number of levels by `**`, and each file once.
    for pattern, count in (
        ("data/sub*", 2),
        ("data/**", 6),
        ("data/**/*.[Jj]*", 5),
        ("data/**/deep/*", 1),
        ("d*/l*", 1),
    ):
        assert len(find_inputs([pattern], "text", ["jsonl"] if "[" in pattern else [])) == count, pattern
    with pytest.raises(
        ConfigurationError, match=r"'data/z.jsonl' is given twice: it is the same file as 'data/b.jsonl'"
    ):
        find_inputs(["data/b.jsonl", "data/z.jsonl"], "text")

    answer = CliRunner().invoke(app, ["preprocess", "data", "out", "--tokenizer", str(tokenizer)])
    assert answer.exit_code == 0 and "in 6 documents" in answer.stdout
    assert "not read, of unknown format (1 .csv, 1 .md, 1 .tmp, 1 without suffix): " in answer.stderr.replace(
        "1 .md, 1 .tmp, 1 .csv", "1 .csv, 1 .md, 1 .tmp"
    )
    assert answer.stderr.count("skymoe: not read, ") == 5
    listed = Path("out/rejected.txt").read_text().splitlines()
    assert sorted(listed) == sorted(f"{path}: not read, {reason}" for path, reason in left_out.items())


def test_a_folder_that_cannot_be_listed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "closed").mkdir(parents=True)
    jsonl(tmp_path / "a" / "a.jsonl", TEXTS)
    scandir = os.scandir

    def closed(path: Any) -> Any:
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(ConfigurationError, match=r"the folder '.*closed' cannot be read: Permission denied"):
        find_inputs([str(tmp_path / "a")], "text")
