"""The text of the miniatures: code, English and Chinese that Python and Debian carry. Nothing is downloaded.

    apt-get download PACKAGES && for file in *.deb; do dpkg-deb -x "$file" TEXT; done

unpacks it anywhere, without installing; PACKAGES are those that `python -m benchmarks.paper.text` prints.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from megatron.core.datasets.indexed_dataset import IndexedDataset

from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.data import byte_level, preprocess
from nemo_skymoe.data.manifest import read_manifest
from nemo_skymoe.data.standard_library import read_sources

MIXTURE = "en:7 zh:2 code:1"
"""Section 5."""
VOCABULARY = 2048
CORPUS = Path("runs/paper/corpus")
TEXT_VARIABLE = "SKYMOE_PAPER_TEXT"
_SHORTEST = 400
"""Characters: what is left of a page of links is no document."""


@dataclass(frozen=True)
class Source:
    """Pages of one Debian package; `pages` is relative to the file system's root."""

    domain: str
    package: str
    pages: str


SOURCES = (
    Source("en", "debian-handbook", "usr/share/doc/debian-handbook/html/en-US/*.html"),
    Source("en", "debian-reference-en", "usr/share/debian-reference/*.en.html"),
    Source("en", "debian-policy", "usr/share/doc/debian-policy/policy.html/*.html"),
    Source("en", "developers-reference", "usr/share/developers-reference/*.html"),
    Source("en", "installation-guide-amd64", "usr/share/doc/installation-guide-amd64/en/*.html"),
    Source("en", "aptitude-doc-en", "usr/share/doc/aptitude/html/en/*.html"),
    Source("en", "git-doc", "usr/share/doc/git/html/*.html"),
    *(
        Source("en", "python3.11-doc", f"usr/share/doc/python3.11/html/{part}/*.html")
        for part in ("faq", "howto", "library", "reference", "tutorial", "using", "whatsnew")
    ),
    Source("zh", "debian-handbook", "usr/share/doc/debian-handbook/html/zh-CN/*.html"),
    Source("zh", "debian-reference-zh-cn", "usr/share/debian-reference/*.zh-cn.html"),
    Source("zh", "maint-guide-zh-cn", "usr/share/doc/maint-guide-zh-cn/html/*.html"),
)
PACKAGES = tuple(dict.fromkeys(source.package for source in SOURCES))


def build(output: Path = CORPUS, root: Path | None = None) -> Path:
    """The three domains as Megatron datasets with a tokenizer of their own; what is there already is kept.

    Args:
        output: Folder, as of `skymoe preprocess`.
        root: Where the packages are unpacked; by default $SKYMOE_PAPER_TEXT, else where they are installed.

    Raises:
        ConfigurationError: A package is not there.
    """
    if not output.is_dir():
        documents = read(root or Path(os.environ.get(TEXT_VARIABLE, "/")))
        output.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(output.with_name(output.name + ".lock")):
            if not output.is_dir():  # another process may have written it meanwhile
                _write(documents, output)
    read_manifest(output)
    return output


def _write(documents: Mapping[str, Mapping[str, str]], output: Path) -> None:
    parts = output.with_name(output.name + ".text")
    shutil.rmtree(parts, ignore_errors=True)
    for domain, texts in documents.items():
        (parts / domain).mkdir(parents=True)
        for name, text in texts.items():
            (parts / domain / f"{name}.txt").write_text(text)
    every = [text for texts in documents.values() for text in texts.values()]
    byte_level.save(byte_level.train(every, VOCABULARY), parts / "tokenizer")
    preprocess.preprocess(
        [f"{domain}={parts / domain}" for domain in documents],
        output,
        parts / "tokenizer",
        formats=["text"],
    )


def read(root: Path) -> dict[str, dict[str, str]]:
    """Texts by domain and by a name that orders them at random, the same way on every machine."""
    domains: dict[str, dict[str, str]] = {"en": {}, "zh": {}, "code": {}}
    for source in SOURCES:
        pages = sorted(root.glob(source.pages))
        if not pages:
            raise ConfigurationError(
                f"'{root / source.pages}' is missing: unpack Debian's {', '.join(PACKAGES)} and set"
                f" {TEXT_VARIABLE} to the folder, or install them"
            )
        for page in pages:
            text = plain(page.read_text(errors="replace"))
            if len(text) >= _SHORTEST:
                domains[source.domain][_name(str(page.relative_to(root)))] = text
    domains["code"] = {_name(name): text for name, text in read_sources().items()}
    return domains


def fingerprint(corpus: Path = CORPUS) -> str:
    """Return a fingerprint of all tokens, which is equal for the same text."""
    digest = hashlib.blake2b(digest_size=8)
    for file in sorted(corpus.glob("*.bin")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def held_out(domain: str, share: float, tokens: int, corpus: Path = CORPUS) -> np.ndarray:
    """The first `tokens` tokens (int64) of the documents that `mixture_data` keeps for validation."""
    documents: Any = IndexedDataset(str(corpus / domain))
    count = len(documents)
    kept = [documents[number] for number in range(count - math.ceil(count * share), count)]
    return np.concatenate(kept)[:tokens].astype(np.int64)


def plain(page: str) -> str:
    """An HTML page's text, a line a block, without navigation, scripts and styles."""
    reader = _Text()
    reader.feed(page)
    reader.close()
    lines = (" ".join(line.split()) for line in "".join(reader.parts).split("\n"))
    return "\n".join(line for line in lines if line)


class _Text(HTMLParser):
    _LEFT_OUT = frozenset({"script", "style", "head", "nav"})
    _INLINE = frozenset({"a", "b", "code", "em", "i", "span", "strong", "tt", "abbr", "kbd", "var"})

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._inside: list[str] = []
        self._preformatted = False

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._preformatted = self._preformatted or tag == "pre"
        if tag in self._LEFT_OUT:
            self._inside.append(tag)
        elif tag not in self._INLINE:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self._preformatted = self._preformatted and tag != "pre"
        if self._inside and self._inside[-1] == tag:
            self._inside.pop()
        elif tag not in self._INLINE:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._inside:
            self.parts.append(data if self._preformatted else data.replace("\n", " "))


def _name(source: str) -> str:
    """The last documents of a domain are held out: their order must not follow the alphabet."""
    return f"{zlib.crc32(source.encode()):08x}_{source.replace('/', '_')}"


def main() -> None:
    """Build the corpus and print what is in it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=CORPUS)
    parser.add_argument(
        "--text", type=Path, help=f"where the packages are unpacked (default ${TEXT_VARIABLE})"
    )
    given = parser.parse_args()
    print("Debian packages:", " ".join(PACKAGES))
    for name, domain in read_manifest(build(given.output, given.text)).items():
        print(
            f"{name}: {domain.documents} documents, {domain.text_bytes / 1e6:.2f} MB, {domain.tokens} tokens"
        )


if __name__ == "__main__":
    main()
