"""The text of the miniatures."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from benchmarks.paper import text
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.data.indexed import write_documents
from tests.waiting import HANG

PAGE = """<html><head><title>T</title><style>p {}</style></head><body><nav><a href="/">Home</a></nav>
<h1>Wie <b>man</b>
es macht</h1><p>Erst <code>a</code>, dann&nbsp;b &amp; c.</p><script>var x = "<p>";</script><ul><li>eins<li>zwei</ul><pre>drei
vier</pre>"""


def test_a_page_is_its_text_a_line_a_block() -> None:
    assert text.plain(PAGE).split("\n") == [
        "Wie man es macht",
        "Erst a, dann b & c.",
        "eins",
        "zwei",
        "drei",
        "vier",
    ]


def make_packages(root: Path, length: int = 500) -> None:
    for number, source in enumerate(text.SOURCES):
        for page in ("one", "two", "index"):
            file = root / source.pages.replace("*", page)
            file.parent.mkdir(parents=True, exist_ok=True)
            words = "" if page == "index" else f"{source.domain} {number} {page} " * length
            file.write_text(f"<p>{words}</p>")


def test_every_page_with_text_is_read_into_its_domain(tmp_path: Path) -> None:
    make_packages(tmp_path)
    domains = text.read(tmp_path)
    assert {domain: len(texts) for domain, texts in domains.items() if domain != "code"} == {
        domain: 2 * sum(source.domain == domain for source in text.SOURCES) for domain in ("en", "zh")
    }
    assert all(found.startswith("zh") for found in domains["zh"].values())
    assert len(domains["code"]) > 100


def test_a_missing_package_is_named_before_anything_is_written(tmp_path: Path) -> None:
    make_packages(tmp_path)
    for page in tmp_path.glob(text.SOURCES[0].pages):
        page.unlink()
    with pytest.raises(ConfigurationError, match=rf"missing: unpack Debian's .*{text.PACKAGES[0]}"):
        text.build(tmp_path / "corpus", tmp_path)
    assert not list(tmp_path.glob("corpus*"))


def test_two_processes_build_one_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_packages(tmp_path)
    written = []
    both = threading.Barrier(2)

    def read(_: Path) -> dict[str, dict[str, str]]:
        both.wait(timeout=HANG)
        return {}

    def write(_: object, output: Path) -> None:
        written.append(output)
        time.sleep(0.2)
        output.mkdir()

    monkeypatch.setattr(text, "read", read)
    monkeypatch.setattr(text, "_write", write)
    monkeypatch.setattr(text, "read_manifest", lambda _: None)
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(text.build, [tmp_path / "corpus"] * 2))
    assert written == [tmp_path / "corpus"]


def test_held_out_documents_are_the_last_ones(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    from nemo_skymoe.data.tokenizer import HuggingFaceTokenizer

    letters = {chr(code): code - 96 for code in range(97, 123)} | {"<end>": 0}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")  # type: ignore[assignment]
    write_documents(HuggingFaceTokenizer(tokenizer, 0), ["aa", "bb", "cc", "dd"], tmp_path / "en")
    found = text.held_out("en", 0.3, 4, tmp_path)  # a quarter is less than 0.3: two documents
    assert found.dtype == np.int64 and found.tolist() == [3, 3, 0, 4]
