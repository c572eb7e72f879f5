"""Text into indexed datasets: what is read, what is refused, and the same bytes whatever happens on the way."""

import gzip
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet
from typer.testing import CliRunner

from nemo_skymoe.cli import app
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.data import indexed, preprocess
from nemo_skymoe.data.manifest import Domain, read_manifest
from nemo_skymoe.data.tokenizer import load
from tests.data.texts import COMPRESS, TEXTS, jsonl, read, run, zstd
from tests.durable import crash


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("shard_bytes", [20, 1 << 20])
def test_jsonl_in_skypiles_form(tmp_path: Path, tokenizer: Path, suffix: str, shard_bytes: int) -> None:
    plain = jsonl(tmp_path / "part.jsonl", TEXTS).read_bytes()
    (tmp_path / "part.jsonl").unlink()
    (tmp_path / f"part.jsonl{suffix}").write_bytes(COMPRESS[suffix](plain))
    found = run(tmp_path, tokenizer, str(tmp_path / f"part.jsonl{suffix}"), shard_bytes=shard_bytes)
    assert read(tmp_path / "out") == TEXTS
    size = sum(len(text.encode()) for text in TEXTS)
    assert found == {"text": Domain(1, len(TEXTS), size + len(TEXTS), size, 0, 0)}


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string()])
def test_parquet(tmp_path: Path, tokenizer: Path, kind: pyarrow.DataType) -> None:
    table = pyarrow.table({"id": range(6), "body": pyarrow.array([*TEXTS, None], kind)})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    found = run(tmp_path, tokenizer, f"zh={tmp_path / 'a.parquet'}", text_key="body", shard_bytes=1)
    assert read(tmp_path / "out", "zh") == TEXTS
    assert found["zh"].empty == 1
    assert (tmp_path / "out" / "rejected.txt").read_text() == f"{tmp_path / 'a.parquet'}:6: empty: null\n"


def test_a_document_a_file_and_a_document_a_line(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "code" / "package").mkdir(parents=True)
    for number, text in enumerate(TEXTS):
        place = tmp_path / "code" / ("package" if number % 2 else ".") / f"{number}.py"
        place.write_bytes(b"\xef\xbb\xbf" * (number == 0) + text.encode())
    (tmp_path / "lines.txt").write_text("one\ntwo\n\nthree")
    run(tmp_path, tokenizer, f"code={tmp_path / 'code'}", formats=["code=text"], shard_bytes=30)
    assert read(tmp_path / "out", "code") == [TEXTS[number] for number in (0, 2, 4, 1, 3)]
    preprocess.preprocess([str(tmp_path / "lines.txt")], tmp_path / "lines", tokenizer, formats=["lines"])
    assert read(tmp_path / "lines") == ["one", "two", "three"]
    preprocess.preprocess([str(tmp_path / "lines.txt")], tmp_path / "whole", tokenizer)
    assert read(tmp_path / "whole") == ["one\ntwo\n\nthree"]


@pytest.mark.parametrize("shard_bytes", [1, 40, 1 << 20])
def test_what_is_no_document_is_counted_and_named(tmp_path: Path, tokenizer: Path, shard_bytes: int) -> None:
    lines = [
        b'{"text": "good"}',
        b'{"text": "torn',
        b'{"text": " \\n"}',
        b'{"text": "\\ud800 alone"}',
        b'{"text": "\xff"}',
        b'{"text": 3}',
        b'{"other": "key"}',
        b"",
        b'{"text": "last"}',
    ]
    (tmp_path / "bad.jsonl").write_bytes(b"\n".join(lines))
    found = run(tmp_path, tokenizer, str(tmp_path / "bad.jsonl"), shard_bytes=shard_bytes)
    assert read(tmp_path / "out") == ["good", "last"]
    assert (found["text"].empty, found["text"].undecodable) == (2, 5)
    listed = (tmp_path / "out" / "rejected.txt").read_text().splitlines()
    assert [line.removeprefix(f"{tmp_path / 'bad.jsonl'}:").split(":")[0] for line in listed] == list(
        "2345678"
    )
    assert "no key 'text'" in listed[5] and "the text is a int" in listed[4]


def test_domains_are_counted_apart_and_may_repeat(tmp_path: Path, tokenizer: Path) -> None:
    for name in ("a", "b", "c"):
        jsonl(tmp_path / f"{name}.jsonl", [name * 10, name])
    inputs = [f"en={tmp_path}/a.jsonl", f"zh={tmp_path}/b.json*", f"en={tmp_path}/c.jsonl"]
    answer = CliRunner().invoke(
        app, ["preprocess", *inputs, str(tmp_path / "out"), "--tokenizer", str(tokenizer), "--workers", "2"]
    )
    assert answer.exit_code == 0, answer.output
    assert (
        "en: 26 tokens in 4 documents\n" in answer.output
        and "zh: 13 tokens in 2 documents\n" in answer.output
    )
    assert read(tmp_path / "out", "en") == ["a" * 10, "a", "c" * 10, "c"]
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        *(f"{domain}.{suffix}" for domain in ("en", "zh") for suffix in ("bin", "idx")),
        *("dataset.json", "rejected.txt", "skymoe_receipt.json", "tokenizer"),
    }
    assert read_manifest(tmp_path / "out")["zh"].tokens == 13


def test_an_index_joined_of_many_is_the_one_that_megatron_writes(tmp_path: Path, tokenizer: Path) -> None:
    loaded = load(tokenizer)
    prefixes = [tmp_path / str(number) for number in range(3)]
    for number, prefix in enumerate(prefixes):
        indexed.write_documents(loaded, TEXTS[number : number + 2], prefix)
    indexed.join(prefixes, tmp_path / "joined")
    indexed.write_documents(loaded, [t for n in range(3) for t in TEXTS[n : n + 2]], tmp_path / "whole")
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"joined{suffix}").read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()


def test_the_chat_template_travels_with_the_tokenizer(tmp_path: Path, tokenizer: Path) -> None:
    """A training saves the corpus' tokenizer in its checkpoints, and their exports are asked to chat."""
    folder = tmp_path / "with template"
    shutil.copytree(tokenizer if tokenizer.is_dir() else tokenizer.parent, folder)
    (folder / "additional_chat_templates").mkdir()
    names = ("chat_template.jinja", "additional_chat_templates/tools.jinja")
    for name in names:
        (folder / name).write_text(f"{{{{ messages }}}} {name}")
    (tmp_path / "a.txt").write_text("some text")
    preprocess.preprocess([str(tmp_path / "a.txt")], tmp_path / "corpus", folder)
    for name in names:
        assert (tmp_path / "corpus" / "tokenizer" / name).read_bytes() == (folder / name).read_bytes()


def test_workers_do_not_change_the_bytes(tmp_path: Path, tokenizer: Path) -> None:
    jsonl(tmp_path / "a.jsonl", TEXTS * 20)
    for count in (1, 3):
        preprocess.preprocess(
            [str(tmp_path / "a.jsonl")], tmp_path / str(count), tokenizer, workers=count, shard_bytes=200
        )
    assert crash.tree(tmp_path / "1") == crash.tree(tmp_path / "3")


@pytest.fixture
def job(tmp_path: Path, tokenizer: Path) -> Callable[[], Any]:
    jsonl(tmp_path / "a.jsonl", TEXTS)
    jsonl(tmp_path / "b.jsonl", ["b", ""])
    inputs = [f"en={tmp_path}/a.jsonl", f"zh={tmp_path}/b.jsonl"]
    return lambda: preprocess.preprocess(inputs, tmp_path / "out", tokenizer, shard_bytes=200)


def test_killed_before_any_call_it_ends_with_the_same_bytes(tmp_path: Path, job: Callable[[], Any]) -> None:
    expected = crash.uninterrupted(job, tmp_path / "out")
    assert expected.calls > 20
    for call in crash.evenly(expected.calls, points=12):
        crash.check(job, tmp_path / "out", expected, call=call)


@pytest.mark.parametrize("seconds", [0.02, 0.1, 0.3])
def test_killed_with_its_workers_it_ends_with_the_same_bytes(
    tmp_path: Path, tokenizer: Path, seconds: float
) -> None:
    jsonl(tmp_path / "a.jsonl", [text * 100 for text in TEXTS * 20])

    def job() -> None:
        preprocess.preprocess(
            [str(tmp_path / "a.jsonl")], tmp_path / "out", tokenizer, workers=2, shard_bytes=20_000
        )

    expected = crash.uninterrupted(job, tmp_path / "out")
    crash.check(job, tmp_path / "out", expected, seconds=seconds)


def test_a_continued_job_keeps_its_finished_shards(
    tmp_path: Path, job: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    crash.attempt(job, call=10)
    finished = list((tmp_path / "out.unfinished" / "shards").glob("*.json"))
    assert finished
    done = written_shards(monkeypatch)
    job()
    assert len(done) + len(finished) == 4


def written_shards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of all shards that are tokenised from now on."""
    done: list[int] = []
    original = preprocess.share

    def spy(tasks: Any, *arguments: Any) -> None:
        done.extend(tasks)
        original(tasks, *arguments)

    monkeypatch.setattr(preprocess, "share", spy)
    return done


def test_a_domain_without_documents_is_refused_before_any_work(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jsonl(tmp_path / "en.jsonl", TEXTS * 10)
    contents: dict[str, bytes] = {
        "empty.jsonl": b"",
        "empty.jsonl.gz": gzip.compress(b""),
        "blank.jsonl": b"\n \n\n" * 9,
        "blank.jsonl.zst": zstd(b"\n" * 9),
        "other.jsonl": b'["text"]\n3\n',
        "blank.txt": b" \n",
        "binary.txt": b"\xff\xfe\x00",
    }
    done = written_shards(monkeypatch)
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigurationError, match=r"the domain 'zh' has no document in 1 files: .*"):
            run(tmp_path, tokenizer, f"en={tmp_path}/en.jsonl", f"zh={tmp_path / name}")
    assert done == [] and not list(tmp_path.glob("out*"))


def test_what_turns_out_in_the_middle_keeps_all_that_is_finished(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jsonl(tmp_path / "en.jsonl", TEXTS * 10)
    jsonl(tmp_path / "code.jsonl", TEXTS)
    whole = gzip.compress(
        jsonl(tmp_path / "zh.jsonl", [os.urandom(99).hex() for _ in range(999)]).read_bytes()
    )
    (tmp_path / "zh.jsonl.gz").write_bytes(whole[:-100])
    inputs = [f"{name}={tmp_path}/{file}" for name, file in (("en", "en.jsonl"), ("zh", "zh.jsonl.gz"))]
    with pytest.raises(ConfigurationError, match=r"zh.jsonl.gz' cannot be read to its end"):
        run(tmp_path, tokenizer, *inputs, shard_bytes=500)
    finished = crash.tree(tmp_path / "out.unfinished")
    shards = -(-(tmp_path / "en.jsonl").stat().st_size // 500)
    assert sum(name.endswith(".json") for name in finished) == shards

    # Refusals of every kind leave it alone: another tokenizer's job, a domain without documents, a missing file.
    (tmp_path / "blank.jsonl").write_text("\n")
    for refused in (["en=" + str(tmp_path / "blank.jsonl")], [*inputs, "x=missing"]):
        with pytest.raises(ConfigurationError):
            run(tmp_path, tokenizer, *refused, shard_bytes=500)
    with pytest.raises(ConfigurationError, match="unfinished work of another command"):
        run(tmp_path, tokenizer, *inputs, shard_bytes=501)
    assert crash.tree(tmp_path / "out.unfinished") == finished

    (tmp_path / "zh.jsonl.gz").write_bytes(whole)
    inputs.append(f"code={tmp_path}/code.jsonl")
    done = written_shards(monkeypatch)
    found = run(tmp_path, tokenizer, *inputs, shard_bytes=500)
    assert found["zh"].documents == 999 and found["en"].documents == 50
    assert len(done) == 2  # zh's only one, and that of code
    preprocess.preprocess(inputs, tmp_path / "fresh", tokenizer, shard_bytes=500)
    assert crash.tree(tmp_path / "out") == crash.tree(tmp_path / "fresh")


def test_finished_work_of_other_inputs_is_not_taken_for_these(
    tmp_path: Path, tokenizer: Path, job: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preprocess.os, "rename", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        job()
    monkeypatch.undo()
    kept = crash.tree(tmp_path / "out.unfinished")
    with pytest.raises(ConfigurationError, match="finished work of this command with other inputs"):
        run(tmp_path, tokenizer, f"en={tmp_path}/a.jsonl", shard_bytes=200)
    assert {name: kept[name] for name in kept} == {
        name: data for name, data in crash.tree(tmp_path / "out.unfinished").items() if name in kept
    }
    assert set(job()) == {"en", "zh"}


def test_a_file_that_changes_is_read_as_it_is_in_the_end(
    tmp_path: Path, tokenizer: Path, job: Callable[[], Any]
) -> None:
    crash.attempt(job, call=10)
    jsonl(tmp_path / "a.jsonl", ["new"])
    job()
    assert read(tmp_path / "out", "en") == ["new"]

    class Meddling:
        def __init__(self) -> None:
            self._loaded: Any = load(tokenizer)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._loaded, name)

        def encode(self, texts: Any) -> Any:
            jsonl(tmp_path / "a.jsonl", ["meanwhile"])
            return self._loaded.encode(texts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preprocess.tokenizers, "load", lambda *_: Meddling())
        with pytest.raises(ConfigurationError, match=r"a.jsonl' has changed while it was read"):
            preprocess.preprocess([f"en={tmp_path}/a.jsonl"], tmp_path / "again", tokenizer)
    preprocess.preprocess([f"en={tmp_path}/a.jsonl"], tmp_path / "again", tokenizer)
    assert read(tmp_path / "again", "en") == ["meanwhile"]


def test_work_of_another_kind_in_the_folder_is_refused(
    tmp_path: Path, tokenizer: Path, job: Callable[[], Any]
) -> None:
    crash.attempt(job, call=10)
    for options in ({"text_key": "body"}, {"end_of_document": "<s>"}):
        inputs = [f"en={jsonl(tmp_path / 'c.jsonl', TEXTS, key=options.get('text_key', 'text'))}"]
        with pytest.raises(ConfigurationError, match="unfinished work of another command"):
            run(tmp_path, tokenizer, *inputs, shard_bytes=200, **options)


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        (["missing.jsonl"], {}, "'missing.jsonl' is no file, no folder and no pattern"),
        (["a.jsonl", "a.jsonl"], {}, "'a.jsonl' is given twice"),
        (["a.jsonl"], {"text_key": "content"}, "'a.jsonl:1' has no key 'content', .* one of: text"),
        (["p.parquet"], {}, "'p.parquet' has no column 'text', expected --text-key with one of: id"),
        (["p.parquet"], {"text_key": "id"}, "column 'id' of 'p.parquet' is int64, expected string"),
        (["a.jsonl"], {"formats": ["parquet"]}, "'a.jsonl' is no parquet file"),
        (["torn.gz"], {"formats": ["jsonl"]}, "'torn.gz' cannot be read"),
        (["notes.rst"], {}, "'notes.rst' is of no known format, expected .jsonl, .json"),
        (["a.jsonl"], {"formats": ["csv"]}, "--format is 'csv', expected jsonl, parquet, text or lines"),
        (["a.jsonl"], {"formats": ["zh=text"]}, "--format has the domain 'zh', of which there is no input"),
        (["sources"], {}, "none of the 1 files in 'sources' is of a known format, expected .jsonl"),
        (["a b=a.jsonl"], {}, "the domain of 'a b=a.jsonl' is 'a b', expected letters"),
        (["a.jsonl"], {"workers": 0}, "workers is 0"),
        (["a.jsonl"], {"end_of_document": "<eod>"}, "has no '<eod>' to end documents with"),
        (["empty.jsonl"], {}, "the domain 'text' has no document in 1 files: all are empty"),
        (["deep.jsonl"], {}, "the domain 'text' has no document .*: the JSON is nested too deeply"),
        (["dangling"], {}, "'dangling/a.jsonl' cannot be read: No such file"),
        (
            ["dangling/*"],
            {},
            "'dangling/\\*' is no file, no folder and no pattern|'dangling/a.jsonl' is no file",
        ),
        (["looping"], {}, "'looping/a.jsonl' cannot be read: "),
    ],
)
def test_bad_input_is_refused_and_leaves_nothing(
    tmp_path: Path,
    tokenizer: Path,
    monkeypatch: pytest.MonkeyPatch,
    inputs: list[str],
    options: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "a.jsonl", TEXTS)
    parquet.write_table(pyarrow.table({"id": [1]}), "p.parquet")
    (tmp_path / "torn.gz").write_bytes(b"not gzip")
    (tmp_path / "notes.rst").write_text("text")
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "sources").mkdir()
    (tmp_path / "sources" / "a.py").touch()
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    for name, target in (("dangling", "nowhere.jsonl"), ("looping", "a.jsonl")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jsonl").symlink_to(target)
    before = set(tmp_path.iterdir())
    with pytest.raises(ConfigurationError, match=message):
        run(tmp_path, tokenizer, *inputs, **options)
    assert set(tmp_path.iterdir()) == before
